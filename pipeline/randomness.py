"""Every random number of training as a function of (seed, step, slot).

A slot is a position in the global batch. The same command therefore repeats the same numbers after
an interruption or on another number of processes.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

Slots = Sequence[int] | Tensor


def generator(seed: int, step: int, slot: int, purpose: str) -> torch.Generator:
    """Return the CPU generator of one decision about one example.

    torch's generator uses 32 bits of its seed: two of about 100,000 streams may coincide, but those
    of one step are unrelated.
    """
    value = hashlib.blake2b(f"{purpose} {seed} {step} {slot}".encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(value, "little"))


def noise(
    seed: int, step: int, slots: Slots, shape: Sequence[int], purpose: str = "noise"
) -> Tensor:
    """Return eps of the examples at `slots`, (B, *shape), standard normal."""
    generators = [generator(seed, step, int(slot), purpose) for slot in slots]
    return torch.stack([torch.randn(*shape, generator=own) for own in generators])


def uniform(seed: int, step: int, slots: Slots, purpose: str) -> Tensor:
    """Return one number in [0, 1) for each slot, (B,) float64."""
    generators = [generator(seed, step, int(slot), purpose) for slot in slots]
    return torch.stack([torch.rand((), dtype=torch.float64, generator=own) for own in generators])


def timesteps(seed: int, step: int, slots: Slots, global_batch: int, T: int) -> Tensor:
    """Return t of the examples at `slots`, (B,) in 0..T-1, stratified over the global batch.

    Each t is uniform, and each 1/global_batch of the range holds one t of the global batch.
    """
    strata = torch.randperm(global_batch, generator=generator(seed, step, 0, "strata"))
    stratum = strata[torch.as_tensor(slots)]
    share = (stratum + uniform(seed, step, slots, "t")) / global_batch
    # The division may round up to 1.
    return (share * T).long().clamp(max=T - 1)


def keep_caption(seed: int, step: int, slots: Slots, p: float) -> Tensor:
    """Return which examples keep their caption (B,); each loses it with probability p (14)."""
    return uniform(seed, step, slots, "dropout") >= p


def caption_choice(seed: int, step: int, slots: Slots, counts: Slots) -> Tensor:
    """Return which of its `counts` captions each example uses, (B,) in 0..counts-1, uniform."""
    counts = torch.as_tensor(counts)
    # The product may round up to counts.
    return (uniform(seed, step, slots, "caption") * counts).long().minimum(counts - 1)


def flips(seed: int, step: int, slots: Slots) -> Tensor:
    """Return which examples are mirrored left to right, (B,) bool: half of them."""
    return uniform(seed, step, slots, "flip") < 0.5
