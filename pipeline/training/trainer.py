"""The network in training, with everything that a step changes and a checkpoint saves."""

import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from pipeline.config import Config
from pipeline.models.build import trainable_parameters
from pipeline.models.ema import build_ema
from pipeline.models.lora import save_adapter
from pipeline.runs.files import replace_folder
from pipeline.runs.folder import RunFolder
from pipeline.runs.state_files import load_state
from pipeline.training.distributed import for_this_rank
from pipeline.training.optimizers import (
    build_lr_schedule,
    build_optimizer,
    restore_optimizer,
    resume_lr_schedule,
)
from pipeline.training.task import Batch, TrainingTask


class StepResult(NamedTuple):
    """The outcome of a training step."""

    grad_norm: float  # before clipping
    lr: float
    losses: list[tuple[Tensor, Tensor]]  # slots and losses of this rank, a pair a micro-batch

    @property
    def is_finite(self) -> bool:
        """Whether the gradient was finite, so that the step was taken."""
        return math.isfinite(self.grad_norm)


class Trainer:
    """The optimizer, learning rate, averaged weights and counters of a run."""

    def __init__(self, config: Config, accelerator: Accelerator, task: TrainingTask):
        self.config = config
        self.accelerator = accelerator
        self.task = task
        optimizer = build_optimizer(task.unet, config.train)
        self.schedule = build_lr_schedule(optimizer, config.train)
        self.ema = build_ema(task.unet, config.train.ema)
        self.network, self.optimizer = accelerator.prepare(task.unet, optimizer)
        self.weights = trainable_parameters(task.unet)
        self.ema.to(accelerator.device)
        self.global_step = 0
        self.skipped = 0
        self.consecutive_skips = 0
        self.start_time = time.monotonic()
        self.micro_losses: list[tuple[Tensor, Tensor]] = []  # of the step in progress
        self.losses: list[float] = []  # since the last log line
        # Step, held-out loss and averaged weights of the best validation, for train.keep_best.
        self.best: dict[str, Any] | None = None
        self.resumed_lr = (0.0, 0.0)  # as a checkpoint saved it, and by this run's plan

    @property
    def seconds(self) -> float:
        """Training time, that of earlier starts included."""
        return time.monotonic() - self.start_time

    def record(self, batch: Batch, losses: Tensor) -> None:
        """Remember the losses (B,) of a micro-batch until the end of the step."""
        self.micro_losses.append((batch.slots, losses.detach()))

    def optimizer_step(self) -> StepResult:
        """Apply the clipped gradient, or skip one that is not finite; step the EMA and schedule."""
        norm: Any = self.accelerator.clip_grad_norm_(self.weights, self.config.train.clip)
        # One transfer for all values: each would wait for the GPU.
        means = [losses.mean() for _, losses in self.micro_losses]
        grad_norm, *means = torch.stack([norm, *means]).tolist()
        lr = self.optimizer.param_groups[-1]["lr"]
        result = StepResult(grad_norm, lr, self.micro_losses)
        if result.is_finite:
            self.optimizer.step()
            self.ema.step(self.weights)
        elif self.accelerator.scaler is not None:
            self.accelerator.scaler.update()  # lowers the loss scale
        self.optimizer.zero_grad()
        self.schedule.step()
        self.global_step += 1
        self.skipped += not result.is_finite
        self.consecutive_skips = 0 if result.is_finite else self.consecutive_skips + 1
        self.losses += filter(math.isfinite, means)
        self.micro_losses = []
        return result

    def pop_mean_loss(self) -> float:
        """Return the mean loss of all ranks since the last call, nan if none was finite."""
        losses = torch.tensor(self.losses, device=self.accelerator.device)
        self.losses = []
        mean: Any = self.accelerator.reduce(losses.mean(), "mean")
        return mean.item()

    def keep_if_best(self, loss: float) -> None:
        """Copy the averaged weights if this held-out loss is the lowest so far."""
        if loss < (self.best["loss"] if self.best else math.inf):
            copies = [mean.to("cpu", copy=True) for mean in self.ema.shadow_params]
            self.best = {"step": self.global_step, "loss": loss, "weights": copies}

    def state_dict(self) -> dict:
        """Return the state that `resume` restores, for all ranks: each must call it."""
        scaler, stream = self.accelerator.scaler, self.task.stream
        counters = {
            "step": self.global_step,
            "skipped": self.skipped,
            "in_a_row": self.consecutive_skips,
            "seconds": self.seconds,
        }
        return {
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "ema": self.ema.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else {},
            "best": self.best,
            "state": counters,
            "losses": gather_object([self.losses]),
            "streams": gather_object([stream.state_dict()]) if stream is not None else [],
        }

    def resume(self, checkpoint: Path) -> None:
        """Restore a checkpoint's state; the learning rate continues by this run's plan."""
        saved = load_state(checkpoint, "trainer")
        restore_optimizer(self.optimizer, saved["optimizer"])
        self.resumed_lr = resume_lr_schedule(self.schedule, saved["schedule"])
        self.ema.load_state_dict(saved["ema"])
        self.best = saved.get("best")
        # In the memory format of the weights, or the EMA takes torch's slow path.
        self.ema.shadow_params = [
            torch.empty_like(weight).copy_(mean)
            for weight, mean in zip(self.weights, self.ema.shadow_params, strict=True)
        ]
        # A machine that computes in another precision saved no scaler.
        if self.accelerator.scaler is not None and saved.get("scaler"):
            self.accelerator.scaler.load_state_dict(saved["scaler"])
        counters = saved["state"]
        self.global_step = counters["step"]
        self.skipped = counters["skipped"]
        self.consecutive_skips = counters["in_a_row"]
        self.start_time -= counters["seconds"]
        # Older checkpoints have the losses of one rank, among the counters.
        losses = saved["losses"] if "losses" in saved else [counters["losses"]]
        self.losses = for_this_rank(losses, self.accelerator)
        if self.task.stream is not None:
            self.task.stream.load_state_dict(for_this_rank(saved["streams"], self.accelerator))

    def save_model(self, run: RunFolder) -> None:
        """Copy the averaged weights, or the best ones, into the network, and save the model.

        It is saved as a pipeline or an adapter.
        """
        if self.best is not None:
            self.ema.shadow_params = self.best["weights"]
        self.ema.copy_to(self.weights)
        network = self.task.unet.eval()
        if self.config.train.method == "lora":
            replace_folder(run.adapter, lambda folder: save_adapter(network, folder))
            return
        pipe = self.task.pipe
        replace_folder(
            run.pipeline, lambda folder: pipe.save_pretrained(folder, safe_serialization=True)
        )
