"""`--dry_run`: time a few steps and describe the run."""

import statistics
import time
from collections.abc import Iterator

from pipeline.hardware import peak_memory_gib
from pipeline.models.build import parameter_count
from pipeline.training.task import Batch
from pipeline.training.trainer import StepResult, Trainer

TIMED_STEPS = 4


class StepTimer:
    """Takes the place of a Monitor and times each step; the first one warms up."""

    ended = False

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def read(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield the micro-batches of a step."""
        self.started = time.perf_counter()
        yield from batches

    def after_step(self, result: StepResult) -> None:
        """Note the time of the step."""
        self.seconds.append(time.perf_counter() - self.started)


def describe_run(trainer: Trainer, seconds: list[float]) -> str:
    """Return the settings of a run, its size, and the time and memory that it needs.

    seconds: of each timed step. A busy machine shows in their spread.
    """
    config, train = trainer.config, trainer.config.train
    low, middle, high = min(seconds), statistics.median(seconds), max(seconds)
    minutes = train.steps / 60
    # That of the process, and of each GPU if there is one.
    memory = " and ".join(f"{gib:.1f} GiB" for gib in peak_memory_gib().values())
    return (
        f"{config.to_yaml()}\n{trainer.task.images.report}\n"
        f"{parameter_count(trainer.weights):,} weights to train\n"
        f"{train.steps} steps of {train.batch_size} images, {middle:.3f} s each: about "
        f"{middle * minutes:.1f} minutes ({low * minutes:.1f} to {high * minutes:.1f} by the "
        f"fastest and the slowest of {len(seconds)} timed steps)\n"
        f"peak memory so far: {memory}"
    )
