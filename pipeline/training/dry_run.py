"""`--dry_run`: time one step and describe the run."""

import resource
import sys
import time
from collections.abc import Iterator

import torch

from pipeline.models.build import parameter_count
from pipeline.training.task import Batch
from pipeline.training.trainer import StepResult, Trainer


class StepTimer:
    """Times steps in the place of a Monitor; the first one warms up."""

    stopped = False

    def __init__(self):
        self.started = 0.0
        self.seconds = 0.0  # of the last step

    def read(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield the micro-batches of a step."""
        self.started = time.perf_counter()
        yield from batches

    def after_step(self, result: StepResult) -> None:
        """Note the time of a step."""
        self.seconds = time.perf_counter() - self.started


def describe_run(trainer: Trainer, step_seconds: float) -> str:
    """Return the settings of a run, its size, and the time and memory that it needs."""
    config, train = trainer.config, trainer.config.train
    unit = 2**30 if sys.platform == "darwin" else 2**20
    memory = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit:.1f} GiB"
    if trainer.accelerator.device.type == "cuda":
        memory += f" and {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB on each GPU"
    minutes = step_seconds * train.steps / 60
    return (
        f"{config.to_yaml()}\n{trainer.task.images.report}\n"
        f"{parameter_count(trainer.weights):,} weights to train\n"
        f"{train.steps} steps of {train.batch_size} images, {step_seconds:.3f} s each: "
        f"about {minutes:.1f} minutes\npeak memory so far: {memory}"
    )
