"""Whitened caption states have the moments they promise, and padding stays padding."""

import pytest
import torch

from pipeline.diffusion import captions
from pipeline.diffusion.captions import CaptionWhitening, simplify

RIDGE = 0.02


@pytest.fixture
def states():
    """40 captions of 6 correlated states far from the origin; the last two are padding."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(5, 5, generator=generator)
    out = torch.randn(40, 6, 5, generator=generator) @ mix + torch.tensor([9.0, -3, 0, 1, 20])
    out[:, 4:] = 0
    return out


def test_fit_whitens_up_to_the_ridge(states):
    white = CaptionWhitening.fit(states, RIDGE)(states)[:, :4].flatten(0, 1).double()
    raw = states[:, :4].flatten(0, 1).double()
    assert white.mean(0).abs().max() < 1e-4
    variance = torch.linalg.eigvalsh(torch.cov(raw.T))
    assert torch.allclose(
        torch.linalg.eigvalsh(torch.cov(white.T)), variance / (variance + RIDGE), atol=1e-4
    )


def test_fit_gives_a_symmetric_matrix(states):
    matrix = CaptionWhitening.fit(states, RIDGE).matrix
    assert torch.allclose(matrix, matrix.T, atol=1e-6)
    assert (torch.linalg.eigvalsh(matrix.double()) > 0).all()


def test_fit_ignores_padding_and_leaves_it_zero(states):
    whitening = CaptionWhitening.fit(states, RIDGE)
    assert not whitening(states)[:, 4:].any()
    assert torch.equal(CaptionWhitening.fit(states[:, :4], RIDGE).matrix, whitening.matrix)


def test_fit_stays_finite_without_variance(states):
    flat = states.clone()
    flat[..., 2] = 7.0 * (flat[..., 0] != 0)
    white = CaptionWhitening.fit(flat, RIDGE)(flat)
    assert white.isfinite().all() and white[..., 2].abs().max() < 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_forward_keeps_the_dtype_of_the_states(states, dtype):
    assert CaptionWhitening.fit(states, RIDGE)(states.to(dtype)).dtype == dtype


def test_from_pretrained_whitens_the_same(states, tmp_path):
    whitening = CaptionWhitening.fit(states, RIDGE)
    whitening.save_pretrained(tmp_path)
    assert torch.equal(CaptionWhitening.from_pretrained(tmp_path)(states), whitening(states))


@pytest.mark.parametrize(
    ("ridge", "rows", "offence"),
    [
        (0, 40, "ridge .* 0:"),
        (-1, 40, "ridge .*-1"),
        (float("nan"), 40, "ridge .*nan"),
        (RIDGE, 0, "2 states .* 0"),
    ],
)
def test_fit_refuses_what_cannot_be_whitened(states, ridge, rows, offence):
    with pytest.raises(ValueError, match=offence):
        CaptionWhitening.fit(states[:rows], ridge)


def test_whiten_in_batches_matches_whitening_at_once(states, monkeypatch):
    """Their statistics are those of all, and so is what comes out, in the memory that they had."""
    whole = CaptionWhitening.fit(states, RIDGE)
    monkeypatch.setattr(captions, "WHITENING_BATCH", 7)
    pieces, memory = CaptionWhitening.fit(states, RIDGE), states.clone()
    assert torch.allclose(pieces.matrix, whole.matrix, atol=1e-5) and torch.allclose(
        pieces.mean, whole.mean, atol=1e-5
    )
    assert whole.whiten_(memory) is memory and torch.allclose(memory, whole(states), atol=1e-5)


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        ("cat", "cat"),
        ("Cat!", "cat"),
        ("the cat", "cat"),
        ("  A  red,\tcat. ", "red cat"),
        ("an owl & an eagle", "owl eagle"),
        ("fox, 3d style", "fox 3d style"),
        ("jack-o'-lantern", "jack-o lantern"),
        ("woman’s T-shirt", "woman’s t-shirt"),
        ("A", "a"),
        ("Éclair 🍰", "éclair"),
        ("...", ""),
        ("", ""),
    ],
)
def test_simplify_leaves_words_in_lower_case(typed, read):
    assert simplify(typed) == read
    assert simplify(read) == read
