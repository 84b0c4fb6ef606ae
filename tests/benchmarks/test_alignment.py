"""The alignment score's heads learn from pairs, and are measured on other concepts."""

import pytest
import torch

from benchmarks import alignment


@pytest.fixture(scope="module")
def pairs():
    """60 concepts, two images each, whose features are a map of their captions' features."""
    generator = torch.Generator().manual_seed(0)
    captions = torch.randn(60, 8, generator=generator)
    images = (captions @ torch.randn(8, 12, generator=generator)).repeat_interleave(2, 0)
    own = torch.full((120, alignment.NAMES), -1)
    own[:, 0] = torch.arange(60).repeat_interleave(2)
    rows = [{"concept": f"thing {i // 2:02}", "factors": {}} for i in range(120)]
    return images, captions, own, rows


def train(pairs, **options):
    images, captions, own, rows = pairs
    concepts = [row["concept"] for row in rows[:80]]
    sizes = {"hidden": 64, "width": 8, "dropout": 0.0}
    return alignment.train_heads(images[:80], captions, own[:80], concepts, **sizes, **options)


def test_train_heads_ranks_captions_of_other_concepts(pairs):
    images, captions, _own, rows = pairs
    first, five = (
        alignment.recalls(train(pairs, steps=steps, lr=1e-2), rows[80:], images[80:], captions[40:])
        for steps in (1, 60)
    )
    assert first[0].value < 0.4 < 0.7 < five[0].value
    assert five[0].n == 20


def test_train_heads_is_a_function_of_the_seed(pairs):
    state = torch.get_rng_state()
    weights = [train(pairs, steps=3, seed=seed).state_dict() for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not torch.equal(weights[0]["image.1.weight"], weights[2]["image.1.weight"])


def test_contrastive_loss_is_zero_for_certain_positives():
    positive = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]], dtype=torch.bool)
    certain = torch.where(positive, 50.0, -50.0)
    # Two positives share the probability.
    expected = torch.tensor(2 / 3) * torch.tensor(2.0).log()
    torch.testing.assert_close(alignment.contrastive_loss(certain, positive), expected)


def test_is_trained_on_keeps_a_concept_on_one_side():
    rows = [{"concept": f"{who} cook", "factors": {"role": "cook"}} for who in ("man", "woman")]
    assert len({alignment.is_trained_on(row) for row in rows}) == 1
    sides = [alignment.is_trained_on({"concept": f"{i}", "factors": {}}) for i in range(400)]
    assert 160 < sum(sides) < 240


def test_names_of_has_one_caption_with_a_style():
    caption = ["red fox, 3d style", "red fox", "a red fox in 3d style", "a red fox", "animal"]
    row = {"caption": caption, "variation": "red"}
    assert alignment.names_of(row) == ["red fox 3d style", "red fox", "animal"]
    assert alignment.in_colours(row)[:2] == ["red fox", "pink fox"]


def test_by_concept_counts_concepts():
    rows = [{"concept": name} for name in ("a", "a", "a", "b")]
    found = alignment.by_concept(torch.tensor([1.0, 1.0, 1.0, 0.0]), rows)
    assert (found.value, found.n) == (0.5, 2)
