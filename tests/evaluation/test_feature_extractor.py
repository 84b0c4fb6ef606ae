"""The judge is the ImageNet network it says it is."""

import matplotlib.cbook
import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.data.emoji import catalogue, styles
from pipeline.evaluation import feature_extractor
from pipeline.evaluation.feature_extractor import FeatureExtractor
from pipeline.evaluation.retrieval import EvaluationError


@pytest.fixture(scope="module")
def judge():
    return FeatureExtractor()


def pictures(captions: list[str], size: int = 72) -> torch.Tensor:
    """Emoji by their captions, uint8 (N, 3, size, size)."""
    found = {e.caption: e.path for e in catalogue.catalogue()}
    return torch.stack(
        [
            torch.from_numpy(np.array(styles.render(found[c], size))).permute(2, 0, 1)
            for c in captions
        ]
    )


def test_the_judge_sees_a_military_uniform_on_grace_hopper(judge):
    with Image.open(matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)) as photo:
        square = np.array(photo.convert("RGB").crop((0, 0, 512, 512)))
    scores = judge.logits(torch.from_numpy(square).permute(2, 0, 1)[None])[0].softmax(0)
    assert scores.argmax() == 652  # military uniform
    assert {457, 834} <= set(scores.topk(3).indices.tolist())  # bow tie, suit


def test_the_judge_knows_some_emoji(judge):
    classes = {"soccer ball": 805, "teapot": 849, "tiger": 292, "strawberry": 949, "umbrella": 879}
    top = judge.logits(pictures(list(classes))).topk(5).indices.tolist()
    assert [n in best for n, best in zip(classes.values(), top, strict=True)] == [True] * len(
        classes
    )


def test_bytes_and_floats_are_the_same_pictures_and_batches_do_not_matter(judge):
    images = pictures(["cat face", "hot dog", "red heart"])
    whole, split = judge.features(images), judge.features(images.float() / 127.5 - 1, batch=2)
    assert whole.shape == (3, 1280)
    torch.testing.assert_close(whole, split, atol=1e-4, rtol=1e-4)


def test_a_judge_with_other_weights_is_refused(monkeypatch):
    monkeypatch.setattr(feature_extractor, "WEIGHTS_SHA256", "0" * 64)
    with pytest.raises(EvaluationError, match="expected 0{64}: pip install"):
        FeatureExtractor()


def test_images_of_another_shape_are_refused(judge):
    with pytest.raises(EvaluationError, match=r"\(1, 4, 8, 8\), expected \(N, 3, H, W\)"):
        judge.features(torch.zeros(1, 4, 8, 8))
