"""Train a text-to-image diffusion model.

    accelerate launch train_text2img.py [--config FILE] [--train.lr 3e-4 …]

`training_loop` is the lecture's algorithm. Everything random in it is a function of (seed, step,
position in the global batch). So the same command after an interruption repeats the lost steps, bit
for bit on a CPU.
"""

import contextlib
import errno
import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from pipeline.config import Config, ConfigError, load
from pipeline.data.emoji.catalogue import EmojiError
from pipeline.data.sources.rows import DataError
from pipeline.data.streaming import Stream
from pipeline.hardware import is_out_of_memory, skip_on_failure
from pipeline.hub.client import HubError
from pipeline.hub.figures import plot_strips, plot_training
from pipeline.hub.model_card import (
    TRAINING_FACTS,
    build_card,
    license_of,
    training_facts,
    write_card,
)
from pipeline.hub.push import check_push, publish
from pipeline.runs.folder import RunError, RunFolder
from pipeline.runs.stop_signals import Stopped, StopSignals
from pipeline.training.distributed import local_main_first, start_accelerator
from pipeline.training.dry_run import TIMED_STEPS, StepTimer, describe_run
from pipeline.training.monitor import Monitor
from pipeline.training.resume import check_data, find_start, prepare_run_folder, sample_path
from pipeline.training.task import TrainingTask, open_stream, predict
from pipeline.training.trackers import Trackers, check_tracker
from pipeline.training.trainer import Trainer
from pipeline.training.validation import check_sampling, sample_images

# Errors of a full disk, or of missing permissions.
UNWRITABLE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS),
    *(errno.EACCES, errno.EPERM, errno.EIO),
)


def training_loop(trainer: Trainer, monitor: Monitor | StepTimer, steps: int) -> None:
    """Train up to a number of steps, or until the monitor ends the run."""
    accelerator, task, network = trainer.accelerator, trainer.task, trainer.network
    for step in range(trainer.global_step, steps):
        if monitor.ended:
            return
        for batch in monitor.read(task.micro_batches(step, accelerator)):
            with accelerator.accumulate(network):
                t = task.timesteps(batch)
                eps = task.noise(batch)
                x_t = task.scheduler.add_noise(batch.x_0, eps, t)  # (5)
                keep = task.keep_captions(batch)
                captions = torch.where(keep, batch.captions, task.empty_caption)  # (14)
                prediction = predict(network, x_t, t, captions)
                losses = task.loss(prediction, batch, eps, t)  # (13)
                accelerator.backward(losses.mean())
            trainer.record(batch, losses)
        result = trainer.optimizer_step()  # clips the gradient, skips one that is not finite
        monitor.after_step(result)  # logs, validates, samples and saves when due


def train(config: Config, dry_run: bool = False) -> int:
    """Train as configured, from the newest checkpoint if there is one; return the exit code."""
    check_tracker(config.report_to)
    accelerator = start_accelerator(config)
    if dry_run:
        return print_plan(config, accelerator)
    run = RunFolder(config.folder)
    is_main = accelerator.is_main_process
    if is_main:
        check_push(config)
    with accelerator.main_process_first():
        run.create()
    with StopSignals() as stop, run.lock() if is_main else contextlib.nullcontext():
        checkpoint, finished = find_start(run, config, accelerator, TRAINING_FACTS)
        try:
            if checkpoint and finished:
                steps = f"step {checkpoint.name} of {config.train.steps}"
                accelerator.print(f"{run.folder} is finished at {steps}.\n{usage(run, config)}")
            else:
                with stop.raise_on_stop("before the first step"):
                    opened = open_stream(config, accelerator)
                with opened as stream:
                    run_training(config, accelerator, run, checkpoint, stop, stream)
            if not is_main:
                return 0
            with stop.raise_on_stop("before the model was pushed"):
                return publish(config, run)
        except Stopped as stopped:
            accelerator.print(f"{stopped}; run the same command to resume.")
            return stop.exit_code


def run_training(
    config: Config,
    accelerator: Accelerator,
    run: RunFolder,
    checkpoint: Path | None,
    stop: StopSignals,
    stream: Stream | None,
) -> None:
    """Build the task, train and save the result; Stopped after a stop request and a checkpoint."""
    # The other ranks of a machine find in the cache what the first one prepares.
    with stop.raise_on_stop("before the first step"), local_main_first(accelerator):
        task = TrainingTask.build(config, accelerator.device, checkpoint, checkpoint is None)
    task.stream = stream
    check_data(task, run, checkpoint)
    check_sampling(task.pipe, config.sample)
    trainer = Trainer(config, accelerator, task)
    if checkpoint:
        trainer.resume(checkpoint)
    if accelerator.is_main_process:
        prepare_run_folder(trainer, run, checkpoint)
    trackers = Trackers(accelerator, config)
    with trackers, Monitor(trainer, run, trackers, stop) as monitor:
        training_loop(trainer, monitor, config.train.steps)
    if monitor.stopped:
        place = f"after step {trainer.global_step} of {config.train.steps}"
        raise Stopped(f"Stopped ({stop.reason}) {place}")
    if accelerator.is_main_process:
        monitor.require_finite_validation()
        with stop.raise_on_stop("after the last step"):
            finish(config, trainer, run, stop)


def finish(config: Config, trainer: Trainer, run: RunFolder, stop: StopSignals) -> None:
    """Save the averaged weights as a loadable model, with its figures and, last, its card."""
    pipe, images = trainer.task.pipe, trainer.task.images
    sample, seconds = config.sample, trainer.seconds
    trainer.save_model(run)
    samples = sample_path(run, trainer.global_step)
    if trainer.best is not None:
        # The card shows the last samples, which must be the result's.
        with skip_on_failure(samples, ". Use fewer sample.prompts."):
            sample_images(pipe, sample, samples, stop)
    with skip_on_failure(run.figures / "training.png"):
        plot_training(run, images, pipe)
    strips = run.figures / "strips.png"
    with skip_on_failure(strips, ". Use fewer sample.prompts."):
        plot_strips(
            pipe,
            list(sample.prompts),
            set(images.all_captions),
            strips,
            w=sample.default_w,
            seed=sample.seed,
            steps=sample.steps,
            eta=sample.eta,
            columns=min(8, sample.steps),
        )
    facts = {"steps": trainer.global_step, "best_step": trainer.best and trainer.best["step"]}
    write_card(config, run, pipe, images, seconds, **facts, **base_model_facts(config))
    if samples.is_file():
        print(f"\nSamples: {samples}")
    print(f"Model card: {run.card}\n{usage(run, config)}")


def base_model_facts(config: Config) -> dict:
    """Return what the card says about the fine-tuned model, if there is one."""
    base = config.model.pretrained
    if base is None:
        return {}
    relation = "adapter" if config.train.method == "lora" else "finetune"
    facts = {"base_model": base, "base_license": license_of(base)}
    return facts | {"base_model_relation": relation}


def usage(run: RunFolder, config: Config) -> str:
    """Return the command that samples with a finished run."""
    prompt, w = config.sample.prompts[0], config.sample.default_w
    return f'Sample with it: direct-jump sample {run.folder} "{prompt}" --w {w:g} -o out.png'


def print_plan(config: Config, accelerator: Accelerator) -> int:
    """Print what a run would do, from a few timed steps, and save nothing but the prepared data."""
    with local_main_first(accelerator):
        task = TrainingTask.build(config, accelerator.device)
    check_sampling(task.pipe, config.sample)
    trainer = Trainer(config, accelerator, task)
    timer = StepTimer()
    with open_stream(config, accelerator) as task.stream:
        training_loop(trainer, timer, steps=1 + TIMED_STEPS)
    facts = training_facts(str(task.images.report), 0.0, **base_model_facts(config))
    build_card(config, facts)  # a card that cannot be written is an error now, not after the run
    accelerator.print(describe_run(trainer, timer.seconds[1:]))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Return 0 if done, 2 for bad input; if resumable 1 for a failure, 130 or 143 for a stop."""
    try:
        return train(*load(sys.argv[1:] if argv is None else argv))
    except (ConfigError, DataError, EmojiError, RunError, HubError) as error:
        message = str(error)
        code = getattr(error, "exit_code", 2)
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        message = (
            f"Cannot write {error.filename or 'a file'}: {error.strerror}. Check disk space and "
            "permissions, then run the same command to resume from the newest checkpoint."
        )
        code = 1
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        message = (
            f"Out of memory ({str(error).splitlines()[0]}). Raise train.accumulation, set "
            "train.gradient_checkpointing to true or lower data.resolution, then run the same "
            "command to resume."
        )
        code = 1
    for line in message.splitlines():
        print(f"error: {line}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
