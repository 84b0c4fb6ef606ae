"""More compute at inference for better outputs (18): spend a budget of network calls on one prompt and return the best picture.

A call is one picture through the network once: a guided step is two, and what a verifier asks the network counts as well.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pipeline import losses
from pipeline.guidance import InputError, weights
from pipeline.text_to_image import TextToImagePipeline, noise_level

BATCH = 16  # pictures that are drawn or judged at once


class Verifier(Protocol):
    """What judges candidates: `calls` of the network for each, and a score for each, higher is better."""

    calls: int

    def __call__(self, pipe: TextToImagePipeline, prompt: str, x_0: Tensor) -> Tensor:
        """Scores (N,) of what the network might have drawn for a prompt, (N, c, h, w)."""


@dataclass(frozen=True)
class Found:
    """The best candidate of a search, and what it came from."""

    x_0: Tensor  # (c, h, w), as the network draws it: `pipe.decode(x_0[None])` is the picture
    candidates: Tensor  # (N, c, h, w), best first
    scores: Tensor  # (N,), of the candidates
    curve: list[tuple[int, float]]  # (network calls so far, best score so far); no score where one candidate was all
    calls: int


class Likelihood:
    """log p(x_0 | c) - log p(x_0) by the model itself, as far as `pairs` fixed pairs of a timestep and noise tell.

    The difference of the two variational bounds: the sum over t = 2 ... T of the weight of (12) times
    |eps - eps(x_t, t, 0)|^2 - |eps - eps(x_t, t, c)|^2, estimated as T - 1 times a mean over one t of each of `pairs` strata,
    and the decoder's term, a density. All candidates are judged by the same pairs. Nats.
    """

    def __init__(self, pairs: int = 16, seed: int = 0):
        if pairs < 1:
            raise InputError(f"pairs is {pairs}, expected 1 or more: pass 16")
        self.pairs, self.seed, self.calls = pairs, seed, 2 * (pairs + 1)

    @torch.no_grad()
    def __call__(self, pipe: TextToImagePipeline, prompt: str, x_0: Tensor) -> Tensor:
        scheduler, generator = pipe.scheduler, torch.Generator().manual_seed(self.seed)
        T = scheduler.config.num_train_timesteps
        captions, empty = pipe.encode_prompt(prompt, negative_prompt="")
        shares = (torch.arange(self.pairs) + torch.rand(self.pairs, generator=generator)) / self.pairs
        plan = (1 + (shares * (T - 1)).long()).tolist()  # library time 1 ... T - 1 is the lecture's 2 ... T
        noises = torch.randn(self.pairs, *x_0.shape[1:], generator=generator).to(x_0)

        def errors(t: int, eps: Tensor, weight: Callable) -> Tensor:
            """weight of the caption's prediction less that of the empty one's, (N,), negated."""
            x_t = scheduler.add_noise(x_0, eps.expand_as(x_0), t)
            both = [weight(t, x_t, scheduler.clip(scheduler.predict_x_0(self._ask(pipe, x_t, t, states), t, x_t)))
                    for states in (empty, captions)]  # fmt: skip
            return both[0] - both[1]

        def term(t: int, x_t: Tensor, x_0_hat: Tensor) -> Tensor:
            eps, eps_hat = (scheduler.predict_eps(x, x_t, t) for x in (x_0, x_0_hat))
            return losses.kl_in_noise(scheduler, eps, eps_hat, t, t - 1)  # (12)

        def decoder(t: int, x_t: Tensor, x_0_hat: Tensor) -> Tensor:
            variance = scheduler.posterior(x_0, x_0, 1, 0)[1]  # beta~_2, since beta~_1 = 0
            return losses.decoder(x_0, x_0_hat, variance, levels=None)

        terms = [errors(t, eps, term) for t, eps in zip(plan, noises, strict=True)]
        return (T - 1) * torch.stack(terms).mean(0) + errors(0, noises[0], decoder)

    @staticmethod
    def _ask(pipe: TextToImagePipeline, x_t: Tensor, t: int, states: Tensor) -> Tensor:
        """The network's prediction for all candidates (N, c, h, w), in parts of BATCH."""
        answers = [pipe.unet(part.to(pipe.unet.dtype), t, encoder_hidden_states=states[:1].expand(len(part), -1, -1),
                             return_dict=False)[0] for part in x_t.split(BATCH)]  # fmt: skip
        return torch.cat(answers).to(x_t)


def calls_of_sample(pipe: TextToImagePipeline, w, steps: int) -> int:
    """The network calls of one picture: two where guided, one where w is 0 or -1."""
    scheduler = pipe._own_scheduler(steps, None, pipe.device)
    found = [weights(w, 1, noise_level(scheduler, t) if callable(w) else None) for t in scheduler.timesteps]
    return sum(int((w_t != -1).any()) + int((w_t != 0).any()) for w_t in found)


def search(pipe: TextToImagePipeline, prompt: str, budget: int, verifier: Verifier, method: str = "random", *, w=None,
           steps: int = 50, eta: float | None = None, seed: int = 0) -> Found:  # fmt: skip
    """The best picture of a prompt that `budget` network calls find.

    method: "random" draws as many candidates as the budget judges, candidate i from seed + i, and keeps the best; "paths" lets
    candidates share the budget, and twice on the way puts copies of the better half in the other half's place, which new
    noise then drives apart (eta > 0). The budget of one sample draws it as `pipe(prompt, seed=seed)` does, bit for bit, and
    judges nothing. InputError for a budget below that, and for an unknown method.
    """
    if method not in METHODS:
        raise InputError(f"method is {method!r}, expected one of {', '.join(METHODS)}: random is the plain one")
    w = pipe.config.w if w is None else w
    one = calls_of_sample(pipe, w, steps)
    if budget < one:
        raise InputError(f"the budget is {budget} network calls, expected {one} or more: one picture of {steps} steps takes that")
    call = {"w": w, "num_inference_steps": steps, "eta": eta}
    return METHODS[method](pipe, prompt, budget, verifier, one, seed, call)


def drawn(pipe: TextToImagePipeline, prompt: str, seeds: range, call: dict) -> Tensor:
    """Candidates (N, c, h, w), undecoded, one of each seed."""
    parts = [pipe([prompt] * len(some), seed=some[0], output_type="latent", **call).images
             for some in (seeds[i : i + BATCH] for i in range(0, len(seeds), BATCH))]  # fmt: skip
    return torch.cat(parts)


def random_search(pipe, prompt: str, budget: int, verifier: Verifier, one: int, seed: int, call: dict) -> Found:
    """Independent candidates, the best of them."""
    each = one + verifier.calls
    n = max(budget // each, 1)
    if n == 1:
        x_0 = drawn(pipe, prompt, range(seed, seed + 1), call)
        return Found(x_0[0], x_0, torch.full((1,), torch.nan), [], one)
    x_0 = drawn(pipe, prompt, range(seed, seed + n), call)
    scores = verifier(pipe, prompt, x_0)
    best = scores.cummax(0).values.tolist()
    return ranked(x_0, scores, [((i + 1) * each, score) for i, score in enumerate(best)], n * each)


def path_search(pipe, prompt: str, budget: int, verifier: Verifier, one: int, seed: int, call: dict) -> Found:
    """Candidates that are judged on the way by their current x_0 (15), where the better half takes the other half's place."""
    if call["eta"] == 0:
        raise InputError("eta is 0, expected more for method paths: without new noise its copies would stay the same")
    each = one + 3 * verifier.calls  # twice on the way and at the end
    n = budget // each
    if n < 2:
        return random_search(pipe, prompt, one, verifier, one, seed, call)
    generators = [torch.Generator().manual_seed(seed + i) for i in range(n)]
    steps = pipe.denoise([prompt] * n, generator=generators, **call)
    turns = {pipe.num_timesteps // 3, 2 * pipe.num_timesteps // 3}
    for i, step in enumerate(steps, 1):
        if i in turns:
            order = verifier(pipe, prompt, step.x_0_hat).argsort(descending=True)
            kept = order[: (n + 1) // 2]
            step.x_t = step.x_t[torch.cat([kept, kept])[:n]]
    scores = verifier(pipe, prompt, step.x_t)
    return ranked(step.x_t, scores, [(n * each, scores.max().item())], n * each)


METHODS: dict[str, Callable[..., Found]] = {"random": random_search, "paths": path_search}


def ranked(x_0: Tensor, scores: Tensor, curve: list[tuple[int, float]], calls: int) -> Found:
    """Candidates in the order of their scores."""
    order = scores.argsort(descending=True)
    return Found(x_0[order[0]], x_0[order], scores[order], curve, calls)
