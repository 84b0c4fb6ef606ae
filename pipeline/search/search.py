"""More compute at inference for better outputs (18): candidates of one prompt, the best first.

A budget counts network calls for one image: a guided step takes two, and a verifier's calls count
as well.
"""

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.diffusion.guidance import InputError, Weight, prompt_weights
from pipeline.diffusion.text_to_image import Step, TextToImagePipeline, weights_at
from pipeline.search.verifiers import CANDIDATE_BATCH, LikelihoodVerifier, Verifier

CANDIDATES_PER_CHECK = 4  # scored between two states, so that a search stops soon


@dataclass(frozen=True)
class SearchState:
    """The candidates so far, and at the end all of them, best first."""

    candidates: Tensor  # (N, c, h, w); before the end the current x_0 (15) of one batch
    scores: Tensor  # (N,), nan without a score
    order: Tensor  # (N,), the candidates' numbers: number i is sampled from seed + i
    curve: list[tuple[int, float]]  # (network calls, best score so far)
    calls: int
    total: int  # calls at the end
    last: bool = False
    best: tuple[int, Tensor] | None = None  # before the end: the best one's number, and it

    @property
    def x_0(self) -> Tensor:
        """The first candidate (c, h, w), at the end the best: `pipe.decode(x_0[None])`."""
        return self.candidates[0]


def find_best(
    pipe: TextToImagePipeline, prompt: str, budget: int, verifier: Verifier, **options
) -> SearchState:
    """Return the end of a search, the best candidate first; see `search_steps`."""
    return deque(search_steps(pipe, prompt, budget, verifier, **options), maxlen=1).pop()


def search_steps(
    pipe: TextToImagePipeline,
    prompt: str,
    budget: int,
    verifier: Verifier,
    *,
    negative_prompt: str | None = None,
    w: Weight | None = None,
    steps: int = 50,
    eta: float | None = None,
    seed: int = 0,
) -> Iterator[SearchState]:
    """Return an iterator over a search's states, to watch or stop it; the last is the answer.

    As many candidates as the budget allows are sampled, candidate i from seed + i, and scored.
    The budget of one sample gives `pipe(prompt, seed=seed)`, bit for bit, without a score.
    InputError for a smaller budget.
    """
    weight: Weight = pipe.config["w"] if w is None else w
    if not callable(weight):
        weight = float(prompt_weights(weight, 1))
    calls = calls_of_sample(pipe, weight, steps)
    if budget < calls:
        raise InputError(
            f"A budget of {budget} network calls is too small: one image of {steps} steps takes "
            f"{calls}."
        )
    # A scheduler that the verifier cannot score is refused before the first sample.
    if isinstance(verifier, LikelihoodVerifier) and budget // (calls + verifier.calls) > 1:
        verifier.plan(pipe.scheduler, (1,))
    call = {
        "w": weight,
        "num_inference_steps": steps,
        "eta": eta,
        "negative_prompt": negative_prompt,
    }
    return random_search(pipe, prompt, budget, verifier, seed, call)


def calls_of_steps(pipe: TextToImagePipeline, w: Weight, steps: int) -> list[int]:
    """Return the network calls of each step of one image: one without guidance, else two."""
    scheduler: Any = pipe.prepare_scheduler(steps, None, pipe.device)
    weights = [weights_at(w, 1, scheduler, t) for t in scheduler.timesteps]
    return [int((w_t != -1).any()) + int((w_t != 0).any()) for w_t in weights]


def calls_of_sample(pipe: TextToImagePipeline, w: Weight, steps: int) -> int:
    """Return the network calls of one image."""
    return sum(calls_of_steps(pipe, w, steps))


def random_search(
    pipe: TextToImagePipeline, prompt: str, budget: int, verifier: Verifier, seed: int, call: dict
) -> Iterator[SearchState]:
    """Yield the states of sampling and scoring independent candidates."""
    per_step = calls_of_steps(pipe, call["w"], call["num_inference_steps"])
    each = sum(per_step) + verifier.calls
    n = max(budget // each, 1)
    total = n * each if n > 1 else sum(per_step)
    batches = []
    scores = []
    curve = []
    calls = 0
    for first in range(0, n, CANDIDATE_BATCH):
        size = min(CANDIDATE_BATCH, n - first)
        prompts = [prompt] * size
        numbers = torch.arange(first, first + size)
        unscored = torch.full((size,), torch.nan)
        steps = pipe.denoise(prompts, seed=seed + first, **call)
        for step, cost in zip(steps, per_step, strict=True):
            calls += cost * size
            yield SearchState(current_x_0(step), unscored, numbers, curve, calls, total)
        x_0 = step.x_t
        if n == 1:
            yield SearchState(x_0, unscored, numbers, [], calls, total, last=True)
            return
        batches.append(x_0)
        for some in score_candidates(pipe, prompts, x_0, verifier):
            scores += some.tolist()
            curve = [((i + 1) * each, max(scores[: i + 1])) for i in range(len(scores))]
            calls += verifier.calls * len(some)
            best = best_so_far(batches, scores)
            yield SearchState(x_0, unscored, numbers, curve, calls, total, best=best)
    yield rank_candidates(torch.cat(batches), torch.tensor(scores), curve, total)


def best_so_far(batches: list[Tensor], scores: list[float]) -> tuple[int, Tensor]:
    """Return the number of the best scored candidate, and the candidate (c, h, w)."""
    number = max(range(len(scores)), key=scores.__getitem__)
    return number, batches[number // CANDIDATE_BATCH][number % CANDIDATE_BATCH]


def score_candidates(
    pipe: TextToImagePipeline, prompts: list[str], x_0: Tensor, verifier: Verifier
) -> Iterator[Tensor]:
    """Yield the scores of candidates (N, c, h, w), a few at a time; nan becomes the worst."""
    for start in range(0, len(x_0), CANDIDATES_PER_CHECK):
        rows = slice(start, start + CANDIDATES_PER_CHECK)
        yield verifier(pipe, prompts[rows], x_0[rows]).cpu().nan_to_num(nan=-math.inf)


def rank_candidates(
    x_0: Tensor, scores: Tensor, curve: list[tuple[int, float]], calls: int
) -> SearchState:
    """Return the end of a search: the candidates in the order of their scores."""
    order = scores.argsort(descending=True)
    ranked = x_0[order.to(x_0.device)]
    return SearchState(ranked, scores[order], order, curve, calls, calls, last=True)


def current_x_0(step: Step) -> Tensor:
    """Return the current x_0 (15), or x_t if the scheduler does not return it."""
    return step.x_t if step.x_0_hat is None else step.x_0_hat
