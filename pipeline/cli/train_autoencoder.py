"""`direct-jump train-autoencoder`: train the autoencoder whose latents a diffusion model learns."""

import sys
from pathlib import Path

from accelerate import Accelerator
from tqdm.auto import tqdm

from pipeline.cli.runner import run_cli
from pipeline.config import AutoencoderConfig, ConfigError, load
from pipeline.data.dataset import CaptionedImages, load_splits
from pipeline.evaluation.retrieval import bootstrap_mean
from pipeline.hub.autoencoder_card import write_autoencoder_card
from pipeline.hub.model_card import TRAINING_FACTS
from pipeline.models.build import parameter_count
from pipeline.runs.checkpoints import read_checkpoint_manifest
from pipeline.runs.files import replace_folder, replace_text
from pipeline.runs.folder import Diverged, RunError, RunFolder
from pipeline.runs.results import Mean
from pipeline.runs.stop_signals import Stopped, StopSignals
from pipeline.training.autoencoder import AutoencoderTrainer, StepResult
from pipeline.training.distributed import start_accelerator
from pipeline.training.resume import find_start
from pipeline.training.trackers import Trackers, check_tracker


def train(config: AutoencoderConfig, dry_run: bool = False) -> int:
    """Train as configured, from the newest checkpoint if there is one; return the exit code."""
    check_tracker(config.report_to)
    accelerator = start_accelerator(config)
    if accelerator.num_processes > 1:
        raise ConfigError("An autoencoder trains in one process. Start it without a launcher.")
    if dry_run:
        print_plan(config, accelerator)
        return 0
    run = RunFolder(config.folder)
    run.create()
    with StopSignals() as stop, run.lock():
        try:
            run_training(config, accelerator, run, stop)
        except Stopped as stopped:
            print(f"{stopped}; run the same command to resume.")
            return stop.exit_code
    return 0


def run_training(
    config: AutoencoderConfig, accelerator: Accelerator, run: RunFolder, stop: StopSignals
) -> None:
    """Train, save the result and its card; Stopped after a stop request and a checkpoint."""
    checkpoint, finished = find_start(run, config, accelerator, TRAINING_FACTS)
    if finished:
        print(f"{run.folder} is finished.\n{usage(run)}")
        return
    with stop.raise_on_stop("before the first step"):
        images, held_out = load_splits(config.data, retry_failed=checkpoint is None)
    check_images(images, config, checkpoint)
    trainer = AutoencoderTrainer(config, accelerator, images)
    if checkpoint:
        trainer.resume(checkpoint)
    run.card.unlink(missing_ok=True)  # the card marks a finished run
    run.rewind(trainer.global_step)
    replace_text(run.config, config.to_yaml())
    print(f"{images.report}\n{describe_start(trainer)}")
    with Trackers(accelerator, config) as trackers:
        training_loop(trainer, run, trackers, stop, held_out)
    with stop.raise_on_stop("after the last step"):
        trainer.calibrate()
        replace_folder(run.autoencoder, trainer.save_model)
        results = measure_splits(trainer, images, held_out)
        vae = trainer.vae.eval()
        write_autoencoder_card(config, run, vae, images, held_out, results, trainer.seconds)
        print(f"Model card: {run.card}\n{usage(run)}")


def training_loop(
    trainer: AutoencoderTrainer,
    run: RunFolder,
    trackers: Trackers,
    stop: StopSignals,
    held_out: CaptionedImages | None,
) -> None:
    """Train to the last step: log, measure the held-out PSNR and save when due."""
    train = trainer.config.train
    bar = tqdm(
        total=train.steps,
        initial=trainer.global_step,
        desc=trainer.config.name,
        unit="step",
        dynamic_ncols=True,
    )

    def is_due(every: int) -> bool:
        return trainer.global_step % every == 0 or trainer.global_step == train.steps

    def log(**record: object) -> None:
        run.log(step=trainer.global_step, **record)
        trackers.log(trainer.global_step, record)

    with bar:
        while trainer.global_step < train.steps:
            result = trainer.step()
            bar.update()
            check_finite(trainer, result)
            if is_due(train.log_every) and result.is_finite:
                bar.set_postfix(psnr=f"{-result.loss:.2f}")
                log(
                    psnr=-result.loss,
                    grad_norm=result.grad_norm,
                    lr=result.lr,
                    skipped=trainer.skipped,
                    seconds=trainer.seconds,
                )
            if is_due(train.validate_every) and held_out is not None:
                log(held_out_psnr=trainer.measure(held_out).mean().item())
            stopped = bool(stop)
            if stopped or is_due(train.save_every):
                fingerprint = trainer.images.fingerprint
                step = trainer.global_step
                run.save(step, trainer.save, train.keep, processes=1, data=fingerprint)
            if stopped:
                raise Stopped(f"Stopped ({stop.reason}) after step {trainer.global_step}")


def measure_splits(
    trainer: AutoencoderTrainer, images: CaptionedImages, held_out: CaptionedImages | None
) -> dict[str, Mean]:
    """Return the PSNR in dB of images of both splits, and of each style of the held-out one."""
    found = {"training": trainer.measure(images)}
    if held_out is not None:
        found["held out"] = trainer.measure(held_out)
        styles = [row.get("style") for row in held_out.metadata]
        for style in sorted({style for style in styles if style}):
            rows = [row for row, each in enumerate(styles) if each == style]
            found[f"held out, {style} style"] = trainer.measure(held_out, rows)
    return {name: bootstrap_mean(values) for name, values in found.items()}


def check_finite(trainer: AutoencoderTrainer, result: StepResult) -> None:
    """Report a skipped step; Diverged after train.max_skipped in a row."""
    if result.is_finite:
        return
    tqdm.write(f"step {trainer.global_step} is skipped: no finite gradient")
    if trainer.consecutive_skips >= trainer.config.train.max_skipped:
        raise Diverged(
            f"No finite gradient in {trainer.consecutive_skips} steps. Lower train.lr and start "
            "again with another --name."
        )


def check_images(
    images: CaptionedImages, config: AutoencoderConfig, checkpoint: Path | None
) -> None:
    """Raise RunError if the images changed since the checkpoint was saved."""
    before = read_checkpoint_manifest(checkpoint)["data"] if checkpoint else images.fingerprint
    if before != images.fingerprint:
        raise RunError(
            f"{config.folder} was started on other images than {config.data.source} now has. "
            "Restore the data, or choose another --name."
        )


def describe_start(trainer: AutoencoderTrainer) -> str:
    """Return what is trained, and from which step."""
    step = trainer.global_step
    start = f"resuming from step {step}" if step else "a new run"
    return f"{parameter_count(trainer.weights) / 1e6:.2f} M weights to train; {start}"


def print_plan(config: AutoencoderConfig, accelerator: Accelerator) -> None:
    """Print what a run would do, from a few timed steps, and save only the prepared data."""
    images, held_out = load_splits(config.data)
    trainer = AutoencoderTrainer(config, accelerator, images)
    held = 0 if held_out is None else len(held_out)
    print(f"{images.report}\n{held} held-out images\n{describe_start(trainer)}")
    trainer.step()
    start = trainer.seconds
    for _ in range(3):
        trainer.step()
    seconds = (trainer.seconds - start) / 3
    minutes = config.train.steps * seconds / 60
    print(f"{config.train.steps} steps of {seconds:.2f} s: {minutes:.0f} min")


def usage(run: RunFolder) -> str:
    """Return the command that trains a model in the latents of a finished run."""
    return f"Train in its latents: direct-jump train --model.autoencoder {run.folder}"


def main(argv: list[str] | None = None) -> int:
    """Return 0 if done, 1 for a failure that resumes, 2 for bad input, 130 or 143 for a stop."""
    arguments = sys.argv[1:] if argv is None else argv
    return run_cli(lambda: train(*load(arguments, AutoencoderConfig)), "nothing was lost.")
