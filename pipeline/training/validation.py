"""Validation losses on a fixed grid, and sample images."""

from pathlib import Path
from typing import Any

import torch
from diffusers.utils import make_image_grid
from torch import Tensor, nn

from pipeline.config import ConfigError, SampleConfig
from pipeline.data.dataset import CaptionedImages
from pipeline.data.sampler import evenly_spaced
from pipeline.diffusion.text_to_image import TextToImagePipeline
from pipeline.randomness import noise
from pipeline.runs.stop_signals import StopSignals
from pipeline.training.task import Batch, TrainingTask, predict

VAL_TIMESTEPS = 8
VAL_IMAGES = 16  # of each split


def validate(network: nn.Module, task: TrainingTask, stop: StopSignals) -> dict:
    """Return losses and x_0 errors of the training and held-out splits; {} after a stop request."""
    record = validate_split("train", network, task, task.images, task.caption_states, stop)
    if task.held_out is not None and task.held_out_states is not None:
        split = task.held_out, task.held_out_states
        record |= validate_split("held_out", network, task, *split, stop)
    return {} if stop else record


@torch.no_grad()
def validate_split(
    name: str,
    network: nn.Module,
    task: TrainingTask,
    images: CaptionedImages,
    states: Tensor,
    stop: StopSignals,
) -> dict:
    """Return the mean loss and the x_0 error by timestep, always on the same images and noise."""
    T = len(task.scheduler)
    rows = evenly_spaced(VAL_IMAGES, len(images))
    captions = states[images.first[rows]].to(task.device)
    batch = Batch(0, rows, task.encode_images(images, rows), captions)
    eps = noise(0, 0, rows, batch.x_0.shape[1:]).to(task.device)
    losses = []
    errors = {}
    for k in ((torch.arange(VAL_TIMESTEPS) + 0.5) * T / VAL_TIMESTEPS).long().tolist():
        if stop:
            return {}
        t = torch.full((len(rows),), k, device=task.device)
        x_t = task.scheduler.add_noise(batch.x_0, eps, t)
        prediction = predict(network, x_t, t, batch.captions)
        x_0_hat = task.scheduler.predict_x_0(prediction, t, x_t)
        losses.append(task.loss(prediction, batch, eps, t).mean().item())
        errors[k] = (x_0_hat - batch.x_0).square().mean().item()
    return {f"{name}_loss": sum(losses) / VAL_TIMESTEPS, f"{name}_x_0_error": errors}


def check_sampling(pipe: TextToImagePipeline, sample: SampleConfig) -> None:
    """Raise ConfigError if the pipeline cannot sample with these settings."""
    settings = {"w": sample.w[0], "num_inference_steps": sample.steps, "eta": sample.eta}
    try:
        pipe.denoise(sample.prompts[0], **settings)
    except ValueError as error:
        raise ConfigError(f"sample: {error}") from error


def sample_images(
    pipe: TextToImagePipeline, sample: SampleConfig, path: Path, stop: StopSignals
) -> None:
    """Sample each prompt (a column) at each w (a row) from the same noise into one image file.

    After a stop request no file is written.
    """
    pipe.set_progress_bar_config(disable=True)

    def interrupt_on_stop(pipe: TextToImagePipeline, *_) -> dict:
        pipe.interrupt = bool(stop)
        return {}

    settings: dict[str, Any] = {
        "seed": sample.seed,
        "num_inference_steps": sample.steps,
        "eta": sample.eta,
        "callback_on_step_end": interrupt_on_stop,
    }
    images = []
    for w in sample.w:
        settings["w"] = w
        output: Any = pipe(list(sample.prompts), **settings)
        images += output.images
        if stop:
            return
    make_image_grid(images, rows=len(sample.w), cols=len(sample.prompts)).save(path)
