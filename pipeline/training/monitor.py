"""Around the training steps: log, validate, sample and save when due, and stop when asked."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from accelerate.utils import broadcast_object_list, gather_object
from tqdm.auto import tqdm

from pipeline.data.sources.rows import DataError
from pipeline.data.streaming import StreamPosition
from pipeline.hardware import peak_memory_gib, skip_on_out_of_memory
from pipeline.models.ema import ema_weights
from pipeline.runs.folder import Diverged, RunFolder
from pipeline.runs.state_files import save_state
from pipeline.runs.stop_signals import Stopped, StopSignals
from pipeline.training.distributed import any_rank_stopped
from pipeline.training.resume import has_plateaued, sample_path
from pipeline.training.task import Batch
from pipeline.training.trackers import Trackers
from pipeline.training.trainer import StepResult, Trainer
from pipeline.training.validation import sample_images, validate


class Monitor:
    """Watches a run.

    `stopped` is set after a step in which any rank was asked to stop, `plateaued` once the held-out
    loss has not improved for train.patience validations. Either ends the run.
    """

    def __init__(self, trainer: Trainer, run: RunFolder, trackers: Trackers, stop: StopSignals):
        self.config = trainer.config
        self.accelerator = trainer.accelerator
        self.task = trainer.task
        self.trainer = trainer
        self.run = run
        self.trackers = trackers
        self.stop = stop
        self.stopped = False
        self.plateaued = False  # for train.patience
        self.step_started = 0.0
        self.busy_seconds = 0.0  # since the last log line, as steps_since_log
        self.steps_since_log = 0

    def __enter__(self) -> Self:
        """Open the progress bar; run the validation and sampling that an interruption skipped."""
        self.bar = tqdm(
            total=self.config.train.steps,
            initial=self.trainer.global_step,
            disable=not self.accelerator.is_main_process,
            desc=self.config.name,
            unit="step",
            dynamic_ncols=True,
        )
        if self.trainer.global_step:
            self.validate_and_sample()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    @property
    def ended(self) -> bool:
        """Whether the loop ends before the next step."""
        return self.stopped or self.plateaued

    def is_due(self, every: int) -> bool:
        """Return whether what happens every n steps is due; at the last step everything is."""
        step = self.trainer.global_step
        return step % every == 0 or step == self.config.train.steps or self.plateaued

    def read(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield the micro-batches of a step; save the steps before it if they cannot be read."""
        self.step_started = time.perf_counter()
        place = self.task.stream and self.task.stream.place
        while True:
            with self.save_before_stream_failure(place):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    @contextlib.contextmanager
    def save_before_stream_failure(self, place: StreamPosition | None) -> Iterator[None]:
        """Save the finished steps if a stream fails for good, or at a stop request meanwhile.

        place: the stream's position at the start of the step. Several ranks can no longer agree on
        a checkpoint, so only a single one saves. A saved step is not saved again.
        """
        step, stream = self.trainer.global_step, self.task.stream
        if stream is None or self.accelerator.num_processes > 1:
            yield
            return
        try:
            with self.stop.raise_on_stop(f"after step {step} of {self.config.train.steps}"):
                yield
        except (DataError, Stopped) as error:
            if step == 0:
                raise
            stream.place = place
            newest = self.run.newest()
            if newest is None or int(newest.name) != step:
                self.save()
            if isinstance(error, Stopped):
                raise
            raise type(error)(
                f"{error}\nStep {step} is saved; run the same command to resume."
            ) from error

    def after_step(self, result: StepResult) -> None:
        """Log, validate, sample and save when due, and look for stop requests."""
        train, sample = self.config.train, self.config.sample
        if not result.is_finite:
            self.report_skipped_step(result)
        self.busy_seconds += time.perf_counter() - self.step_started
        self.steps_since_log += 1
        self.bar.update()
        if self.is_due(train.log_every):
            self.log(result)
        self.stopped = any_rank_stopped(self.stop, self.accelerator)
        if not self.stopped and (self.is_due(train.validate_every) or self.is_due(sample.every)):
            self.validate_and_sample()
            self.stopped = any_rank_stopped(self.stop, self.accelerator)
        if self.stopped or self.is_due(train.save_every):
            self.save()

    def log(self, result: StepResult) -> None:
        """Write a line of metrics.jsonl and send it to the trackers."""
        loss = self.trainer.pop_mean_loss()
        images = self.config.train.batch_size * self.steps_since_log
        memory = peak_memory_gib()
        record = {
            "step": self.trainer.global_step,
            "loss": loss,
            "grad_norm": result.grad_norm,
            "lr": result.lr,
            "skipped": self.trainer.skipped,
            "images_per_s": images / self.busy_seconds,
            "seconds": self.trainer.seconds,
            **memory,
        }
        self.busy_seconds = 0.0
        self.steps_since_log = 0
        *_, gib = memory.values()  # the GPU's if there is one
        self.bar.set_postfix_str(
            f"loss {loss:.4f}, gradient {result.grad_norm:.2g}, "
            f"{record['images_per_s']:.1f} images/s, {gib:.1f} GiB"
        )
        if self.accelerator.is_main_process:
            self.run.log(**record)
        self.trackers.log(self.trainer.global_step, record)

    def validate_and_sample(self) -> None:
        """Run the validation and sampling due at this step on the main process, if not yet done."""
        is_main, patience = self.accelerator.is_main_process, self.config.train.patience
        if is_main:
            self.validate()
        if patience is not None:
            decision = [is_main and has_plateaued(self.run, patience)]
            (self.plateaued,) = broadcast_object_list(decision)
        if is_main and self.plateaued:
            tqdm.write(
                f"No lower held-out loss in {patience} validations (train.patience): the run ends "
                f"after step {self.trainer.global_step} of {self.config.train.steps}."
            )
        if is_main:
            self.sample()

    def validate(self) -> None:
        """Validate the averaged weights if that is due and not in the log; keep the best ones."""
        step, network = self.trainer.global_step, self.task.unet
        history = self.run.history()
        validated = any(line["step"] == step and "train_loss" in line for line in history)
        if self.is_due(self.config.train.validate_every) and not validated:
            record, what = {}, f"the validation of step {step}"
            with ema_weights(network, self.trainer.ema), skip_on_out_of_memory(what):
                record = validate(network, self.task, self.stop)
            if record and self.config.train.keep_best:
                self.trainer.keep_if_best(record["held_out_loss"])
            if record:
                self.run.log(step=step, **record)
                self.trackers.log(step, record)

    def sample(self) -> None:
        """Sample with the averaged weights if that is due and there is no file."""
        step, network = self.trainer.global_step, self.task.unet
        path = sample_path(self.run, step)
        if self.is_due(self.config.sample.every) and not path.is_file() and not self.stop:
            advice = ". Use fewer sample.prompts."
            with ema_weights(network, self.trainer.ema), skip_on_out_of_memory(path, advice):
                sample_images(self.task.pipe, self.config.sample, path, self.stop)
            self.trackers.log_image(step, path)

    def save(self) -> None:
        """Save a checkpoint of the finished step, with the state of all ranks."""
        state = self.trainer.state_dict()

        def write(folder: Path) -> None:
            self.task.save(folder)
            save_state(folder, "trainer", state)

        if self.accelerator.is_main_process:
            self.run.save(
                self.trainer.global_step,
                write,
                self.config.train.keep,
                processes=self.accelerator.num_processes,
                data=self.task.fingerprint,
            )
        self.accelerator.wait_for_everyone()

    def report_skipped_step(self, result: StepResult) -> None:
        """Name the examples without a finite loss; Diverged after too many skips in a row."""
        step, train = self.trainer.global_step, self.config.train
        examples = gather_object(self.nonfinite_examples(result))
        if self.accelerator.is_main_process:
            cause = f"loss for {'; '.join(examples)}" if examples else "gradient"
            tqdm.write(f"step {step} is skipped: no finite {cause}")
            self.run.log(step=step, no_finite_loss=examples)
        if self.trainer.consecutive_skips >= train.max_skipped:
            raise Diverged(
                f"{self.trainer.consecutive_skips} steps in a row, up to step {step}, had no "
                f"finite gradient. Lower train.lr (now {train.lr:g}) in a run of another --name. "
                "The last checkpoint is retained."
            )

    def require_finite_validation(self) -> None:
        """Raise Diverged if the last validation loss is not finite: the result would be useless."""
        losses = ("train_loss", "held_out_loss")
        checks = [line for line in self.run.history() if "train_loss" in line]
        if any(line.get(loss, 0) is None for line in checks[-1:] for loss in losses):
            raise Diverged(
                f"The validation of step {checks[-1]['step']} has no finite loss, so no result is "
                f"saved. Lower train.lr (now {self.config.train.lr:g}) in a run of another --name."
            )

    def nonfinite_examples(self, result: StepResult) -> list[str]:
        """Return this rank's examples of the finished step without a finite loss."""
        slots = [
            int(slot) for slots, losses in result.losses for slot in slots[~losses.isfinite().cpu()]
        ]
        return self.task.describe_examples(self.trainer.global_step - 1, slots) if slots else []
