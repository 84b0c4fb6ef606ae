"""Classifier-free guidance (17) as pure functions: two predictions in, one out, at a weight w that may vary."""

import math
from collections.abc import Callable, Sequence
from numbers import Real

import torch
from torch import Tensor

Weight = Real | Sequence[Real] | Tensor | Callable[[float], Real | Sequence[Real] | Tensor]


class InputError(ValueError):
    """A request that cannot be drawn: what was given, what is expected, how to mend it."""


def guide(eps_c: Tensor, eps_u: Tensor, w: Tensor | float) -> Tensor:
    """The guided prediction (1 + w) eps_c - w eps_u (B, ...), equation (17).

    It is grouped so that equal predictions pass unchanged at any w. eps, x_0 and v are affine in each other at one x_t,
    and the two factors sum to 1, so the same line guides all three. w is a number or (B,).
    """
    if isinstance(w, Tensor) and w.ndim:
        w = w.to(eps_c).reshape(-1, *[1] * (eps_c.ndim - 1))
    return eps_c + w * (eps_c - eps_u)


def interval(
    w: Real | Sequence[Real] | Tensor, lo: float, hi: float
) -> Callable[[float], Real | Sequence[Real] | Tensor]:
    """Guidance at w where the noise level is in [lo, hi], none elsewhere.

    The noise level is sqrt(1 - abar_t), the standard deviation of the noise in x_t: 0 is the clean image, 1 pure noise.
    A bound on the ratio sigma = noise / signal is sigma / sqrt(1 + sigma**2) here.
    """
    if not 0 <= lo <= hi <= 1:
        raise InputError(
            f"interval got the noise levels lo={lo}, hi={hi}, expected 0 <= lo <= hi <= 1: swap or clip them"
        )
    return lambda level: w if lo <= level <= hi else 0.0


def prompt_weights(w: Weight, prompts: int, level: float | None = None, name: str = "w") -> Tensor:
    """The finite weight of each prompt (prompts,) at one noise level, float64; InputError for anything else."""
    value = w(level) if callable(w) else w
    if hasattr(value, "tolist"):  # tensors and arrays
        value = value.tolist()
    values = (
        list(value)
        if isinstance(value, Sequence) and not isinstance(value, str)
        else [value] * prompts
    )
    if any(isinstance(v, bool) or not isinstance(v, Real) or not math.isfinite(v) for v in values):
        raise InputError(
            f"{name} is {value!r}, expected a finite number, one for each prompt, or a function of the noise "
            "level: w=0 draws without guidance, w=2 is a good start"
        )
    if len(values) != prompts:
        raise InputError(
            f"{name} has {len(values)} values for {prompts} prompts, expected one each: pass {prompts} or a number"
        )
    return torch.tensor(values, dtype=torch.float64)


def shift_weight(w: Weight, n: float) -> Weight:
    """w + n in w's own kind: number, one per prompt, or function. diffusers' guidance_scale is plus(w, 1)."""
    if callable(w):
        return lambda level: shift_weight(w(level), n)
    return w + n if isinstance(w, Real | Tensor) else [v + n for v in w]


def w_from_guidance_scale(scale: Weight) -> Weight:
    """w of diffusers' guidance_scale, in its own kind: scale - 1, but 0 below 1, where diffusers draws without guidance."""
    if callable(scale):
        return lambda level: w_from_guidance_scale(scale(level))
    w = shift_weight(scale, -1)
    return (
        w.clamp(min=0)
        if isinstance(w, Tensor)
        else max(w, 0)
        if isinstance(w, Real)
        else [max(v, 0) for v in w]
    )
