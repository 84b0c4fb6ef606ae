"""More compute at inference for better outputs (18): spend a budget of network calls on one prompt and return the best picture.

A call is one picture through the network once: a guided step is two, and what a verifier asks the network counts as well.
`direct-jump search RUN_OR_ID "a green cat" --budget 800 --out best.png`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.diffusion.guidance import InputError, Weight, prompt_weights
from pipeline.diffusion.text_to_image import Step, TextToImagePipeline, make_generators, weights_at
from pipeline.search.verifiers import CANDIDATE_BATCH, LikelihoodVerifier, Verifier

STILL_MESSAGE = (
    "eta is {}, expected more for method paths: without new noise its copies would stay the same"
)
SAME_PATH_TOLERANCE = 1e-5  # as far as two copies of a path are apart by rounding
CANDIDATES_PER_CHECK = (
    4  # candidates between two looks at a search: what is asked to stop stops as soon
)


@dataclass(frozen=True)
class SearchState:
    """What a search has found: on its way the candidates as far as they are, at its end all of them, best first."""

    candidates: Tensor  # (N, c, h, w), as the network draws them; on the way the x_0 of (15) of those that are being drawn
    scores: Tensor  # (N,), nan where nothing was judged
    order: Tensor  # (N,), the candidates' numbers: number i of method random is drawn from seed + i
    curve: list[
        tuple[int, float]
    ]  # (network calls so far, best score so far); empty where nothing was judged
    calls: int
    total: int  # the calls at the end
    last: bool = False
    best: tuple[int, Tensor] | None = (
        None  # method random on its way, once it has judged: the best one's number, and it
    )

    @property
    def x_0(self) -> Tensor:
        """The first candidate (c, h, w), at the end the best: `pipe.decode(x_0[None])` is the picture."""
        return self.candidates[0]


def find_best(
    pipe: TextToImagePipeline,
    prompt: str,
    budget: int,
    verifier: Verifier,
    method: str = "random",
    **options,
) -> SearchState:
    """The best picture of a prompt that `budget` network calls find; see `searching` for the rest."""
    for found in search_steps(pipe, prompt, budget, verifier, method, **options):  # noqa: B007
        pass
    return found


def search_steps(
    pipe: TextToImagePipeline,
    prompt: str,
    budget: int,
    verifier: Verifier,
    method: str = "random",
    *,
    negative_prompt: str | None = None,
    w: Weight | None = None,
    steps: int = 50,
    eta: float | None = None,
    seed: int = 0,
) -> Iterator[SearchState]:
    """A search step by step, so that its reader can watch and stop it; the last `Found` is the answer.

    method: "random" draws as many candidates as the budget judges, candidate i from seed + i, and keeps the best; "paths" lets
    candidates share the budget, and twice on the way puts copies of the better half in the other half's place, which new
    noise then drives apart (eta > 0). The budget of one sample draws it as `pipe(prompt, seed=seed)` does, bit for bit, and
    judges nothing. InputError for a budget below that, and for an unknown method.
    """
    if method not in SEARCH_METHODS:
        raise InputError(
            f"method is {method!r}, expected one of {', '.join(SEARCH_METHODS)}: random is the plain one"
        )
    if method == "paths" and eta == 0:
        raise InputError(STILL_MESSAGE.format(eta))
    w = pipe.config.w if w is None else w
    w = w if callable(w) else float(prompt_weights(w, 1))
    one = calls_of_sample(pipe, w, steps)
    if budget < one:
        raise InputError(
            f"the budget is {budget} network calls, expected {one} or more: one picture of {steps} steps takes that"
        )
    if isinstance(verifier, LikelihoodVerifier) and budget // (one + verifier.calls) > 1:
        verifier.plan(
            pipe.scheduler, (1,)
        )  # what it cannot judge it refuses here, before anything is drawn
    call = {"w": w, "num_inference_steps": steps, "eta": eta, "negative_prompt": negative_prompt}
    return SEARCH_METHODS[method](pipe, prompt, budget, verifier, seed, call)


def calls_of_steps(pipe: TextToImagePipeline, w: Weight, steps: int) -> list[int]:
    """The network calls of each step of one picture: two where guided, one where w is 0 or -1."""
    scheduler = pipe.prepare_scheduler(steps, None, pipe.device)
    found = [weights_at(w, 1, scheduler, t) for t in scheduler.timesteps]
    return [int((w_t != -1).any()) + int((w_t != 0).any()) for w_t in found]


def calls_of_sample(pipe: TextToImagePipeline, w: Weight, steps: int) -> int:
    """The network calls of one picture."""
    return sum(calls_of_steps(pipe, w, steps))


def random_search(
    pipe, prompt: str, budget: int, verifier: Verifier, seed: int, call: dict
) -> Iterator[SearchState]:
    """Independent candidates, the best of them."""
    per_step = calls_of_steps(pipe, call["w"], call["num_inference_steps"])
    each = sum(per_step) + verifier.calls
    n = max(budget // each, 1)
    total = n * each if n > 1 else sum(per_step)
    drawn, scores, curve, calls = [], [], [], 0
    for first in range(0, n, CANDIDATE_BATCH):
        rows = [prompt] * min(CANDIDATE_BATCH, n - first)
        numbers, nothing = (
            torch.arange(first, first + len(rows)),
            torch.full((len(rows),), torch.nan),
        )
        for step, cost in zip(pipe.denoise(rows, seed=seed + first, **call), per_step, strict=True):
            calls += cost * len(rows)
            yield SearchState(current_x_0(step), nothing, numbers, curve, calls, total)
        if n == 1:
            yield SearchState(step.x_t, nothing, numbers, [], calls, total, last=True)
            return
        drawn.append(step.x_t)
        for some in score_candidates(pipe, rows, step.x_t, verifier):
            scores += some.tolist()
            curve = [((i + 1) * each, max(scores[: i + 1])) for i in range(len(scores))]
            calls += verifier.calls * len(some)
            yield SearchState(
                step.x_t, nothing, numbers, curve, calls, total, best=best_so_far(drawn, scores)
            )
    yield rank_candidates(torch.cat(drawn), torch.tensor(scores), curve, total)


def best_so_far(drawn: list[Tensor], scores: list[float]) -> tuple[int, Tensor]:
    """The number of the best candidate that has been judged, and the candidate (c, h, w)."""
    number = max(range(len(scores)), key=scores.__getitem__)
    return number, drawn[number // CANDIDATE_BATCH][number % CANDIDATE_BATCH]


def path_search(
    pipe, prompt: str, budget: int, verifier: Verifier, seed: int, call: dict
) -> Iterator[SearchState]:
    """Candidates that are judged on the way by their current x_0 (15), where the better half takes the other half's place."""
    each = calls_of_path(pipe, verifier, call)
    n = budget // each
    if n < 2:
        yield from random_search(pipe, prompt, 0, verifier, seed, call)
        return
    make_generators(n, seed, None)  # which refuses what is no seed
    nothing = torch.full((n,), torch.nan)
    for x_0, scores, calls in advance_paths(
        pipe, [prompt], n, verifier, range(seed, seed + n), call
    ):  # noqa: B007
        yield SearchState(x_0, nothing, torch.arange(n), [], calls, n * each)
    yield rank_candidates(x_0, scores[0], [(n * each, scores.max().item())], n * each)


def calls_of_path(pipe: TextToImagePipeline, verifier: Verifier, call: dict) -> int:
    """The network calls of one candidate of `path_search`: it is judged at each turn and at the end."""
    per_step = calls_of_steps(pipe, call["w"], call["num_inference_steps"])
    return sum(per_step) + (len(resampling_steps(len(per_step))) + 1) * verifier.calls


def resampling_steps(steps: int) -> set[int]:
    """After which steps, counted from 1, paths are judged on the way."""
    return {steps // 3, 2 * steps // 3} - {0}


def advance_paths(
    pipe: TextToImagePipeline,
    prompts: list[str],
    n: int,
    verifier: Verifier,
    seeds: Sequence[int],
    call: dict,
    batch: int = CANDIDATES_PER_CHECK,
) -> Iterator[tuple[Tensor, Tensor | None, int]]:
    """n paths of each of P prompts: x_0 (P n, c, h, w) so far, at the end with their scores (P, n), and the calls so far.

    seeds: P n, one a path. `batch` paths are judged at once.
    """
    name = type(pipe.scheduler).__name__
    if getattr(pipe.scheduler, "order", 1) > 1 or hasattr(
        pipe.scheduler, "derivatives"
    ):  # of the steps before, by row
        raise InputError(
            f"{name} remembers the steps before, expected a scheduler without memory for method paths: use random"
        )
    per_step, rows = (
        calls_of_steps(pipe, call["w"], call["num_inference_steps"]),
        [one for one in prompts for _ in range(n)],
    )
    generators, steps, calls = [torch.Generator().manual_seed(s) for s in seeds], len(per_step), 0
    way = zip(pipe.denoise(rows, generator=generators, **call), per_step, strict=True)
    copied = None  # one path, and its copy, one step ago
    for i, (step, cost) in enumerate(way, 1):
        if step.x_0_hat is None:
            raise InputError(
                f"{name} tells no current x_0, expected one for method paths: use random"
            )
        if (
            copied
            and i < steps
            and torch.allclose(*step.x_t[copied], rtol=0, atol=SAME_PATH_TOLERANCE)
        ):
            raise InputError(STILL_MESSAGE.format(call["eta"]) + f" by {name}")
        copied = None
        x_0 = step.x_t if i == steps else step.x_0_hat
        calls += cost * len(rows)
        yield x_0, None, calls
        if i in resampling_steps(steps) or i == steps:
            scores = []
            for some in score_candidates(pipe, rows, x_0, verifier, batch):
                scores.append(some)
                calls += verifier.calls * len(some)
                yield x_0, None, calls
            scores = torch.cat(scores).reshape(-1, n)
            if i < steps:
                kept = scores.argsort(1, descending=True)[:, : (n + 1) // 2]
                chosen = torch.cat([kept, kept], 1)[:, :n] + n * torch.arange(len(prompts))[:, None]
                step.x_t, copied = step.x_t[chosen.flatten().to(step.x_t.device)], [0, (n + 1) // 2]
    yield x_0, scores, calls


SEARCH_METHODS: dict[str, Callable[..., Iterator[SearchState]]] = {
    "random": random_search,
    "paths": path_search,
}


def score_candidates(
    pipe, prompts: list[str], x_0: Tensor, verifier: Verifier, batch: int = CANDIDATES_PER_CHECK
) -> Iterator[Tensor]:
    """The scores of candidates (N, c, h, w), `batch` of them after `batch`; one that is not a number is the worst."""
    for i in range(0, len(x_0), batch):
        yield (
            verifier(pipe, prompts[i : i + batch], x_0[i : i + batch])
            .cpu()
            .nan_to_num(nan=-math.inf)
        )


def rank_candidates(
    x_0: Tensor, scores: Tensor, curve: list[tuple[int, float]], calls: int
) -> SearchState:
    """Candidates in the order of their scores, the end of a search."""
    order = scores.argsort(descending=True)
    return SearchState(
        x_0[order.to(x_0.device)], scores[order], order, curve, calls, calls, last=True
    )


def current_x_0(step: Step) -> Tensor:
    """The current x_0 of (15), or x_t where the scheduler does not say."""
    return step.x_t if step.x_0_hat is None else step.x_0_hat
