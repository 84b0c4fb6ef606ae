"""More compute at inference for better outputs (18): spend a budget of network calls on one prompt and return the best picture.

A call is one picture through the network once: a guided step is two, and what a verifier asks the network counts as well.
`python -m pipeline.search RUN_OR_ID "a green cat" --budget 800 --out best.png`.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pipeline.cli import sample
from pipeline.diffusion import text_to_image
from pipeline.diffusion.guidance import InputError, Weight, weights
from pipeline.diffusion.text_to_image import Step, TextToImagePipeline, weights_at
from pipeline.models import loading
from pipeline.search.verifiers import BATCH, Clip, Likelihood, Verifier

STILL = (
    "eta is {}, expected more for method paths: without new noise its copies would stay the same"
)
ALIKE = 1e-5  # as far as two copies of a path are apart by rounding
JUDGED = 4  # candidates between two looks at a search: what is asked to stop stops as soon


@dataclass(frozen=True)
class Found:
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


def search(
    pipe: TextToImagePipeline,
    prompt: str,
    budget: int,
    verifier: Verifier,
    method: str = "random",
    **options,
) -> Found:
    """The best picture of a prompt that `budget` network calls find; see `searching` for the rest."""
    for found in searching(pipe, prompt, budget, verifier, method, **options):  # noqa: B007
        pass
    return found


def searching(
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
) -> Iterator[Found]:
    """A search step by step, so that its reader can watch and stop it; the last `Found` is the answer.

    method: "random" draws as many candidates as the budget judges, candidate i from seed + i, and keeps the best; "paths" lets
    candidates share the budget, and twice on the way puts copies of the better half in the other half's place, which new
    noise then drives apart (eta > 0). The budget of one sample draws it as `pipe(prompt, seed=seed)` does, bit for bit, and
    judges nothing. InputError for a budget below that, and for an unknown method.
    """
    if method not in METHODS:
        raise InputError(
            f"method is {method!r}, expected one of {', '.join(METHODS)}: random is the plain one"
        )
    if method == "paths" and eta == 0:
        raise InputError(STILL.format(eta))
    w = pipe.config.w if w is None else w
    w = w if callable(w) else float(weights(w, 1))
    one = calls_of_sample(pipe, w, steps)
    if budget < one:
        raise InputError(
            f"the budget is {budget} network calls, expected {one} or more: one picture of {steps} steps takes that"
        )
    if isinstance(verifier, Likelihood) and budget // (one + verifier.calls) > 1:
        verifier.plan(
            pipe.scheduler, (1,)
        )  # what it cannot judge it refuses here, before anything is drawn
    call = {"w": w, "num_inference_steps": steps, "eta": eta, "negative_prompt": negative_prompt}
    return METHODS[method](pipe, prompt, budget, verifier, seed, call)


def calls_of_steps(pipe: TextToImagePipeline, w: Weight, steps: int) -> list[int]:
    """The network calls of each step of one picture: two where guided, one where w is 0 or -1."""
    scheduler = pipe._own_scheduler(steps, None, pipe.device)
    found = [weights_at(w, 1, scheduler, t) for t in scheduler.timesteps]
    return [int((w_t != -1).any()) + int((w_t != 0).any()) for w_t in found]


def calls_of_sample(pipe: TextToImagePipeline, w: Weight, steps: int) -> int:
    """The network calls of one picture."""
    return sum(calls_of_steps(pipe, w, steps))


def random_search(
    pipe, prompt: str, budget: int, verifier: Verifier, seed: int, call: dict
) -> Iterator[Found]:
    """Independent candidates, the best of them."""
    per_step = calls_of_steps(pipe, call["w"], call["num_inference_steps"])
    each = sum(per_step) + verifier.calls
    n = max(budget // each, 1)
    total = n * each if n > 1 else sum(per_step)
    drawn, scores, curve, calls = [], [], [], 0
    for first in range(0, n, BATCH):
        rows = [prompt] * min(BATCH, n - first)
        numbers, nothing = (
            torch.arange(first, first + len(rows)),
            torch.full((len(rows),), torch.nan),
        )
        for step, cost in zip(pipe.denoise(rows, seed=seed + first, **call), per_step, strict=True):
            calls += cost * len(rows)
            yield Found(x_0_of(step), nothing, numbers, curve, calls, total)
        if n == 1:
            yield Found(step.x_t, nothing, numbers, [], calls, total, last=True)
            return
        drawn.append(step.x_t)
        for some in judged(pipe, rows, step.x_t, verifier):
            scores += some.tolist()
            curve = [((i + 1) * each, max(scores[: i + 1])) for i in range(len(scores))]
            calls += verifier.calls * len(some)
            yield Found(step.x_t, nothing, numbers, curve, calls, total, best=so_far(drawn, scores))
    yield ranked(torch.cat(drawn), torch.tensor(scores), curve, total)


def so_far(drawn: list[Tensor], scores: list[float]) -> tuple[int, Tensor]:
    """The number of the best candidate that has been judged, and the candidate (c, h, w)."""
    number = max(range(len(scores)), key=scores.__getitem__)
    return number, drawn[number // BATCH][number % BATCH]


def path_search(
    pipe, prompt: str, budget: int, verifier: Verifier, seed: int, call: dict
) -> Iterator[Found]:
    """Candidates that are judged on the way by their current x_0 (15), where the better half takes the other half's place."""
    each = calls_of_path(pipe, verifier, call)
    n = budget // each
    if n < 2:
        yield from random_search(pipe, prompt, 0, verifier, seed, call)
        return
    text_to_image.generators(n, seed, None)  # which refuses what is no seed
    nothing = torch.full((n,), torch.nan)
    for x_0, scores, calls in walked(pipe, [prompt], n, verifier, range(seed, seed + n), call):  # noqa: B007
        yield Found(x_0, nothing, torch.arange(n), [], calls, n * each)
    yield ranked(x_0, scores[0], [(n * each, scores.max().item())], n * each)


def calls_of_path(pipe: TextToImagePipeline, verifier: Verifier, call: dict) -> int:
    """The network calls of one candidate of `path_search`: it is judged at each turn and at the end."""
    per_step = calls_of_steps(pipe, call["w"], call["num_inference_steps"])
    return sum(per_step) + (len(turns(len(per_step))) + 1) * verifier.calls


def turns(steps: int) -> set[int]:
    """After which steps, counted from 1, paths are judged on the way."""
    return {steps // 3, 2 * steps // 3} - {0}


def walked(
    pipe: TextToImagePipeline,
    prompts: list[str],
    n: int,
    verifier: Verifier,
    seeds: Sequence[int],
    call: dict,
    batch: int = JUDGED,
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
        if copied and i < steps and torch.allclose(*step.x_t[copied], rtol=0, atol=ALIKE):
            raise InputError(STILL.format(call["eta"]) + f" by {name}")
        copied = None
        x_0 = step.x_t if i == steps else step.x_0_hat
        calls += cost * len(rows)
        yield x_0, None, calls
        if i in turns(steps) or i == steps:
            scores = []
            for some in judged(pipe, rows, x_0, verifier, batch):
                scores.append(some)
                calls += verifier.calls * len(some)
                yield x_0, None, calls
            scores = torch.cat(scores).reshape(-1, n)
            if i < steps:
                kept = scores.argsort(1, descending=True)[:, : (n + 1) // 2]
                chosen = torch.cat([kept, kept], 1)[:, :n] + n * torch.arange(len(prompts))[:, None]
                step.x_t, copied = step.x_t[chosen.flatten().to(step.x_t.device)], [0, (n + 1) // 2]
    yield x_0, scores, calls


METHODS: dict[str, Callable[..., Iterator[Found]]] = {"random": random_search, "paths": path_search}


def judged(
    pipe, prompts: list[str], x_0: Tensor, verifier: Verifier, batch: int = JUDGED
) -> Iterator[Tensor]:
    """The scores of candidates (N, c, h, w), `batch` of them after `batch`; one that is not a number is the worst."""
    for i in range(0, len(x_0), batch):
        yield (
            verifier(pipe, prompts[i : i + batch], x_0[i : i + batch])
            .cpu()
            .nan_to_num(nan=-math.inf)
        )


def ranked(x_0: Tensor, scores: Tensor, curve: list[tuple[int, float]], calls: int) -> Found:
    """Candidates in the order of their scores, the end of a search."""
    order = scores.argsort(descending=True)
    return Found(x_0[order.to(x_0.device)], scores[order], order, curve, calls, calls, last=True)


def x_0_of(step: Step) -> Tensor:
    """The current x_0 of (15), or x_t where the scheduler does not say."""
    return step.x_t if step.x_0_hat is None else step.x_0_hat


# ---- the command line


def parser() -> argparse.ArgumentParser:
    """The command line's arguments."""
    arguments = argparse.ArgumentParser(
        prog="python -m pipeline.search",
        allow_abbrev=False,
        description="Spend network calls on one prompt, keep the best picture.",
    )
    arguments.add_argument(
        "model",
        metavar="RUN_OR_ID",
        help="a run's folder, a saved pipeline's, or a model of the Hub",
    )
    arguments.add_argument("prompt", help='what to draw, such as "a green cat"')
    arguments.add_argument(
        "--budget",
        type=int,
        required=True,
        help="network calls, the verifier's too; one guided picture of 50 steps takes 100",
    )
    arguments.add_argument(
        "--method", default="random", help=f"one of {', '.join(METHODS)} (default: random)"
    )
    arguments.add_argument(
        "--verifier",
        default="likelihood",
        help="likelihood (the model's own, the default), or a CLIP model's folder or Hub id",
    )
    arguments.add_argument(
        "--pairs",
        type=int,
        default=16,
        help="how closely likelihood looks: two calls each, and two more (default: 16)",
    )
    arguments.add_argument(
        "--negative", default="", help="what to keep away from, instead of the empty prompt"
    )
    arguments.add_argument("--w", type=float, help="guidance (default: the model's own)")
    arguments.add_argument(
        "--seed", type=int, default=0, help="candidate i draws its noise from seed + i (default: 0)"
    )
    arguments.add_argument("--steps", type=int, default=50, help="denoising steps (default: 50)")
    arguments.add_argument(
        "--eta",
        type=float,
        help="1 draws new noise at every step, 0 none (default: the scheduler's own)",
    )
    arguments.add_argument(
        "--device", help="cpu, cuda, or mps for a CLIP verifier (default: the fastest there is)"
    )
    arguments.add_argument(
        "-o",
        "--out",
        "--output",
        dest="out",
        type=Path,
        default=Path("best.png"),
        help="the picture's file (default: best.png)",
    )
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Search, print the curve, save the best; 0 is done, 2 bad input, told in one sentence, 130 stopped with the best so far."""
    arguments, best, stopped = parser().parse_args(argv), None, False
    try:
        (output,) = sample.files(arguments.out, 1)
        verifier = (
            Likelihood(arguments.pairs)
            if arguments.verifier == "likelihood"
            else Clip(arguments.verifier)
        )
        double = isinstance(verifier, Likelihood)
        pipe = loading.load(arguments.model).to(loading.pick_device(arguments.device, double))
        stages = searching(
            pipe,
            arguments.prompt,
            arguments.budget,
            verifier,
            arguments.method,
            w=arguments.w,
            negative_prompt=arguments.negative or None,
            steps=arguments.steps,
            eta=arguments.eta,
            seed=arguments.seed,
        )
        with tqdm(unit="call", dynamic_ncols=True) as bar:
            try:
                for found in stages:
                    bar.total, best = found.total, found.best or best
                    bar.update(found.calls - bar.n)
            except KeyboardInterrupt:
                if best is None:
                    raise
                stopped = True
        number, x_0 = best if stopped else (int(found.order[0]), found.x_0)
        image = pipe.image_processor.postprocess(pipe.decode(x_0[None]), output_type="pil")[0]
        alone = (
            arguments.method == "random"
        )  # a path's copies have noise of their own, which no seed draws alone
        settings = sample.png_settings(pipe, arguments.model, arguments) if alone else None
        sample.save(image, output, settings and settings | {"seed": arguments.seed + number})
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for calls, score in found.curve:
        print(f"{calls} network calls: best score {score:.4g}")
    judged = len(found.curve) if alone and found.curve else len(found.candidates)
    print(
        f"{output}: the best of {judged} by {found.calls} network calls"
        + (f"; seed {arguments.seed + number} draws it alone" if alone else "")
    )
    return 130 if stopped else 0


if __name__ == "__main__":
    sys.exit(loading.stoppable(main, "nothing was judged yet, and nothing is written"))
