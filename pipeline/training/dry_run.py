"""`--dry_run`: time one step and describe the run."""

import time
from collections.abc import Iterator

from pipeline.hardware import peak_memory
from pipeline.models.build import parameter_count
from pipeline.training.task import Batch
from pipeline.training.trainer import StepResult, Trainer


class StepTimer:
    """Takes the place of a Monitor and times each step; the first one warms up."""

    stopped = False

    def read(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield the micro-batches of a step."""
        self.started = time.perf_counter()
        yield from batches

    def after_step(self, result: StepResult) -> None:
        """Note the time of the step."""
        self.seconds = time.perf_counter() - self.started


def describe_run(trainer: Trainer, step_seconds: float) -> str:
    """Return the settings of a run, its size, and the time and memory that it needs."""
    config, train = trainer.config, trainer.config.train
    return (
        f"{config.to_yaml()}\n{trainer.task.images.report}\n"
        f"{parameter_count(trainer.weights):,} weights to train\n"
        f"{train.steps} steps of {train.batch_size} images, {step_seconds:.3f} s each: "
        f"about {step_seconds * train.steps / 60:.1f} minutes\n"
        f"peak memory so far: {peak_memory()}"
    )
