"""The order in which epochs show the rows of a dataset."""

import functools

import torch
from torch import Tensor

from pipeline.data.sources.rows import DataError
from pipeline.randomness import Slots, generator


def evenly_spaced(n: int, stop: int, start: int = 0) -> Tensor:
    """Return n evenly spaced rows of start … stop - 1 with both ends, or all if there are fewer."""
    return torch.linspace(start, stop - 1, min(n, stop - start)).long()


@functools.lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, n: int) -> Tensor:
    """Return the order of one epoch, (n,)."""
    return torch.randperm(n, generator=generator(seed, epoch, 0, "order"))


def batch_indices(
    seed: int, step: int, batch_size: int, n: int, slots: Slots | None = None
) -> Tensor:
    """Return the rows of the examples at `slots` (None: all) of a step's batch, (B,).

    Batches continue across epochs, so n may be smaller than the batch. Raises DataError for n < 1.
    """
    if n < 1:
        raise DataError(f"A batch needs at least one image, got {n}.")
    rows = []
    for slot in range(batch_size) if slots is None else slots:
        epoch, position = divmod(step * batch_size + int(slot), n)
        rows.append(int(epoch_order(seed, epoch, n)[position]))
    return torch.tensor(rows, dtype=torch.long)


def mixed_batch_indices(
    seed: int, step: int, batch_size: int, n: int, kept: int, share: float, slots: Slots
) -> Tensor:
    """Return the rows at `slots` of a step's batch, (B,), whose last slots are of a second dataset.

    The second dataset has `kept` rows after the n of the first, and fills a share of every batch.
    Each dataset has epochs of its own.
    """
    first_kept = batch_size - round(share * batch_size)
    slots = torch.as_tensor(slots)
    is_kept = slots >= first_kept
    rows = torch.empty_like(slots)
    rows[~is_kept] = batch_indices(seed, step, first_kept, n, slots[~is_kept])
    kept_slots = slots[is_kept] - first_kept
    rows[is_kept] = n + batch_indices(seed, step, batch_size - first_kept, kept, kept_slots)
    return rows
