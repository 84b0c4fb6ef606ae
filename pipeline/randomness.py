"""Everything random about a training step, as a function of (seed, step, slot); slot = position in the global batch.

So the same command after an interruption, or on another number of processes, repeats what was drawn.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def generator(seed: int, step: int, slot: int, what: str) -> torch.Generator:
    """The CPU generator of one decision about one example, whatever was drawn before or beside it.

    torch's generator keeps 32 bits of its seed, so two of some 100,000 streams may coincide; no two of a step are related.
    """
    value = hashlib.blake2b(f"{what} {seed} {step} {slot}".encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(value, "little"))


def noise(
    seed: int, step: int, slots: Sequence[int] | Tensor, shape: Sequence[int], what: str = "noise"
) -> Tensor:
    """eps of the examples at `slots`, (B, *shape), standard normal; another purpose draws other noise."""
    return torch.stack(
        [torch.randn(*shape, generator=generator(seed, step, int(slot), what)) for slot in slots]
    )


def uniform(seed: int, step: int, slots: Sequence[int] | Tensor, what: str) -> Tensor:
    """One number in [0, 1) for each of `slots`, (B,) float64."""
    draws = [
        torch.rand((), dtype=torch.float64, generator=generator(seed, step, int(slot), what))
        for slot in slots
    ]
    return torch.stack(draws)


def timesteps(
    seed: int, step: int, slots: Sequence[int] | Tensor, global_batch: int, T: int
) -> Tensor:
    """t of the examples at `slots`, (B,) in 0..T-1: uniform for each, and one in every 1/global_batch of the range for all."""
    stratum = torch.randperm(global_batch, generator=generator(seed, step, 0, "strata"))[
        torch.as_tensor(slots)
    ]
    share = (stratum + uniform(seed, step, slots, "t")) / global_batch
    return (share * T).long().clamp(max=T - 1)  # the division may round up to 1


def keep_caption(seed: int, step: int, slots: Sequence[int] | Tensor, p: float) -> Tensor:
    """Which examples keep their caption, (B,) bool: each loses it with probability p (14)."""
    return uniform(seed, step, slots, "dropout") >= p


def caption_choice(
    seed: int, step: int, slots: Sequence[int] | Tensor, counts: Sequence[int] | Tensor
) -> Tensor:
    """Which of its `counts` captions each example has, (B,) in 0..counts-1: uniform, drawn anew every step."""
    counts = torch.as_tensor(counts)
    return (
        (uniform(seed, step, slots, "caption") * counts).long().minimum(counts - 1)
    )  # the product may round up


def flips(seed: int, step: int, slots: Sequence[int] | Tensor) -> Tensor:
    """Which examples are shown mirrored, left for right, (B,) bool: half of them."""
    return uniform(seed, step, slots, "flip") < 0.5
