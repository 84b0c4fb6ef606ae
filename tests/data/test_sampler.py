"""The order of rows: every epoch has each once."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data import sampler
from pipeline.data.sources.rows import DataError


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**63 - 1), st.integers(1, 40), st.integers(1, 40))
def test_batch_indices_have_every_row_once_per_epoch(seed, n, batch):
    """Also if the batch is larger than the data and epochs end inside batches."""
    steps = math.ceil(3 * n / batch)
    rows = torch.cat([sampler.batch_indices(seed, step, batch, n) for step in range(steps)])
    for epoch in range(3):
        assert sorted(rows[epoch * n : (epoch + 1) * n].tolist()) == list(range(n))


def test_epoch_order_depends_on_epoch_and_seed():
    keys = [(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    orders = [sampler.batch_indices(seed, epoch, 50, 50).tolist() for seed, epoch in keys]
    assert len({tuple(order) for order in orders}) == 4


def test_batch_indices_of_slots_are_those_of_the_batch():
    some = sampler.batch_indices(0, 3, 10, 17, slots=range(6, 10))
    assert torch.equal(some, sampler.batch_indices(0, 3, 10, 17)[6:])


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 7), st.integers(2, 5))
def test_mixed_batch_indices_have_epochs_of_both(n, kept, kept_slots, ranks):
    """Also slot by slot, as ranks ask for them."""
    size = 8
    share = kept_slots / size

    def mixed(step, slots):
        return sampler.mixed_batch_indices(3, step, size, n, kept, share, slots)

    batches = torch.stack([mixed(step, range(size)) for step in range(n * kept)])
    assert ((batches >= n).sum(1) == kept_slots).all()
    for rows, count in ((batches[batches < n], n), (batches[batches >= n] - n, kept)):
        assert rows[: len(rows) // count * count].bincount().unique().numel() == 1
        assert sorted(rows[:count].tolist()) == list(range(count))
    for rank in range(ranks):
        slots = range(rank, size, ranks)
        assert torch.equal(mixed(1, slots), mixed(1, range(size))[list(slots)])


def test_batch_indices_refuses_an_empty_dataset():
    with pytest.raises(DataError, match="got 0"):
        sampler.batch_indices(0, 0, 4, 0)


def test_evenly_spaced_includes_both_ends():
    assert sampler.evenly_spaced(4, 10).tolist() == [0, 3, 6, 9]
    assert sampler.evenly_spaced(3, 20, 10).tolist() == [10, 14, 19]
    assert sampler.evenly_spaced(5, 3).tolist() == [0, 1, 2]
