"""What judges the candidates of a search: the model's own likelihood, a CLIP model, or anything else with a score."""

from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from pipeline.diffusion.guidance import InputError
from pipeline.diffusion.losses import kl_noise_weight
from pipeline.diffusion.scheduler import DDPMScheduler
from pipeline.diffusion.text_to_image import TextToImagePipeline

CANDIDATE_BATCH = 16  # pictures that are drawn or judged at once
LIKELIHOOD_WEIGHTS = ("bound", "steps", "even")


class Verifier(Protocol):
    """What judges candidates: `calls` of the diffusion network for each, and a score for each, higher is better."""

    calls: int

    def __call__(self, pipe: TextToImagePipeline, prompt: str | list[str], x_0: Tensor) -> Tensor:
        """Scores (N,) of what the network might have drawn (N, c, h, w) for a prompt, or for one prompt each."""


class LikelihoodVerifier:
    """log p(x_0 | c) - log p(x_0) by the model itself, as far as `pairs` fixed pairs of a timestep and noise tell.

    The difference of the two variational bounds: the sum over t = 2 ... T of the weight of (12) times
    |eps - eps(x_t, t, 0)|^2 - |eps - eps(x_t, t, c)|^2, estimated as T - 1 times a mean over one t of each of `pairs` strata,
    and the decoder's term, a density. All candidates are judged by the same pairs. Nats. The variance is the posterior's own,
    as with variance_type fixed_small.

    levels: the noise levels sqrt(1 - abar_t) whose part of the sum this is; the decoder's belongs to those that begin at 0.
    weight: "bound" is all of that; "steps" leaves the decoder's term out, whose variance is so small that it may outweigh the
    rest; "even" weighs all errors in the noise alike besides, a heuristic and no likelihood.
    """

    def __init__(
        self,
        pairs: int = 16,
        seed: int = 0,
        *,
        levels: tuple[float, float] = (0.0, 1.0),
        weight: str = "bound",
    ):
        if pairs < 1:
            raise InputError(f"pairs is {pairs}, expected 1 or more: pass 16")
        if weight not in LIKELIHOOD_WEIGHTS:
            raise InputError(
                f"weight is {weight!r}, expected one of {', '.join(LIKELIHOOD_WEIGHTS)}: bound is the likelihood's"
            )
        self.pairs, self.seed, self.levels, self.weight = pairs, seed, levels, weight
        self.decoder = weight == "bound" and levels[0] == 0
        self.calls = 2 * (pairs + self.decoder)

    def __call__(self, pipe: TextToImagePipeline, prompt: str | list[str], x_0: Tensor) -> Tensor:
        *_, weights = self.plan(pipe.scheduler, x_0.shape[1:])
        return (weights.to(x_0.device) @ self.differences(pipe, prompt, x_0)).to(x_0.dtype)

    def plan(
        self, scheduler: DDPMScheduler, shape: tuple[int, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The pairs, the decoder's last: timesteps (M,), noises (M, *shape), weights (M,) in float64.

        A score is the weights' sum over `differences`. InputError where no timestep is of the noise levels.
        """
        if not hasattr(scheduler, "posterior"):
            raise InputError(
                f"the scheduler is {type(scheduler).__name__}, expected pipeline.scheduler's, whose bound is known: "
                "judge by a CLIP model"
            )
        one = torch.zeros(1, dtype=torch.float64)
        t = torch.arange(1, len(scheduler))  # library time 1 ... T - 1 is the lecture's 2 ... T
        level, (low, high) = (1 - scheduler.abar(t, one)).sqrt(), self.levels
        t = t[
            (low <= level) & (level <= high) & (level < 1)
        ]  # where abar = 0 no error in the noise tells of x_0
        if not len(t):
            raise InputError(
                f"levels are {low:g} to {high:g}, expected a range with a timestep's in it: pass 0 to 1"
            )
        generator, total = torch.Generator().manual_seed(self.seed), len(t)
        shares = (
            torch.arange(self.pairs) + torch.rand(self.pairs, generator=generator)
        ) / self.pairs
        t = t[(shares * total).long().clamp(max=total - 1)]
        noises = torch.randn(self.pairs, *shape, generator=generator)
        if self.weight == "even":
            return t, noises, torch.full((self.pairs,), 1 / self.pairs, dtype=torch.float64)
        weights = kl_noise_weight(scheduler, t, t - 1, one) * total / self.pairs  # (12)
        if not self.decoder:
            return t, noises, weights
        variance = scheduler.posterior(one, one, 1, 0)[1]  # beta~_2, since beta~_1 = 0
        density = (1 / (2 * variance * scheduler.snr(0, one))).reshape(
            1
        )  # `losses.decoder`'s, of the error in the noise
        return (
            torch.cat([t, t.new_zeros(1)]),
            torch.cat([noises, noises[:1]]),
            torch.cat([weights, density]),
        )

    @torch.no_grad()
    def differences(
        self, pipe: TextToImagePipeline, prompt: str | list[str], x_0: Tensor
    ) -> Tensor:
        """|eps - eps(x_t, t, 0)|^2 - |eps - eps(x_t, t, c)|^2 of each pair for each candidate, (M, N) in float64."""
        timesteps, noises, _ = self.plan(pipe.scheduler, x_0.shape[1:])
        captions, empty = (
            states.expand(len(x_0), -1, -1)
            for states in pipe.encode_prompt(prompt, negative_prompt="")
        )
        parts = zip(*(x.split(CANDIDATE_BATCH) for x in (x_0, captions, empty)), strict=True)
        return torch.cat(
            [
                torch.stack(
                    [
                        conditional_gain(pipe, part, t, eps.to(part), *states)
                        for t, eps in zip(timesteps.tolist(), noises, strict=True)
                    ]
                )
                for part, *states in parts
            ],
            1,
        )


def conditional_gain(
    pipe: TextToImagePipeline, x_0: Tensor, t: int, eps: Tensor, captions: Tensor, empty: Tensor
) -> Tensor:
    """|eps - eps(x_t, t, 0)|^2 - |eps - eps(x_t, t, c)|^2 of candidates (N, c, h, w) under one noise (c, h, w), (N,)."""
    scheduler, dtype = pipe.scheduler, pipe.unet.dtype
    x_t = scheduler.add_noise(x_0, eps.expand_as(x_0), t).repeat(2, 1, 1, 1)
    states = torch.cat([empty, captions]).to(dtype)
    out = pipe.unet(x_t.to(dtype), t, encoder_hidden_states=states, return_dict=False)[0].to(x_t)
    eps_hat = scheduler.predict_eps(scheduler.clip(scheduler.predict_x_0(out, t, x_t)), x_t, t)
    errors = (eps - eps_hat).square().flatten(1).double()
    return (errors[: len(x_0)] - errors[len(x_0) :]).sum(1)


class ClipVerifier:
    """The cosine between a picture and its prompt by a CLIP model, named by its folder or its Hub id.

    It never asks the diffusion network, so its `calls` are 0: a budget does not count CLIP's own time. InputError where there
    is no such model.
    """

    calls = 0

    def __init__(self, model: str | Path):
        try:
            if (
                kind := AutoConfig.from_pretrained(model, trust_remote_code=False).model_type
            ) != "clip":
                raise InputError(
                    f"{model} is a model of type {kind!r}, expected clip: pass openai/clip-vit-large-patch14"
                )
            self.model = CLIPModel.from_pretrained(model, use_safetensors=True).eval()
            self.tokenizer = CLIPTokenizer.from_pretrained(model)
            self.processor = CLIPImageProcessorPil.from_pretrained(
                model
            )  # the other one wants torchvision
        except InputError:
            raise
        except (OSError, ValueError, SafetensorError) as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise InputError(
                f"{model} is no CLIP model: it cannot be loaded ({reason}), expected a CLIP model's folder or Hub "
                "id with safetensors: pass openai/clip-vit-large-patch14"
            ) from error

    def __call__(self, pipe: TextToImagePipeline, prompt: str | list[str], x_0: Tensor) -> Tensor:
        self.model.to(x_0.device)
        draw = lambda part: pipe.image_processor.postprocess(pipe.decode(part), output_type="pil")
        texts = lambda i: [prompt] if isinstance(prompt, str) else prompt[i : i + CANDIDATE_BATCH]
        return torch.cat(
            [
                self.cosines(draw(x_0[i : i + CANDIDATE_BATCH]), texts(i))
                for i in range(0, len(x_0), CANDIDATE_BATCH)
            ]
        )

    @torch.no_grad()
    def cosines(self, pictures: list, texts: list[str]) -> Tensor:
        """The cosines (N,) of N pictures (PIL, or uint8 (H, W, 3)) with a text each, or with one text."""
        device, length = self.model.device, self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            texts, padding=True, truncation=True, max_length=length, return_tensors="pt"
        ).to(device)
        pixels = self.processor(images=pictures, return_tensors="pt").pixel_values.to(device)
        seen, said = (
            self.model.get_image_features(pixel_values=pixels),
            self.model.get_text_features(**tokens),
        )
        return F.cosine_similarity(seen.pooler_output, said.pooler_output)


def clip_scores(clip: ClipVerifier, images: Tensor, captions: list[str], batch: int = 32) -> Tensor:
    """100 max(cos(image, caption), 0) by a CLIP model, of uint8 images (N, 3, H, W), (N,).

    As torchmetrics scales it; Hessel et al. 2021 have 2.5 in the place of 100.
    """
    pictures = [image.permute(1, 2, 0).numpy() for image in images]
    parts = [slice(i, i + batch) for i in range(0, len(pictures), batch)]
    return torch.cat(
        [100 * clip.cosines(pictures[part], captions[part]).clamp(min=0) for part in parts]
    )
