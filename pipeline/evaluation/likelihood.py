"""The variational bound in bits/dim, and denoising errors by timestep."""

import io

import torch
from PIL import Image
from torch import Tensor

from pipeline.data.image_ops import as_float
from pipeline.diffusion.losses import bits_per_dimension, decoder_nll, posterior_kl, prior_kl
from pipeline.diffusion.patches import PatchAutoencoder
from pipeline.diffusion.scheduler import DDPMScheduler
from pipeline.diffusion.text_to_image import TextToImagePipeline
from pipeline.runs.results import DenoisingErrors

LOSSLESS_FORMATS = {
    "png": {"format": "PNG", "optimize": True},
    "webp": {"format": "WEBP", "lossless": True, "quality": 100, "method": 6},
}


def _predict(pipe: TextToImagePipeline, x_t: Tensor, t: int | Tensor, states: Tensor) -> Tensor:
    """Return the unguided prediction at x_t (B, c, h, w) for caption states (B, L, D), float64."""
    dtype = pipe.unet.dtype
    call = {"encoder_hidden_states": states.to(dtype), "return_dict": False}
    return pipe.unet(x_t.to(dtype), t, **call)[0].double()


def _encode_batch(
    pipe: TextToImagePipeline, images: Tensor, captions: list[str]
) -> tuple[Tensor, Tensor]:
    """Return x_0 (B, c, h, w) in float64 and caption states (B, L, D) of captioned images."""
    states = pipe.encode_prompt(list(captions), do_classifier_free_guidance=False)[0]
    return pipe.encode(as_float(images).to(pipe.device)).double(), states


def _randn_like(x: Tensor, generator: torch.Generator) -> Tensor:
    """Return noise in the shape of x by a generator of the CPU."""
    return torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)


def model_space(pipe: TextToImagePipeline) -> str:
    """Return the network's space: "pixels", "patches" (a permutation of pixels) or "latents"."""
    if pipe.vae is None:
        return "pixels"
    config = pipe.vae.config
    unscaled = config.scaling_factor == 1 and not config.shift_factor
    return "patches" if isinstance(pipe.vae, PatchAutoencoder) and unscaled else "latents"


@torch.no_grad()
def denoising_errors(
    pipe: TextToImagePipeline,
    splits: dict[str, tuple[Tensor, list[str]]],
    grid: int = 10,
    seed: int = 0,
) -> DenoisingErrors:
    """Return mean squared errors of eps and of the unclipped x_0 (15) at `grid` timesteps.

    Every image has one noise, the same at all timesteps. One network call a timestep serves all
    splits.

    splits: (images, captions) by name, "train" and maybe "held_out".
    """
    scheduler = pipe.scheduler
    T = len(scheduler)
    encoded = [_encode_batch(pipe, images, captions) for images, captions in splits.values()]
    sizes = [len(x_0) for x_0, _ in encoded]
    x_0 = torch.cat([x_0 for x_0, _ in encoded])
    states = torch.cat([states for _, states in encoded])
    eps = _randn_like(x_0, torch.Generator().manual_seed(seed))
    timesteps = ((torch.arange(grid) + 0.5) * T / grid).long().unique().tolist()
    curves = {name: {"eps": [], "x_0": []} for name in splits}
    for t in timesteps:
        x_t = scheduler.add_noise(x_0, eps, t)
        x_0_hat = scheduler.predict_x_0(_predict(pipe, x_t, t, states), t, x_t)
        eps_hat = scheduler.predict_eps(x_0_hat, x_t, t)
        for kind, error in (("eps", eps_hat - eps), ("x_0", x_0_hat - x_0)):
            parts = error.square().flatten(1).mean(1).split(sizes)
            for curve, part in zip(curves.values(), parts, strict=True):
                curve[kind].append(part.mean().item())
    return DenoisingErrors(timesteps, **curves)


def timestep_importance(scheduler: DDPMScheduler) -> Tensor:
    """Return how often the bound samples library time t = 1 ... T - 1: (T - 1,), sums to 1.

    The odds are log((1 - abar_t) / (1 - abar_{t-1})): to first order the divergence at t for data
    of unit variance and a perfect network. Under even odds, few images would meet the few
    divergences near t = 0 that make up most of the sum.
    """
    abar = scheduler.abar(torch.arange(len(scheduler)), torch.zeros(1, dtype=torch.float64))
    gain = ((1 - abar[1:]) / (1 - abar[:-1])).log()
    return gain / gain.sum()


@torch.no_grad()
def likelihood_bound(
    pipe: TextToImagePipeline,
    images: Tensor,
    captions: list[str],
    strata: int = 32,
    seed: int = 0,
    batch: int = 32,
    levels: int | None = 256,
) -> dict[str, Tensor]:
    """Return the bound's terms on -log2 p(image | caption) in bits/dim: {term: (N,)}.

    The terms are "prior", "steps" and "decoder". Of the T - 1 divergences (11), each image has
    one evaluated in each of `strata` parts of the chain, at a timestep of its own sampled by
    `timestep_importance`. The mean of divergence / importance is an unbiased estimate of their
    sum. ValueError for latents, whose bits are not the image's.
    """
    scheduler = pipe.scheduler
    T = len(scheduler)
    generator = torch.Generator().manual_seed(seed)
    importance = timestep_importance(scheduler)
    jitter = torch.rand(len(images), strata, generator=generator)
    u = (torch.arange(strata) + jitter).double() / strata
    timesteps = 1 + torch.searchsorted(importance.cumsum(0), u).clamp(max=T - 2)
    space = model_space(pipe)
    parts = []
    for start in range(0, len(images), batch):
        rows = slice(start, start + batch)
        x_0, states = _encode_batch(pipe, images[rows], captions[rows])

        def denoise(t: int | Tensor, x_0: Tensor = x_0, states: Tensor = states) -> tuple:
            """Return x_t and the clipped prediction of x_0 for one fresh noise."""
            x_t = scheduler.add_noise(x_0, _randn_like(x_0, generator), t)
            x_0_hat = scheduler.predict_x_0(_predict(pipe, x_t, t, states), t, x_t)
            return x_t, scheduler.clip(x_0_hat)

        steps = []
        for t in timesteps[rows].T.to(x_0.device):
            x_t, x_0_hat = denoise(t)
            divergence = posterior_kl(scheduler, x_0, x_0_hat, x_t, t, t - 1)
            steps.append(divergence / importance.to(t.device)[t - 1])
        # The variance of the last step is beta~_2, because beta~_1 = 0.
        variance = scheduler.posterior(x_0, x_0, 1, 0)[1]
        _, x_0_hat = denoise(0)
        nats = {
            "prior": prior_kl(scheduler, x_0, T - 1),
            "steps": torch.stack(steps).mean(0),
            "decoder": decoder_nll(x_0, x_0_hat, variance, levels),
        }
        size = x_0[0].numel()
        parts.append({key: bits_per_dimension(term, size, space) for key, term in nats.items()})
    return {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}


def file_bits(images: Tensor) -> dict[str, Tensor]:
    """Return bits/dim of lossless files of uint8 images (N, 3, H, W), headers included: (N,)."""

    def bits(image: Tensor, options: dict) -> float:
        buffer = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(buffer, **options)
        return 8 * buffer.getbuffer().nbytes / image.numel()

    return {
        name: torch.tensor([bits(image, options) for image in images])
        for name, options in LOSSLESS_FORMATS.items()
    }
