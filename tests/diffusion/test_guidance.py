"""Guidance (17): what it is at its limits, and what it does to Gaussians."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.diffusion.guidance import InputError, guide, interval, prompt_weights, shift_weight

FINITE = st.floats(-50, 50)


def two(shape=(4, 3, 2, 2), dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=g, dtype=dtype), torch.randn(
        shape, generator=g, dtype=dtype
    )


@settings(deadline=None)  # the machine may be busy
@given(FINITE)
def test_guide_is_the_lectures_combination(w):
    eps_c, eps_u = two()
    torch.testing.assert_close(
        guide(eps_c, eps_u, w), (1 + w) * eps_c - w * eps_u, rtol=1e-12, atol=1e-12
    )


def test_guide_at_zero_is_conditional_bit_for_bit():
    eps_c, eps_u = two(dtype=torch.float32)
    assert torch.equal(guide(eps_c, eps_u, 0.0), eps_c)


def test_guide_at_minus_one_is_unconditional():
    eps_c, eps_u = two()
    torch.testing.assert_close(guide(eps_c, eps_u, -1.0), eps_u, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("w", [2.0, 1e6, -7.5])
def test_guide_passes_equal_predictions_unchanged(w):
    eps, _ = two(dtype=torch.float32)
    assert torch.equal(guide(eps, eps.clone(), w), eps)


def test_guide_takes_a_weight_per_image():
    eps_c, eps_u = two()
    w = torch.tensor([0.0, -1.0, 2.0, 7.5], dtype=torch.float64)
    together = guide(eps_c, eps_u, w)
    for i in range(4):
        torch.testing.assert_close(
            together[i], guide(eps_c[i], eps_u[i], float(w[i])), rtol=1e-14, atol=1e-14
        )


@settings(deadline=None)  # the machine may be busy
@given(FINITE, FINITE)
def test_guide_on_x_0_equals_guide_on_eps(w, abar):
    """By (5) eps is affine in x_0 at one x_t, so (17) may be applied to either."""
    abar = 0.02 + 0.96 / (1 + 2.0**-abar)
    x_c, x_u = two()
    x_t = torch.randn(x_c.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def eps(x_0):
        return (x_t - abar**0.5 * x_0) / (1 - abar) ** 0.5

    torch.testing.assert_close(
        eps(guide(x_c, x_u, w)), guide(eps(x_c), eps(x_u), w), rtol=1e-9, atol=1e-9
    )


def test_guide_extrapolates_the_mean_of_two_gaussians():
    """Guided scores (mu - x) of two unit Gaussians are that of one at (1 + w) mu_c - w mu_u."""
    mu_c, mu_u = two()
    x = torch.zeros_like(mu_c) + 0.3
    torch.testing.assert_close(guide(mu_c - x, mu_u - x, 1.5), 2.5 * mu_c - 1.5 * mu_u - x)


def test_interval_guides_inside_only():
    w = interval(2.0, 0.2, 0.8)
    assert [w(level) for level in (0.0, 0.19, 0.2, 0.5, 0.8, 0.81, 1.0)] == [
        0,
        0,
        2.0,
        2.0,
        2.0,
        0,
        0,
    ]


def test_interval_takes_one_weight_per_prompt():
    w = interval([1.0, 3.0], 0.2, 0.8)
    assert prompt_weights(w, 2, 0.5).tolist() == [1, 3]
    assert prompt_weights(w, 2, 0.9).tolist() == [0, 0]


def test_interval_takes_tensors():
    assert [interval(torch.tensor(2.0), 0.2, 0.8)(level) for level in (0.5, 0.9)] == [2, 0]
    assert [
        prompt_weights(interval(torch.tensor([1.0, 3.0]), 0.2, 0.8), 2, level).tolist()
        for level in (0.5, 0.9)
    ] == [[1, 3], [0, 0]]


@pytest.mark.parametrize("bounds", [(0.8, 0.2), (-0.1, 0.5), (0.1, 1.5), (float("nan"), 1.0)])
def test_interval_refuses_bad_noise_levels(bounds):
    with pytest.raises(InputError, match=f"lo={bounds[0]}, hi={bounds[1]}"):
        interval(2.0, *bounds)


@pytest.mark.parametrize(
    "w",
    [
        2,
        2.0,
        [2.0, 2.0],
        (2, 2),
        torch.tensor(2.0),
        torch.tensor([2.0, 2.0]),
        lambda level: 4 * level,
    ],
)
def test_prompt_weights_take_every_kind_of_weight(w):
    assert torch.equal(prompt_weights(w, 2, 0.5), torch.tensor([2.0, 2.0], dtype=torch.float64))


@pytest.mark.parametrize(
    "w",
    [
        float("inf"),
        float("nan"),
        "2",
        True,
        None,
        [1.0, "2"],
        [1.0, float("inf")],
        lambda level: "2",
    ],
)
def test_prompt_weights_refuse_what_is_not_finite(w):
    with pytest.raises(InputError, match="^w must be"):
        prompt_weights(w, 2, 0.5)


def test_prompt_weights_refuse_the_wrong_count():
    with pytest.raises(InputError, match="3 values for 2"):
        prompt_weights([1, 2, 3], 2)


@pytest.mark.parametrize("w", [2.0, [2.0, 0.5], torch.tensor([2.0, 0.5]), interval(2.0, 0.2, 0.8)])
def test_shift_weight_shifts_every_kind_of_weight(w):
    for level in (0.1, 0.5):
        assert torch.equal(
            prompt_weights(shift_weight(w, 1), 2, level), prompt_weights(w, 2, level) + 1
        )
        assert torch.equal(
            prompt_weights(shift_weight(shift_weight(w, 1), -1), 2, level),
            prompt_weights(w, 2, level),
        )


def test_semantic_breaks_are_noticed(monkeypatch):
    """A weight of the wrong sign."""
    right = guide
    monkeypatch.setitem(globals(), "guide", lambda eps_c, eps_u, w: right(eps_c, eps_u, -w))
    with pytest.raises(AssertionError):
        test_guide_at_minus_one_is_unconditional()
