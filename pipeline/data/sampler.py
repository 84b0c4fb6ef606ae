"""The order in which epochs show a dataset's rows."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.data.sources.rows import DataError
from pipeline.randomness import generator


def evenly_spaced(n: int, stop: int, start: int = 0) -> Tensor:
    """n of the rows start … stop - 1 at even distances, the first and the last among them; all where there are no more."""
    return torch.linspace(start, stop - 1, min(n, stop - start)).long()


# ---- the order of an epoch


@functools.lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, n: int) -> Tensor:
    """The order of one epoch, (n,)."""
    return torch.randperm(n, generator=generator(seed, epoch, 0, "order"))


def batch_indices(
    seed: int, step: int, batch_size: int, n: int, slots: Sequence[int] | Tensor | None = None
) -> Tensor:
    """The rows of the examples at `slots` (None: all) of a step's batch, (B,); every epoch is a new order of n.

    Batches run on across the ends of epochs, so n may be smaller than the batch. Raises DataError for n < 1.
    """
    if n < 1:
        raise DataError(f"a batch needs at least one image, got {n}")
    slots = range(batch_size) if slots is None else slots
    places = [divmod(step * batch_size + int(slot), n) for slot in slots]
    return torch.tensor(
        [int(epoch_order(seed, epoch, n)[place]) for epoch, place in places], dtype=torch.long
    )
