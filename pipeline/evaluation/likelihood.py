"""The variational bound in bits/dim, and denoising errors by timestep."""

import io

import torch
from PIL import Image
from torch import Tensor

from pipeline.data.image_ops import as_float
from pipeline.diffusion.losses import bits_per_dimension, decoder_nll, posterior_kl, prior_kl
from pipeline.diffusion.patches import PatchAutoencoder
from pipeline.diffusion.scheduler import DDPMScheduler

LOSSLESS_FORMATS = {
    "png": {"format": "PNG", "optimize": True},
    "webp": {"format": "WEBP", "lossless": True, "quality": 100, "method": 6},
}


# ---- what the network knows of pictures


def _predict(pipe, x_t: Tensor, t: int | Tensor, states: Tensor) -> Tensor:
    """The network's prediction at x_t (B, c, h, w) for caption states (B, L, D), without guidance, float64."""
    inputs = x_t.to(pipe.unet.dtype), t
    return pipe.unet(*inputs, encoder_hidden_states=states.to(pipe.unet.dtype), return_dict=False)[
        0
    ].double()


def _encode_batch(pipe, images: Tensor, captions: list[str]) -> tuple[Tensor, Tensor]:
    """(x_0 (B, c, h, w) in float64, caption states (B, L, D)) of captioned images."""
    states = pipe.encode_prompt(list(captions), do_classifier_free_guidance=False)[0]
    return pipe.encode(as_float(images).to(pipe.device)).double(), states


def model_space(pipe) -> str:
    """Where the network works: "pixels", "patches" (a permutation of pixels) or "latents"."""
    if pipe.vae is None:
        return "pixels"
    config = pipe.vae.config
    plain = (
        isinstance(pipe.vae, PatchAutoencoder)
        and config.scaling_factor == 1
        and not config.shift_factor
    )
    return "patches" if plain else "latents"


@torch.no_grad()
def denoising_errors(
    pipe, splits: dict[str, tuple[Tensor, list[str]]], grid: int = 10, seed: int = 0
) -> dict:
    """Mean squared errors of eps and of the unclipped x_0 (15) at `grid` timesteps, of each split's (images, captions).

    One network call a timestep judges all splits at once. One noise an image, the same at every timestep.
    """
    scheduler, T = pipe.scheduler, len(pipe.scheduler)
    seen = [_encode_batch(pipe, images, captions) for images, captions in splits.values()]
    x_0, states = (torch.cat(part) for part in zip(*seen, strict=True))
    eps = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(seed), dtype=x_0.dtype).to(
        x_0.device
    )
    plan = ((torch.arange(grid) + 0.5) * T / grid).long().unique().tolist()
    found = {"timesteps": plan} | {name: {"eps": [], "x_0": []} for name in splits}
    for t in plan:
        x_t = scheduler.add_noise(x_0, eps, t)
        x_0_hat = scheduler.predict_x_0(_predict(pipe, x_t, t, states), t, x_t)
        for kind, error in (
            ("eps", scheduler.predict_eps(x_0_hat, x_t, t) - eps),
            ("x_0", x_0_hat - x_0),
        ):
            parts = error.square().flatten(1).mean(1).split([len(part) for part, _ in seen])
            for name, part in zip(splits, parts, strict=True):
                found[name][kind].append(part.mean().item())
    return found


def timestep_importance(scheduler: DDPMScheduler) -> Tensor:
    """How often the bound asks library time t = 1 ... T - 1, (T - 1,), sums to 1: as log((1 - abar_t) / (1 - abar_{t-1})).

    To first order that is the divergence at t for data of unit variance and a perfect network. At even odds the few divergences
    next to the image, which are most of the sum, would be met by few images.
    """
    abar = scheduler.abar(torch.arange(len(scheduler)), torch.zeros(1, dtype=torch.float64))
    gain = ((1 - abar[1:]) / (1 - abar[:-1])).log()
    return gain / gain.sum()


@torch.no_grad()
def likelihood_bound(
    pipe,
    images: Tensor,
    captions: list[str],
    strata: int = 32,
    seed: int = 0,
    batch: int = 32,
    levels: int | None = 256,
) -> dict[str, Tensor]:
    """The bound's terms on -log2 p(image | caption) in bits a colour value: prior, steps and decoder, each (N,).

    Of the T - 1 divergences (11) every image is asked one in each of `strata` parts of the chain, at a timestep of its own,
    drawn as often as `importance` says; the mean of divergence / importance estimates their sum without bias. ValueError for
    latents, whose bits are not the image's.
    """
    scheduler, T, generator = (
        pipe.scheduler,
        len(pipe.scheduler),
        torch.Generator().manual_seed(seed),
    )
    share = timestep_importance(scheduler)
    u = (
        torch.arange(strata) + torch.rand(len(images), strata, generator=generator)
    ).double() / strata
    plan, parts = 1 + torch.searchsorted(share.cumsum(0), u).clamp(max=T - 2), []
    for start in range(0, len(images), batch):
        rows = slice(start, start + batch)
        x_0, states = _encode_batch(pipe, images[rows], captions[rows])

        def predicted(t: int | Tensor) -> tuple[Tensor, Tensor]:
            """(x_t, clipped x_0 by the network) for one fresh noise."""
            x_t = scheduler.add_noise(
                x_0, torch.randn(x_0.shape, generator=generator, dtype=x_0.dtype).to(x_0.device), t
            )
            return x_t, scheduler.clip(
                scheduler.predict_x_0(_predict(pipe, x_t, t, states), t, x_t)
            )

        steps = []
        for t in plan[rows].T.to(x_0.device):
            x_t, x_0_hat = predicted(t)
            steps.append(
                posterior_kl(scheduler, x_0, x_0_hat, x_t, t, t - 1) / share.to(t.device)[t - 1]
            )
        variance = scheduler.posterior(x_0, x_0, 1, 0)[1]  # beta~_2, since beta~_1 = 0
        nats = {
            "prior": prior_kl(scheduler, x_0, T - 1),
            "steps": torch.stack(steps).mean(0),
            "decoder": decoder_nll(x_0, predicted(0)[1], variance, levels),
        }
        bits = lambda value, x_0=x_0: bits_per_dimension(
            value, x_0[0].numel(), model_space(pipe)
        ).cpu()
        parts.append({name: bits(value) for name, value in nats.items()})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def file_bits(images: Tensor) -> dict[str, Tensor]:
    """Bits a colour value that lossless files of uint8 images (N, 3, H, W) take, headers and all: (N,) by format."""

    def size(image: Tensor, options: dict) -> int:
        buffer = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(buffer, **options)
        return 8 * buffer.getbuffer().nbytes

    return {
        name: torch.tensor([size(image, options) / image.numel() for image in images])
        for name, options in LOSSLESS_FORMATS.items()
    }
