"""The feature extractor is the ImageNet network that it says it is."""

import matplotlib.cbook
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_run import emoji_images
from torch import nn

from pipeline.config import ConfigError
from pipeline.evaluation import feature_extractor as module
from pipeline.evaluation.feature_extractor import FeatureExtractor


def test_logits_see_a_uniform_on_grace_hopper(feature_extractor):
    with Image.open(matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)) as photo:
        square = np.array(photo.convert("RGB").crop((0, 0, 512, 512)))
    image = torch.from_numpy(square).permute(2, 0, 1)[None]
    scores = feature_extractor.logits(image)[0].softmax(0)
    assert scores.argmax() == 652  # military uniform
    assert {457, 834} <= set(scores.topk(3).indices.tolist())  # bow tie, suit


def test_logits_know_some_emoji(feature_extractor):
    classes = {"soccer ball": 805, "teapot": 849, "tiger": 292, "strawberry": 949, "umbrella": 879}
    top = feature_extractor.logits(emoji_images(list(classes))).topk(5).indices.tolist()
    assert [n in best for n, best in zip(classes.values(), top, strict=True)] == [True] * 5


def test_features_of_bytes_and_floats_agree_in_any_batch(feature_extractor):
    images = emoji_images(["cat face", "hot dog", "red heart"])
    whole = feature_extractor.features(images)
    split = feature_extractor.features(images.float() / 127.5 - 1, batch=2)
    assert whole.shape == (3, 1280)
    torch.testing.assert_close(whole, split, atol=1e-4, rtol=1e-4)


def test_weights_file_refuses_another_hash(monkeypatch):
    monkeypatch.setattr(module, "WEIGHTS_SHA256", "0" * 64)
    with pytest.raises(ConfigError, match="0{64}"):
        FeatureExtractor()


def test_preprocess_refuses_another_shape(feature_extractor):
    with pytest.raises(ValueError, match=r"\(1, 4, 8, 8\)"):
        feature_extractor.features(torch.zeros(1, 4, 8, 8))


def test_extract_features_takes_any_network():
    images = torch.randint(256, (5, 3, 4, 4), dtype=torch.uint8)
    found = module.extract_features(nn.Flatten(), images, batch=2)
    assert found.dtype == torch.float32
    assert torch.equal(found, images.flatten(1).float())
