"""Copies, seams and diversity against images and features with known answers."""

import pytest
import torch
from tiny_run import emoji_images, normal

from pipeline.evaluation import image_quality
from pipeline.evaluation.retrieval import EvaluationError, centred_unit_vectors


def test_seam_ratio_grows_where_squares_are_shifted():
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(64, 3, 32, 32, generator=generator) - 0.5
    # 500,000 gradients without a grid.
    assert image_quality.seam_ratio(noise, 4) == pytest.approx(1, abs=0.02)
    steps = 0.3 * torch.randn(64, 3, 8, 8, generator=generator)
    steps = steps.repeat_interleave(4, 2).repeat_interleave(4, 3)
    # Variances: the step's difference over the noise's.
    expected = 1 + 2 * 0.3**2 / (2 / 12)
    found = image_quality.seam_ratio(noise * 0.5 + steps * 0.5, 4)
    assert found == pytest.approx(expected, rel=0.05)
    assert image_quality.seam_ratio(noise * 0.5 + steps.roll((2, 2), (2, 3)) * 0.5, 4) < 1


def test_seam_ratio_refuses_a_patch_of_one_pixel():
    with pytest.raises(EvaluationError, match="got 1"):
        image_quality.seam_ratio(torch.zeros(1, 3, 8, 8), 1)


def test_copy_rate_finds_moved_copies_and_no_other_images():
    captions = ["cat face", "hot dog", "red heart", "rocket", "banana", "snowman", "tiger", "key"]
    # The white border keeps a move from losing anything.
    train = torch.nn.functional.pad(emoji_images(captions, 60), [2] * 4, value=255)
    threshold = image_quality.copy_threshold(train)
    moved = train.roll(1, 3)
    assert image_quality.copy_distances(moved, train).diagonal().amax() < 1e-3
    assert image_quality.copy_rate(moved, train, threshold).k == len(train)
    others = emoji_images(["green heart", "pizza", "house", "bicycle"], 64)
    assert image_quality.copy_rate(others, train, threshold).k == 0
    assert 0.05 < threshold < 0.4


def test_augment_changes_little_and_is_seeded():
    images = emoji_images(["cat face", "hot dog"], 64)
    a = image_quality.augment(images)
    assert torch.equal(a, image_quality.augment(images))
    assert not torch.equal(a, image_quality.augment(images, seed=1))
    assert a[:, :, :2, :2].mean() > 0.9  # what moves in from outside is white


def test_diversity_is_the_mean_distance_of_pairs():
    references = torch.cat([torch.eye(4), -torch.eye(4)])  # its mean is 0
    e = torch.eye(4)
    first_seed = torch.stack([e[0], e[0], e[0]])
    second_seed = torch.stack([e[0], e[1], -e[0]])
    found = image_quality.diversity(torch.stack([first_seed, second_seed]), references)
    assert found.tolist() == pytest.approx([0, 1, 2])
    features = normal(5, 7, 4)
    moved = 3 * normal(4)
    unit = features / features.norm(dim=-1, keepdim=True)
    pairs = [1 - (unit[i] * unit[j]).sum(-1) for i in range(5) for j in range(i)]
    found = image_quality.diversity(features + moved, references + moved)
    torch.testing.assert_close(found, torch.stack(pairs).mean(0))


def test_diversity_refuses_one_seed():
    with pytest.raises(EvaluationError, match="got 1"):
        image_quality.diversity(normal(1, 7, 4), normal(8, 4))


def test_semantic_breaks_are_noticed(monkeypatch):
    """A diversity that includes each sample's pair with itself is too low."""

    def with_own_pairs(features, references):
        total = centred_unit_vectors(features, references).sum(0).square().sum(-1)
        return 1 - total / len(features) ** 2

    monkeypatch.setattr(image_quality, "diversity", with_own_pairs)
    with pytest.raises(AssertionError):
        test_diversity_is_the_mean_distance_of_pairs()
