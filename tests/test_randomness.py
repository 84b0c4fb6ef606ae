"""Random numbers of training depend on seed, step and slot alone."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import randomness
from pipeline.data import sampler

BATCHES = st.tuples(st.integers(0, 2**63 - 1), st.integers(0, 10**6), st.integers(1, 24))


@settings(max_examples=30, deadline=None)
@given(BATCHES, st.data())
def test_randomness_does_not_depend_on_the_split_of_a_batch(batch, data):
    """Ranks, micro-steps and order do not matter: every slot has numbers of its own."""
    seed, step, size = batch
    slots = torch.tensor(data.draw(st.permutations(range(size))))
    cut = data.draw(st.integers(0, size - 1))
    for function in (
        lambda s: randomness.noise(seed, step, s, (2, 3)),
        lambda s: randomness.timesteps(seed, step, s, size, 1000),
        lambda s: randomness.keep_caption(seed, step, s, 0.5),
        lambda s: randomness.caption_choice(seed, step, s, [5] * len(s)),
        lambda s: randomness.flips(seed, step, s),
        lambda s: sampler.batch_indices(seed, step, size, 7, slots=s),
    ):
        together = function(torch.arange(size))
        torch.manual_seed(data.draw(st.integers(0, 9)))
        parts = [function(part) for part in (slots[:cut], slots[cut:]) if len(part)]
        assert torch.equal(torch.cat(parts), together[slots])


def test_randomness_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    randomness.noise(0, 0, range(4), (2,))
    randomness.timesteps(0, 0, range(4), 4, 10)
    randomness.keep_caption(0, 0, range(4), 0.5)
    randomness.caption_choice(0, 0, range(4), [2] * 4)
    randomness.flips(0, 0, range(4))
    sampler.batch_indices(0, 0, 4, 9)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "other", [(1, 0, 0, "noise"), (0, 1, 0, "noise"), (0, 0, 1, "noise"), (0, 0, 0, "t")]
)
def test_generator_depends_on_seed_step_slot_and_purpose(other):
    def sample(*key):
        return torch.randn(8, generator=randomness.generator(*key))

    assert torch.equal(sample(0, 0, 0, "noise"), sample(0, 0, 0, "noise"))
    assert not torch.equal(sample(0, 0, 0, "noise"), sample(*other))


def test_noise_is_standard_normal_and_uncorrelated():
    eps = torch.cat([randomness.noise(0, step, range(16), (64,)) for step in range(50)]).double()
    assert eps.shape == (800, 64)
    n = eps.numel()
    assert abs(eps.mean()) < 4 / math.sqrt(n)
    assert abs(eps.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs((eps[1:] * eps[:-1]).mean()) < 4 / math.sqrt(n)


@settings(max_examples=50, deadline=None)
@given(
    st.integers(0, 2**63 - 1),
    st.integers(0, 10**6),
    st.integers(1, 64),
    st.sampled_from([1, 7, 100, 1000]),
)
def test_timesteps_have_one_in_each_stratum(seed, step, batch, T):
    t = randomness.timesteps(seed, step, torch.arange(batch), batch, T)
    assert t.dtype == torch.long
    assert t.min() >= 0
    assert t.max() <= T - 1
    low = torch.arange(batch).double() / batch * T
    assert (t.sort().values >= low.floor()).all()
    assert (t.sort().values < low + T / batch).all()


def test_timesteps_of_each_slot_are_uniform():
    """Chi-square over 10 cells of T = 10 for each slot: none is tied to a part of the range."""
    slots = torch.arange(4)
    t = torch.stack([randomness.timesteps(5, step, slots, 4, 10) for step in range(2000)])
    for slot in range(4):
        counts = t[:, slot].bincount(minlength=10).double()
        # 9 degrees of freedom, p = 1e-4.
        assert ((counts - 200) ** 2 / 200).sum() < 33.7


def test_keep_caption_drops_exactly_p():
    slots = range(64)
    assert all(randomness.keep_caption(0, step, slots, 0.0).all() for step in range(20))
    assert not any(randomness.keep_caption(0, step, slots, 1.0).any() for step in range(20))
    dropped = sum(int((~randomness.keep_caption(0, step, slots, 0.1)).sum()) for step in range(150))
    n = 64 * 150
    assert abs(dropped - 0.1 * n) < 4 * math.sqrt(n * 0.1 * 0.9)
    first, second = [randomness.keep_caption(0, step, slots, 0.5) for step in (0, 1)]
    assert not torch.equal(first, second)


def test_caption_choice_is_uniform_and_new_every_step():
    counts = torch.tensor([1, 2, 3, 3])
    steps = range(1200)
    choices = torch.stack([randomness.caption_choice(0, s, range(4), counts) for s in steps])
    assert (choices >= 0).all()
    assert (choices < counts).all()
    assert (choices[:, 0] == 0).all()
    for slot, n in ((1, 2), (2, 3), (3, 3)):
        expected = len(steps) / n
        deviation = (choices[:, slot].bincount(minlength=n) - expected).abs().max()
        assert deviation < 4 * math.sqrt(expected * (1 - 1 / n))
    assert not torch.equal(choices[:, 2], choices[:, 3])
    assert len(choices[:9, 2].unique()) > 1


def test_flips_mirror_half_of_the_examples():
    flips = torch.stack([randomness.flips(0, step, range(8)) for step in range(300)])
    assert abs(flips.double().mean() - 0.5) < 4 * math.sqrt(0.25 / 2400)
    assert not torch.equal(flips[0], flips[1])
