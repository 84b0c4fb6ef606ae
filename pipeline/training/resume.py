"""Find where a run resumes, refuse what would lose or mix results, and prepare its folder."""

import math
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from pipeline.config import AutoencoderConfig, Config, ConfigError, differences, load_file
from pipeline.data.sources.rows import DataError
from pipeline.models.build import parameter_count
from pipeline.runs.checkpoints import CHECKPOINT_MANIFEST, read_checkpoint_manifest
from pipeline.runs.files import replace_text
from pipeline.runs.folder import RunError, RunFolder
from pipeline.training.task import TrainingTask
from pipeline.training.trainer import Trainer

# Settings and sections that a resumed run may change.
CHANGEABLE_ON_RESUME = (
    *("name", "output", "report_to", "hub", "sample", "data.cache", "data.max_broken"),
    *("train.steps", "train.threads", "train.accumulation", "train.gradient_checkpointing"),
    *("train.log_every", "train.validate_every", "train.save_every", "train.keep"),
    *("train.max_skipped", "train.patience"),
)


def find_start(
    run: RunFolder, config: Config | AutoencoderConfig, accelerator: Accelerator, facts_file: str
) -> tuple[Path | None, bool]:
    """Return the checkpoint to resume from, None for a new run, and whether the run is finished.

    The main process decides for all. facts_file: what a run writes beside its card.
    """
    decision: list[Any] = [None, None, None]
    if accelerator.is_main_process:
        checkpoint = newest_checkpoint(run, config, facts_file)
        decision = [checkpoint, run.finished, has_plateaued(run, config.train.patience)]
    checkpoint, finished, plateaued = broadcast_object_list(decision)
    step = int(checkpoint.name) if checkpoint else 0
    if checkpoint and not (checkpoint / CHECKPOINT_MANIFEST).is_file():
        raise RunError(
            f"Process {accelerator.process_index} does not see {checkpoint}. "
            "Set `output` to a folder that all machines share."
        )
    if step > config.train.steps and not finished:
        raise RunError(
            f"{run.folder} is at step {step} already, got train.steps {config.train.steps}. "
            f"Set train.steps to at least {step}, or choose another --name."
        )
    return checkpoint, finished and (plateaued or step >= config.train.steps)


def has_plateaued(run: RunFolder, patience: int | None) -> bool:
    """Return whether the last `patience` validations brought no lower held-out loss."""
    logged = [line["held_out_loss"] for line in run.history() if "held_out_loss" in line]
    losses = [math.inf if loss is None else loss for loss in logged]
    if patience is None or not losses:
        return False
    return len(losses) - 1 - losses.index(min(losses)) >= patience


def newest_checkpoint(
    run: RunFolder, config: Config | AutoencoderConfig, facts_file: str
) -> Path | None:
    """Return the newest complete checkpoint, None for a new run.

    Raises RunError if settings changed, or if a new run would overwrite files of the folder.
    """
    checkpoint = run.newest()
    if checkpoint is None:
        foreign_card = run.card.is_file() and not (run.folder / facts_file).is_file()
        if run.has_result or foreign_card:
            found = "a model but no checkpoint" if run.has_result else f"another {run.card.name}"
            raise RunError(
                f"{run.folder} holds {found}. Choose another --name, or move the folder."
            )
        return None
    try:
        before = load_file(run.config, type(config))
    except ConfigError as error:
        reasons = "; ".join(str(error).splitlines())
        raise RunError(
            f"{run.config}, which started this run, does not fit this version ({reasons}). "
            "Fix the file, or choose another --name."
        ) from error
    changed = differences(before, config, CHANGEABLE_ON_RESUME)
    if changed:
        raise RunError(
            f"{run.folder} was started with other settings: {'; '.join(changed)}. "
            "Undo the change, or choose another --name."
        )
    return checkpoint


def check_data(task: TrainingTask, run: RunFolder, checkpoint: Path | None) -> None:
    """Raise DataError if ranks read different data, RunError if it changed since the start."""
    source, now = " and ".join(task.config.data.sources), task.fingerprint
    if len(set(gather_object([now]))) > 1:
        raise DataError(
            f"The processes read different images or captions in {source}. "
            "Copy the same files to all machines."
        )
    before = read_checkpoint_manifest(checkpoint).get("data", now) if checkpoint else now
    if before != now:
        raise RunError(
            f"{run.folder} was started on other images or captions: the fingerprint of {source} "
            f"was {before} and is now {now}. Restore the data, or choose another --name."
        )


def prepare_run_folder(trainer: Trainer, run: RunFolder, checkpoint: Path | None) -> None:
    """Remove outputs that the next steps overwrite and print a start-up summary."""
    steps = trainer.config.train.steps
    run.card.unlink(missing_ok=True)  # the card marks a finished run
    run.rewind(trainer.global_step)
    if trainer.global_step == steps:  # only the end is repeated, perhaps with other prompts
        sample_path(run, steps).unlink(missing_ok=True)
    replace_text(run.config, trainer.config.to_yaml())
    start = f"resuming from step {trainer.global_step}" if checkpoint else "a new run"
    print(trainer.task.images.report)
    print(f"{parameter_count(trainer.weights):,} weights to train; {start}")
    if not checkpoint:
        return
    before = read_checkpoint_manifest(checkpoint)["processes"]
    now = trainer.accelerator.num_processes
    if before != now:
        print(
            f"The checkpoint was saved by {before} process(es), now there are {now}: "
            "the batches are the same, their sums round differently."
        )
    saved_lr, lr = trainer.resumed_lr
    if saved_lr != lr:
        print(f"With {steps} steps the learning rate resumes at {lr:.3g}; it was {saved_lr:.3g}.")


def sample_path(run: RunFolder, step: int) -> Path:
    """Return the file of a step's samples."""
    return run.samples / f"{step:06d}.png"
