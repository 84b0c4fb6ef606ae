"""Random numbers of training depend on seed, step and slot alone."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import randomness
from pipeline.data import sampler


@settings(max_examples=30, deadline=None)
@given(BATCHES, st.data())
def test_randomness_does_not_depend_on_the_split_of_a_batch(batch, draw):
    """Ranks, micro-steps and order do not matter: every slot gets its own."""
    seed, step, size = batch
    slots = torch.tensor(draw.draw(st.permutations(range(size))))
    cut = draw.draw(st.integers(0, size - 1))
    for f in (
        lambda s: randomness.noise(seed, step, s, (2, 3)),
        lambda s: randomness.timesteps(seed, step, s, size, 1000),
        lambda s: randomness.keep_caption(seed, step, s, 0.5),
        lambda s: randomness.caption_choice(seed, step, s, [5] * len(s)),
        lambda s: randomness.flips(seed, step, s),
        lambda s: sampler.batch_indices(seed, step, size, 7, slots=s),
    ):
        whole = f(torch.arange(size))
        torch.manual_seed(draw.draw(st.integers(0, 9)))
        parts = [f(part) for part in (slots[:cut], slots[cut:]) if len(part)]
        assert torch.equal(torch.cat(parts), whole[slots])


def test_randomness_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    randomness.noise(0, 0, range(4), (2,)), randomness.timesteps(0, 0, range(4), 4, 10)
    randomness.keep_caption(0, 0, range(4), 0.5), randomness.caption_choice(0, 0, range(4), [2] * 4)
    sampler.batch_indices(0, 0, 4, 9), randomness.flips(0, 0, range(4))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("other", [{"seed": 1}, {"step": 1}, {"slot": 1}, {"what": "t"}])
def test_generator_depends_on_seed_step_slot_and_purpose(other):
    draw = lambda seed=0, step=0, slot=0, what="noise": torch.randn(
        8, generator=randomness.generator(seed, step, slot, what)
    )
    assert torch.equal(draw(), draw()) and not torch.equal(draw(), draw(**other))


def test_noise_is_standard_normal_and_uncorrelated():
    eps = torch.cat(
        [randomness.noise(0, step, range(16), (64,)) for step in range(50)]
    ).double()  # (800, 64)
    n = eps.numel()
    assert abs(eps.mean()) < 4 / math.sqrt(n) and abs(eps.var() - 1) < 4 * math.sqrt(2 / n)
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
    assert t.dtype == torch.long and t.min() >= 0 and t.max() <= T - 1
    low = torch.arange(batch).double() / batch * T
    assert (t.sort().values >= low.floor()).all() and (t.sort().values < low + T / batch).all()


def test_timesteps_of_each_slot_are_uniform():
    """Chi-square over 10 cells of T = 10, for a slot alone: no slot is tied to a part of the range."""
    draws = torch.stack(
        [randomness.timesteps(5, step, torch.arange(4), 4, 10) for step in range(2000)]
    )
    for slot in range(4):
        counts = draws[:, slot].bincount(minlength=10).double()
        assert ((counts - 200) ** 2 / 200).sum() < 33.7  # 9 degrees of freedom, p = 1e-4


def test_keep_caption_drops_exactly_p():
    slots = range(64)
    assert all(randomness.keep_caption(0, step, slots, 0.0).all() for step in range(20))
    assert not any(randomness.keep_caption(0, step, slots, 1.0).any() for step in range(20))
    dropped = sum(int((~randomness.keep_caption(0, step, slots, 0.1)).sum()) for step in range(150))
    n = 64 * 150
    assert abs(dropped - 0.1 * n) < 4 * math.sqrt(n * 0.1 * 0.9)
    assert not torch.equal(
        randomness.keep_caption(0, 0, slots, 0.5), randomness.keep_caption(0, 1, slots, 0.5)
    )


def test_caption_choice_is_uniform_and_new_every_step():
    counts = torch.tensor([1, 2, 3, 3])
    drawn = torch.stack(
        [randomness.caption_choice(0, step, range(4), counts) for step in range(1200)]
    )  # (1200, 4)
    assert (drawn >= 0).all() and (drawn < counts).all() and (drawn[:, 0] == 0).all()
    for slot, n in ((1, 2), (2, 3), (3, 3)):
        expected = 1200 / n
        assert (drawn[:, slot].bincount(minlength=n) - expected).abs().max() < 4 * math.sqrt(
            expected * (1 - 1 / n)
        )
    assert not torch.equal(drawn[:, 2], drawn[:, 3]) and len(drawn[:9, 2].unique()) > 1


def test_flips_mirror_half_of_the_examples():
    shown = torch.stack([randomness.flips(0, step, range(8)) for step in range(300)])
    assert abs(shown.double().mean() - 0.5) < 4 * math.sqrt(0.25 / 2400) and not torch.equal(
        shown[0], shown[1]
    )
