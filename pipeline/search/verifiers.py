"""Verifiers score the candidates of a search: the model's own likelihood, or a CLIP model."""

from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from pipeline.diffusion.guidance import InputError
from pipeline.diffusion.losses import kl_noise_weight
from pipeline.diffusion.scheduler import DDPMScheduler
from pipeline.diffusion.text_to_image import TextToImagePipeline

CANDIDATE_BATCH = 16
LIKELIHOOD_WEIGHTS = ("bound", "steps", "even")


class Verifier(Protocol):
    """A score of candidates, higher is better, and its network calls for each of them."""

    calls: int

    def __call__(self, pipe: TextToImagePipeline, prompt: str | list[str], x_0: Tensor) -> Tensor:
        """Return scores (N,) of candidates (N, c, h, w) for one prompt, or for one prompt each."""
        ...


class LikelihoodVerifier:
    """The model's log p(x_0 | c) - log p(x_0) in nats, by `pairs` fixed (timestep, noise) pairs.

    It is the difference of two variational bounds: the sum over t = 2 ... T of the weight of (12)
    times |eps - eps(x_t, t, 0)|^2 - |eps - eps(x_t, t, c)|^2, plus the decoder's term, a density.
    The sum is estimated as T - 1 times a mean over one t of each of `pairs` strata. The variance
    is the posterior's own, as with variance_type fixed_small.

    levels: noise levels sqrt(1 - abar_t) to sum over; the decoder's term belongs to a range from 0.
    weight: "bound" is all of that. "steps" omits the decoder's term, whose small variance can
    outweigh the rest. "even" also weighs all t alike, a heuristic and no likelihood.
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
            raise InputError(f"pairs must be at least 1, got {pairs}.")
        if weight not in LIKELIHOOD_WEIGHTS:
            known = ", ".join(LIKELIHOOD_WEIGHTS)
            raise InputError(f"weight must be one of {known}, got {weight!r}.")
        self.pairs = pairs
        self.seed = seed
        self.levels = levels
        self.weight = weight
        self.decoder = weight == "bound" and levels[0] == 0
        self.calls = 2 * (pairs + self.decoder)

    def __call__(self, pipe: TextToImagePipeline, prompt: str | list[str], x_0: Tensor) -> Tensor:
        """Return scores (N,) of candidates (N, c, h, w)."""
        weights = self.plan(pipe.scheduler, x_0.shape[1:])[2]
        return (weights.to(x_0.device) @ self.differences(pipe, prompt, x_0)).to(x_0.dtype)

    def plan(
        self, scheduler: DDPMScheduler, shape: tuple[int, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return timesteps (M,), noises (M, *shape), weights (M,) in float64; the decoder's last.

        A score is the sum of weights * `differences`. InputError if no timestep is in the levels.
        """
        if not hasattr(scheduler, "posterior"):
            raise InputError(
                f"The likelihood needs this project's DDPMScheduler, got "
                f"{type(scheduler).__name__}. Use a CLIP model as the verifier."
            )
        one = torch.zeros(1, dtype=torch.float64)
        # Library time 1 ... T - 1 is the lecture's 2 ... T.
        t = torch.arange(1, len(scheduler))
        level = (1 - scheduler.abar(t, one)).sqrt()
        low, high = self.levels
        # Where abar = 0, x_t says nothing about x_0.
        t = t[(low <= level) & (level <= high) & (level < 1)]
        total = len(t)
        if not total:
            raise InputError(f"No timestep has a noise level from {low:g} to {high:g}.")
        generator = torch.Generator().manual_seed(self.seed)
        jitter = torch.rand(self.pairs, generator=generator)
        strata = (torch.arange(self.pairs) + jitter) / self.pairs
        t = t[(strata * total).long().clamp(max=total - 1)]
        noises = torch.randn(self.pairs, *shape, generator=generator)
        if self.weight == "even":
            return t, noises, torch.full((self.pairs,), 1 / self.pairs, dtype=torch.float64)
        weights = kl_noise_weight(scheduler, t, t - 1, one) * total / self.pairs  # (12)
        if not self.decoder:
            return t, noises, weights
        # The variance of the last step is beta~_2, because beta~_1 = 0.
        variance = scheduler.posterior(one, one, 1, 0)[1]
        # `losses.decoder_nll` as a weight of the error in the noise.
        density = (1 / (2 * variance * scheduler.snr(0, one))).reshape(1)
        t = torch.cat([t, t.new_zeros(1)])
        return t, torch.cat([noises, noises[:1]]), torch.cat([weights, density])

    @torch.no_grad()
    def differences(
        self, pipe: TextToImagePipeline, prompt: str | list[str], x_0: Tensor
    ) -> Tensor:
        """Return |eps - eps(x_t, t, 0)|^2 - |eps - eps(x_t, t, c)|^2, (M, N) in float64."""
        timesteps, noises, _ = self.plan(pipe.scheduler, x_0.shape[1:])
        states: Any = pipe.encode_prompt(prompt, negative_prompt="")
        captions, empty = (of_prompt.expand(len(x_0), -1, -1) for of_prompt in states)
        parts = []
        for start in range(0, len(x_0), CANDIDATE_BATCH):
            rows = slice(start, start + CANDIDATE_BATCH)
            some = x_0[rows]
            gains = [
                conditional_gain(pipe, some, t, eps.to(some), captions[rows], empty[rows])
                for t, eps in zip(timesteps.tolist(), noises, strict=True)
            ]
            parts.append(torch.stack(gains))
        return torch.cat(parts, 1)


def conditional_gain(
    pipe: TextToImagePipeline, x_0: Tensor, t: int, eps: Tensor, captions: Tensor, empty: Tensor
) -> Tensor:
    """Return |eps - eps(x_t, t, 0)|^2 - |eps - eps(x_t, t, c)|^2 for one noise (c, h, w): (N,)."""
    scheduler = pipe.scheduler
    dtype = pipe.unet.dtype
    x_t = scheduler.add_noise(x_0, eps.expand_as(x_0), t).repeat(2, 1, 1, 1)
    states = torch.cat([empty, captions]).to(dtype)
    out = pipe.unet(x_t.to(dtype), t, encoder_hidden_states=states, return_dict=False)[0].to(x_t)
    eps_hat = scheduler.predict_eps(scheduler.clip(scheduler.predict_x_0(out, t, x_t)), x_t, t)
    errors = (eps - eps_hat).square().flatten(1).double()
    return (errors[: len(x_0)] - errors[len(x_0) :]).sum(1)


class ClipVerifier:
    """The cosine between an image and its prompt by a CLIP model, given by folder or Hub id.

    It never calls the diffusion network, so a budget does not count CLIP's own time. InputError
    if there is no such model.
    """

    calls = 0

    def __init__(self, model: str | Path):
        try:
            kind = AutoConfig.from_pretrained(model, trust_remote_code=False).model_type
            if kind == "clip":
                self.model: Any = CLIPModel.from_pretrained(model, use_safetensors=True).eval()
                self.tokenizer = CLIPTokenizer.from_pretrained(model)
                # The default processor needs torchvision.
                self.processor = CLIPImageProcessorPil.from_pretrained(model)
        except (OSError, ValueError, SafetensorError) as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise InputError(
                f"Cannot load {model} as a CLIP model ({reason}). Pass a folder or Hub id with "
                "safetensors, such as openai/clip-vit-large-patch14."
            ) from error
        if kind != "clip":
            raise InputError(
                f"{model} is a model of type {kind!r}, not clip. Pass "
                "openai/clip-vit-large-patch14."
            )

    def __call__(self, pipe: TextToImagePipeline, prompt: str | list[str], x_0: Tensor) -> Tensor:
        """Return scores (N,) of candidates (N, c, h, w)."""
        self.model.to(x_0.device)
        scores = []
        for start in range(0, len(x_0), CANDIDATE_BATCH):
            rows = slice(start, start + CANDIDATE_BATCH)
            images: Any = pipe.image_processor.postprocess(
                pipe.decode(x_0[rows]), output_type="pil"
            )
            texts = [prompt] if isinstance(prompt, str) else prompt[rows]
            scores.append(self.cosines(images, texts))
        return torch.cat(scores)

    @torch.no_grad()
    def cosines(self, images: list, texts: list[str]) -> Tensor:
        """Return the cosines (N,) of N images (PIL or uint8 (H, W, 3)) with a text each, or one."""
        device = self.model.device
        length = self.model.config.text_config.max_position_embeddings
        padding = {"padding": True, "truncation": True, "max_length": length}
        tokens = self.tokenizer(texts, return_tensors="pt", **padding).to(device)
        pixels = self.processor(images=images, return_tensors="pt").pixel_values.to(device)
        of_images = self.model.get_image_features(pixel_values=pixels).pooler_output
        of_texts = self.model.get_text_features(**tokens).pooler_output
        return F.cosine_similarity(of_images, of_texts)


def clip_scores(clip: ClipVerifier, images: Tensor, captions: list[str], batch: int = 32) -> Tensor:
    """Return 100 max(cos(image, caption), 0) of uint8 images (N, 3, H, W): (N,).

    The scale is torchmetrics'; Hessel et al. 2021 use 2.5 instead of 100.
    """
    arrays = [image.permute(1, 2, 0).numpy() for image in images]
    scores = []
    for start in range(0, len(arrays), batch):
        rows = slice(start, start + batch)
        scores.append(100 * clip.cosines(arrays[rows], captions[rows]).clamp(min=0))
    return torch.cat(scores)
