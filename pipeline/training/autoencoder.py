"""Train the small autoencoder: from images to latents, and back to the same images."""

import math
import time
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from pipeline import randomness
from pipeline.config import AutoencoderConfig
from pipeline.data.dataset import CaptionedImages
from pipeline.data.image_ops import as_float, as_uint8
from pipeline.data.sampler import batch_indices, evenly_spaced
from pipeline.diffusion.autoencoder import ConvAutoencoder
from pipeline.runs.state_files import load_state, save_state
from pipeline.training.optimizers import (
    build_lr_schedule,
    build_optimizer,
    restore_optimizer,
    resume_lr_schedule,
)

# Of a split, for a PSNR during training.
MEASURED_IMAGES = 512
MEASURED_BATCH = 32


class StepResult(NamedTuple):
    """The outcome of a training step."""

    loss: float
    grad_norm: float  # before clipping
    lr: float

    @property
    def is_finite(self) -> bool:
        """Whether the gradient was finite, so that the step was taken."""
        return math.isfinite(self.grad_norm)


def reconstruction_loss(restored: Tensor, x: Tensor, edges: float) -> Tensor:
    """Return the mean absolute error of images (B, 3, H, W), plus that of their differences.

    edges: the weight of the differences between neighbouring pixels, which keep lines sharp.
    """
    error = restored - x
    horizontal = error.diff(dim=3).abs().mean()
    vertical = error.diff(dim=2).abs().mean()
    return error.abs().mean() + edges * (horizontal + vertical)


def psnr(restored: Tensor, x: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio of 8-bit images, (B,) in dB.

    restored, x: (B, 3, H, W) in [-1, 1]; values beyond are clipped. Equal images give 100 dB.
    """
    restored, x = (as_uint8((images.clamp(-1, 1) + 1) / 2).float() for images in (restored, x))
    mean_square = ((restored - x) / 255).square().mean((1, 2, 3))
    return -10 * torch.log10(mean_square.clamp(min=1e-10))


@torch.no_grad()
def measure_psnr(vae: ConvAutoencoder, images: Tensor) -> Tensor:
    """Return the PSNR of uint8 images (N, 3, H, W), encoded and decoded, (N,) in dB."""
    values = []
    for batch in images.split(MEASURED_BATCH):
        x = as_float(batch.to(vae.device))
        values.append(psnr(vae(x).sample.float(), x).cpu())
    return torch.cat(values)


class AutoencoderTrainer:
    """A ConvAutoencoder in training, with everything that a step changes and a checkpoint saves.

    Images, mirroring and latent noise are functions of (seed, step, slot), so a resumed run ends in
    the same weights.
    """

    def __init__(
        self, config: AutoencoderConfig, accelerator: Accelerator, images: CaptionedImages
    ) -> None:
        self.config = config
        self.accelerator = accelerator
        self.images = images
        torch.manual_seed(config.seed)  # the initial weights
        vae = ConvAutoencoder(**vars(config.model))
        vae.train().to(accelerator.device, memory_format=torch.channels_last)
        optimizer = build_optimizer(vae, config.train)
        self.schedule = build_lr_schedule(optimizer, config.train)
        self.vae, self.optimizer = accelerator.prepare(vae, optimizer)
        self.weights = list(vae.parameters())
        self.global_step = 0
        self.skipped = 0
        self.start_time = time.monotonic()

    @property
    def seconds(self) -> float:
        """Training time, that of earlier starts included."""
        return time.monotonic() - self.start_time

    def batch(self) -> Tensor:
        """Return the images of the step, (B, 3, H, W) in [-1, 1]; half of them are mirrored."""
        seed, step, size = self.config.seed, self.global_step, self.config.train.batch_size
        slots = range(size)
        rows = batch_indices(seed, step, size, len(self.images))
        x = as_float(self.images.images[rows])
        mirrored = randomness.flips(seed, step, slots)[:, None, None, None]
        x = torch.where(mirrored, x.flip(3), x)
        return x.to(self.accelerator.device, memory_format=torch.channels_last)

    def step(self) -> StepResult:
        """Take a step on the next images; skip one whose gradient is not finite."""
        x = self.batch()
        train = self.config.train
        with self.accelerator.autocast():
            z = self.vae.encode(x).latents
            eps = randomness.noise(
                self.config.seed, self.global_step, range(len(z)), z.shape[1:], "latents"
            )
            restored = self.vae.decode(z + train.latent_noise * eps.to(z)).sample
        loss = reconstruction_loss(restored.float(), x, train.edges)
        self.accelerator.backward(loss)
        norm = self.accelerator.clip_grad_norm_(self.weights, train.clip)
        lr = self.optimizer.param_groups[-1]["lr"]
        result = StepResult(loss.item(), float(norm), lr)
        if result.is_finite:
            self.optimizer.step()
        self.skipped += not result.is_finite
        self.optimizer.zero_grad()
        self.schedule.step()
        self.global_step += 1
        return result

    def measure(self, images: CaptionedImages) -> float:
        """Return the mean PSNR in dB of up to MEASURED_IMAGES images of a split."""
        rows = evenly_spaced(MEASURED_IMAGES, len(images))
        self.vae.eval()
        values = measure_psnr(self.vae, images.images[rows])
        self.vae.train()
        return values.mean().item()

    def save(self, folder: Path) -> None:
        """Write the weights and the training state into a checkpoint's folder."""
        self.vae.save_pretrained(folder / "autoencoder", safe_serialization=True)
        state = {
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "step": self.global_step,
            "skipped": self.skipped,
            "seconds": self.seconds,
        }
        save_state(folder, "trainer", state)

    def resume(self, checkpoint: Path) -> None:
        """Restore a checkpoint's weights and state."""
        saved = load_state(checkpoint, "trainer")
        before = ConvAutoencoder.from_pretrained(checkpoint / "autoencoder", use_safetensors=True)
        self.vae.load_state_dict(before.state_dict())
        restore_optimizer(self.optimizer, saved["optimizer"])
        resume_lr_schedule(self.schedule, saved["schedule"])
        self.global_step = saved["step"]
        self.skipped = saved["skipped"]
        self.start_time -= saved["seconds"]
