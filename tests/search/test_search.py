"""A search stays within its budget, and one sample's budget gives that sample."""

import itertools
import math
from collections import deque

import pytest
import torch
from diffusers import DDIMScheduler
from tiny import tiny_pipeline

from pipeline.diffusion.guidance import InputError, interval
from pipeline.search import search
from pipeline.search.search import calls_of_sample, find_best, search_steps
from pipeline.search.verifiers import LikelihoodVerifier


@pytest.fixture
def pipe():
    return tiny_pipeline(w=1.5, caption_length=8, caption_dropout=0.1)


def count_calls(pipe):
    """The images of each of the network's calls, as they come."""
    rows = []
    pipe.unet.register_forward_pre_hook(lambda _network, args: rows.append(len(args[0])))
    return rows


class Brightness:
    """A verifier that never calls the network."""

    calls = 0

    def __call__(self, pipe, prompt, x_0):
        return x_0.flatten(1).mean(1)


def test_find_best_with_one_samples_budget_is_that_sample(pipe):
    plain = pipe("red heart", seed=5, num_inference_steps=4, output_type="latent").images
    rows = count_calls(pipe)
    found = find_best(pipe, "red heart", 8, LikelihoodVerifier(4), steps=4, seed=5)
    assert torch.equal(found.x_0, plain[0])
    assert found.calls == sum(rows) == 8


@pytest.mark.parametrize("verifier", [LikelihoodVerifier(2), Brightness()])
@pytest.mark.parametrize("budget", [60, 200])
def test_find_best_counts_every_call_within_the_budget(pipe, verifier, budget):
    rows = count_calls(pipe)
    found = find_best(pipe, "red heart", budget, verifier, steps=4)
    assert found.calls == sum(rows) <= budget
    assert budget - found.calls < 8 + verifier.calls, "another candidate would not have fitted"
    assert found.curve[-1] == (found.calls, pytest.approx(found.scores.max().item()))


def test_find_best_ranks_candidates_of_consecutive_seeds(pipe, monkeypatch):
    # Ten candidates are three batches.
    monkeypatch.setattr(search, "CANDIDATE_BATCH", 4)
    found = find_best(pipe, "red heart", 80, Brightness(), steps=4, seed=3)
    call = {"num_inference_steps": 4, "output_type": "latent"}
    alone = torch.stack([pipe("red heart", seed=3 + i, **call).images[0] for i in range(10)])
    scores = alone.flatten(1).mean(1)
    assert torch.allclose(found.scores, scores.sort(descending=True).values, atol=1e-5)
    assert torch.allclose(found.candidates, alone[found.order], atol=1e-3)
    assert torch.equal(found.x_0, found.candidates[0])
    best = [score for _, score in found.curve]
    assert best == sorted(best)
    assert [calls for calls, _ in found.curve] == [8 * (i + 1) for i in range(10)]


def test_calls_of_sample_are_two_where_guided_and_one_elsewhere(pipe):
    assert [calls_of_sample(pipe, w, 10) for w in (2.0, 0.0, -1.0)] == [20, 10, 10]
    assert 10 < calls_of_sample(pipe, interval(2.0, 0.5, 0.9), 10) < 20


@pytest.mark.parametrize(
    ("change", "offending"), [({"budget": 7}, "7 network calls"), ({"w": [1.0, 2.0]}, "2 values")]
)
def test_search_steps_refuses_before_the_first_sample(pipe, change, offending):
    options = {"budget": 100, "verifier": Brightness(), "steps": 4} | change
    with pytest.raises(InputError, match=offending):
        search_steps(pipe, "red heart", **options)


def test_search_steps_refuses_a_scheduler_without_a_bound(pipe):
    pipe.scheduler = DDIMScheduler()
    with pytest.raises(InputError, match="DDIMScheduler"):
        search_steps(pipe, "red heart", 100, LikelihoodVerifier(2), steps=4)


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5])
def test_find_best_refuses_what_is_no_seed(pipe, seed):
    with pytest.raises(InputError, match=str(seed)):
        find_best(pipe, "red heart", 100, Brightness(), steps=4, seed=seed)


def test_find_best_takes_one_w_as_a_list_or_a_tensor(pipe):
    plain = find_best(pipe, "red heart", 24, Brightness(), steps=4, w=2.0)
    for w in ([2.0], torch.tensor(2.0), torch.tensor([2.0])):
        found = find_best(pipe, "red heart", 24, Brightness(), steps=4, w=w)
        assert torch.equal(found.candidates, plain.candidates)


def test_search_steps_can_be_watched_and_left_at_any_call(pipe):
    rows = count_calls(pipe)
    verifier = LikelihoodVerifier(2)
    states = list(search_steps(pipe, "red heart", 200, verifier, steps=4))
    assert [state.last for state in states] == [False] * (len(states) - 1) + [True]
    calls = [state.calls for state in states]
    assert calls == sorted(calls)
    assert calls[-1] == sum(rows)
    assert {state.total for state in states} == {calls[-1]}
    most = max(after - before for before, after in itertools.pairwise(calls))
    n = len(states[-1].candidates)
    # Between two states: a step of all candidates, or a few scores.
    assert most <= max(2 * n, search.CANDIDATES_PER_CHECK * verifier.calls)
    before = sum(rows)
    left = search_steps(pipe, "red heart", 200, verifier, steps=4)
    next(left)
    left.close()
    assert sum(rows) == before + 2 * n


def test_find_best_samples_with_the_negative_prompt_and_eta(pipe):
    options = {"negative_prompt": "blue", "eta": 0.5, "seed": 5}
    call = {"num_inference_steps": 4, "output_type": "latent"}
    plain = pipe("red heart", **options, **call).images
    found = find_best(pipe, "red heart", 8, Brightness(), steps=4, **options)
    assert torch.equal(found.x_0, plain[0])
    assert found.curve == []
    assert found.scores.isnan().all()


def test_score_candidates_ranks_a_nan_last(pipe):
    class Broken(Brightness):
        def __call__(self, pipe, prompt, x_0):
            scores = super().__call__(pipe, prompt, x_0)
            return torch.where(torch.arange(len(scores)) == 1, torch.nan, scores)

    found = find_best(pipe, "red heart", 40, Broken(), steps=4, w=2.0)
    assert found.scores[-1] == -math.inf
    assert found.scores[0].isfinite()
    assert math.isfinite(found.curve[-1][1])


def test_search_steps_shows_the_best_so_far(pipe):
    states = search_steps(pipe, "red heart", 80, Brightness(), steps=4)
    *_, before_last, last = deque(states, maxlen=2)
    number, x_0 = before_last.best
    assert number == last.order[0]
    assert torch.equal(x_0, last.x_0)
