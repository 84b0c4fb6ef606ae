"""Train the small autoencoder: from images to latents, and back to the same images."""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from pipeline import randomness
from pipeline.config import AutoencoderConfig
from pipeline.data.dataset import CaptionedImages
from pipeline.data.image_ops import as_float
from pipeline.data.latent_cache import restore_images
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
# `psnr`'s floor in the loss: beyond 46 dB a crop, such as a white one, is good enough.
LOSS_FLOOR = 2.5e-5


class StepResult(NamedTuple):
    """The outcome of a training step."""

    loss: float  # the negative PSNR in dB
    grad_norm: float  # before clipping
    lr: float

    @property
    def is_finite(self) -> bool:
        """Whether the gradient was finite, so that the step was taken."""
        return math.isfinite(self.grad_norm)


def psnr(restored: Tensor, x: Tensor, floor: float = 1e-10) -> Tensor:
    """Return the peak signal-to-noise ratio of images (B, 3, H, W) in [-1, 1], (B,) in dB.

    floor: added to the mean squared error relative to the squared range; 1e-10 is 100 dB.
    """
    mean_square = ((restored - x) / 2).square().mean((1, 2, 3))
    return -10 * torch.log10(mean_square + floor)


def measure_psnr(vae: ConvAutoencoder, images: Tensor) -> Tensor:
    """Return the PSNR of uint8 images (N, 3, H, W) after encoding and decoding, (N,) in dB."""
    return psnr(as_float(restore_images(vae, images)), as_float(images))


class AutoencoderTrainer:
    """A ConvAutoencoder in training, with everything that a step changes and a checkpoint saves.

    Images, crops, mirroring and latent noise are functions of (seed, step, slot), so a resumed run
    ends in the same weights.
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
        self.consecutive_skips = 0
        self.start_time = time.monotonic()

    @property
    def seconds(self) -> float:
        """Training time, that of earlier starts included."""
        return time.monotonic() - self.start_time

    def batch(self) -> Tensor:
        """Return the step's crops, (B, 3, crop, crop) in [-1, 1]; half of them are mirrored."""
        seed, step, train = self.config.seed, self.global_step, self.config.train
        slots = range(train.batch_size)
        images = self.images.images[batch_indices(seed, step, train.batch_size, len(self.images))]
        places = self.config.data.resolution - train.crop + 1
        tops, lefts = (
            (randomness.uniform(seed, step, slots, purpose) * places).long().tolist()
            for purpose in ("top", "left")
        )
        crops = [
            image[:, top : top + train.crop, left : left + train.crop]
            for image, top, left in zip(images, tops, lefts, strict=True)
        ]
        x = as_float(torch.stack(crops))
        mirrored = randomness.flips(seed, step, slots)[:, None, None, None]
        x = torch.where(mirrored, x.flip(3), x)
        return x.to(self.accelerator.device, memory_format=torch.channels_last)

    def step(self) -> StepResult:
        """Take a step to a higher PSNR of the next crops; skip a gradient that is not finite."""
        x = self.batch()
        seed, train = self.config.seed, self.config.train
        with self.accelerator.autocast():
            z = self.vae.encode(x).latents
            slots = range(len(z))
            eps = randomness.noise(seed, self.global_step, slots, z.shape[1:], "latents")
            restored = self.vae.decode(z + train.latent_noise * eps.to(z)).sample
        loss = -psnr(restored.float(), x, LOSS_FLOOR).mean()
        self.accelerator.backward(loss)
        norm: Any = self.accelerator.clip_grad_norm_(self.weights, train.clip)
        lr = self.optimizer.param_groups[-1]["lr"]
        result = StepResult(loss.item(), float(norm), lr)
        if result.is_finite:
            self.optimizer.step()
        self.skipped += not result.is_finite
        self.consecutive_skips = 0 if result.is_finite else self.consecutive_skips + 1
        self.optimizer.zero_grad()
        self.schedule.step()
        self.global_step += 1
        return result

    def measure(self, images: CaptionedImages, rows: Sequence[int] | None = None) -> Tensor:
        """Return the PSNR in dB of up to MEASURED_IMAGES of some images, all by default."""
        rows = range(len(images)) if rows is None else rows
        chosen = [rows[i] for i in evenly_spaced(MEASURED_IMAGES, len(rows)).tolist()]
        self.vae.eval()
        values = measure_psnr(self.vae, images.images[chosen])
        self.vae.train()
        return values

    @torch.no_grad()
    def calibrate(self) -> None:
        """Set the scale and shift that give whole training images latents of variance 1.

        Crops have fewer white borders, so by the averages of training alone it is less.
        """
        rows = evenly_spaced(MEASURED_IMAGES, len(self.images))
        self.vae.eval()
        batches = self.images.images[rows].split(MEASURED_BATCH)
        z = torch.cat([self.vae.encode(as_float(x).to(self.vae.device)).latents for x in batches])
        self.vae.register_to_config(scaling_factor=1 / z.std().item(), shift_factor=z.mean().item())

    def save_model(self, folder: Path) -> None:
        """Save the autoencoder, as `ConvAutoencoder.from_pretrained` loads it."""
        self.vae.save_pretrained(folder, safe_serialization=True)

    def save(self, folder: Path) -> None:
        """Write the weights and the training state into a checkpoint's folder."""
        self.save_model(folder / "autoencoder")
        state = {
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "step": self.global_step,
            "skipped": self.skipped,
            "in_a_row": self.consecutive_skips,
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
        self.consecutive_skips = saved["in_a_row"]
        self.start_time -= saved["seconds"]
