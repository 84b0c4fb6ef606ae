"""Classifier-free guidance (17): pure functions of two predictions and a weight w."""

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, TypeAlias

import torch
from torch import Tensor

FixedWeight: TypeAlias = float | Sequence[float] | Tensor
Weight: TypeAlias = FixedWeight | Callable[[float], FixedWeight]


class InputError(ValueError):
    """A request that cannot be fulfilled: what is wrong, then what to do."""


def guide(eps_c: Tensor, eps_u: Tensor, w: Tensor | float) -> Tensor:
    """Return the guided prediction (1 + w) eps_c - w eps_u (B, ...), (17); w is a number or (B,).

    The terms are grouped to pass equal predictions unchanged at any w. eps, x_0 and v are affine in
    each other at one x_t, and the two factors sum to 1, so the same line guides all three.
    """
    if isinstance(w, Tensor) and w.ndim:
        w = w.to(eps_c).reshape(-1, *[1] * (eps_c.ndim - 1))
    return eps_c + w * (eps_c - eps_u)


def interval(w: FixedWeight, lo: float, hi: float) -> Callable[[float], FixedWeight]:
    """Guidance at w where the noise level is in [lo, hi], none elsewhere.

    The noise level is sqrt(1 - abar_t), the standard deviation of the noise in x_t: 0 is the clean
    image, 1 pure noise. A bound on the ratio sigma = noise / signal is sigma / sqrt(1 + sigma**2)
    here.
    """
    if not 0 <= lo <= hi <= 1:
        raise InputError(f"interval needs noise levels 0 <= lo <= hi <= 1, got lo={lo}, hi={hi}.")
    return lambda level: w if lo <= level <= hi else 0.0


def prompt_weights(
    w: Weight | None, prompts: int, level: float | None = None, name: str = "w"
) -> Tensor:
    """Return each prompt's finite weight (prompts,) at a noise level, float64, or InputError."""
    value: Any = w(level) if callable(w) and level is not None else w
    if hasattr(value, "tolist"):  # tensors and arrays
        value = value.tolist()
    is_sequence = isinstance(value, Sequence) and not isinstance(value, str)
    values = list(value) if is_sequence else [value] * prompts
    if any(isinstance(v, bool) or not isinstance(v, Real) or not math.isfinite(v) for v in values):
        raise InputError(
            f"{name} must be a finite number, one per prompt, or a function of the noise level, "
            f"got {value!r}. "
            "w=0 samples without guidance; w=2 is a good start."
        )
    if len(values) != prompts:
        raise InputError(
            f"{name} has {len(values)} values for {prompts} prompts. Pass {prompts} or one number."
        )
    return torch.tensor(values, dtype=torch.float64)


def shift_weight(w: Weight, n: float) -> Weight:
    """Return w + n in w's own kind: a number, sequence, tensor or function."""
    if callable(w):
        return lambda level: _shift(w(level), n)
    return _shift(w, n)


def w_from_guidance_scale(scale: Weight) -> Weight:
    """Return w = guidance_scale - 1 in its own kind, but 0 below 1, as in diffusers."""
    if callable(scale):
        return lambda level: _at_least_zero(_shift(scale(level), -1))
    return _at_least_zero(_shift(scale, -1))


def _shift(w: FixedWeight, n: float) -> FixedWeight:
    return w + n if isinstance(w, int | float | Real | Tensor) else [v + n for v in w]


def _at_least_zero(w: FixedWeight) -> FixedWeight:
    if isinstance(w, Tensor):
        return w.clamp(min=0)
    return max(w, 0) if isinstance(w, int | float | Real) else [max(v, 0) for v in w]
