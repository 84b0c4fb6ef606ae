"""The alignment score compares images with captions, and its heads are saved and loaded."""

import pytest
import torch
from tiny_run import emoji_images
from torch import nn

from pipeline.config import ConfigError
from pipeline.evaluation.alignment import (
    AlignmentHeads,
    AlignmentModel,
    Head,
    colour_histogram,
)
from pipeline.evaluation.feature_extractor import FeatureExtractor
from pipeline.models.text_encoders import load_text_encoder


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    heads = AlignmentHeads(1280 + 64, 384).eval()
    return AlignmentModel(heads, FeatureExtractor(), *load_text_encoder("minilm"))


def test_colour_histogram_counts_pixels():
    """Half black and half white; a colour between two levels counts for both."""
    image = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    image[..., 32:] = 255
    shares = colour_histogram(image)[0].square()
    assert shares[0].item() == shares[-1].item() == pytest.approx(0.5)
    red = torch.tensor([255, 0, 255 / 6]).view(1, 3, 1, 1).expand(1, 3, 32, 32) / 127.5 - 1
    shares = colour_histogram(red)[0].square().view(4, 4, 4)
    torch.testing.assert_close(shares[3, 0, :2], torch.tensor([0.5, 0.5]))
    assert shares.sum() == pytest.approx(1)


def test_head_returns_unit_vectors_of_standardised_features():
    features = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    head = Head(6, 8, 4, 0.0)
    head.standardise(features)
    vectors = head(features)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(50))
    other = Head(6, 8, 4, 0.0)
    other.load_state_dict(head.state_dict())
    other.standardise(features * 7 + 3)
    torch.testing.assert_close(other(features * 7 + 3), vectors, atol=2e-3, rtol=0)


def test_score_is_the_diagonal_of_similarities(model):
    images = emoji_images(["cat face", "hot dog", "red heart"])
    captions = ["cat face", "a hot dog", "dog"]
    similarities = model.similarities(images, captions)
    torch.testing.assert_close(model.score(images, captions), similarities.diagonal())
    again = model.score(images.float() / 127.5 - 1, ["The cat face!", "Hot Dog", "dog"])
    torch.testing.assert_close(again, similarities.diagonal(), atol=1e-3, rtol=0)


def test_caption_features_do_not_depend_on_the_batch(model):
    captions = ["dog", "a very long caption of two dogs that run over a bridge at night"]
    whole = model.caption_features(captions)
    torch.testing.assert_close(whole[:1], model.caption_features(captions[:1]))


def test_save_pretrained_keeps_the_score(tmp_path, model):
    heads = AlignmentHeads(64 + 3, 384, hidden=8, width=4).eval()
    heads.save_pretrained(tmp_path)
    again = AlignmentHeads.from_pretrained(tmp_path, use_safetensors=True)

    def score(heads):
        network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        parts = (network, model.tokenizer, model.text_encoder)
        images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        return AlignmentModel(heads, *parts).score(images, ["dog", "red cat"])

    assert torch.equal(score(again), score(heads))


def test_load_refuses_a_folder_without_heads(tmp_path):
    with pytest.raises(ConfigError, match=tmp_path.name):
        AlignmentModel.load(tmp_path)
