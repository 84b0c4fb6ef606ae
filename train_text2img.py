"""Train a text-to-image diffusion model: `accelerate launch train_text2img.py [--config FILE] [--train.lr 3e-4 …]`.

The loop is the lecture's: a batch of captioned images, a timestep and noise each, the direct jump (5), caption dropout
(14), the network's prediction, its loss (13), a step. Everything random is a function of (seed, step, position in the
global batch), so running the same command again after an interruption repeats what was lost, on a CPU bit for bit.
"""

import contextlib
import errno
import functools
import math
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator, PartialState
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DistributedDataParallelKwargs,
    LoggerType,
    broadcast_object_list,
    gather_object,
    parse_flag_from_env,
)
from diffusers.utils import make_image_grid
from tqdm.auto import tqdm

from pipeline.config import Config, ConfigError, differences, load, load_file
from pipeline.data.emoji.catalogue import EmojiError
from pipeline.data.sampler import evenly_spaced
from pipeline.data.sources.rows import DataError
from pipeline.data.streaming import Stream, StreamPosition
from pipeline.diffusion.text_to_image import TextToImagePipeline
from pipeline.hardware import (
    is_out_of_memory,
    keep_freed_memory,
    mixed_precision,
    set_threads,
    skip_on_out_of_memory,
)
from pipeline.hub import push
from pipeline.hub.client import HubError
from pipeline.hub.figures import plot_strips, plot_training
from pipeline.hub.model_card import (
    TRAINING_FACTS,
    build_card,
    license_of,
    training_facts,
    write_card,
)
from pipeline.hub.push import check_push
from pipeline.models.build import parameter_count, trainable_parameters
from pipeline.models.ema import build_ema
from pipeline.models.lora import save_adapter
from pipeline.randomness import keep_caption, noise, timesteps
from pipeline.runs.checkpoints import CHECKPOINT_MANIFEST, read_checkpoint_manifest
from pipeline.runs.files import replace_folder, replace_text
from pipeline.runs.folder import Diverged, RunError, RunFolder
from pipeline.runs.state_files import load_state, save_state
from pipeline.runs.stop_signals import Stopped, StopSignals
from pipeline.training.distributed import SAMPLE_TIMEOUT, local_main_first
from pipeline.training.optimizers import (
    build_lr_schedule,
    build_optimizer,
    restore_optimizer,
    resume_lr_schedule,
)
from pipeline.training.task import TrainingTask, build_task
from pipeline.training.trackers import Trackers

FREE = (
    "name",
    "output",
    "report_to",
    "hub",
    "sample",
    "data.cache",
    "train.steps",
    "train.threads",
    "train.log_every",
    "train.validate_every",
    "train.save_every",
    "train.keep",
    "data.max_broken",
    "train.max_skipped",
    "train.accumulation",
    "train.gradient_checkpointing",
)  # what a resumed run may change
UNWRITABLE = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
)  # no room, or no leave to write
FEWER = ": give fewer sample.prompts"
GRID, HELD = 8, 16  # timesteps, and images of each split, of the validation grid


def open_stream(
    config: Config, accelerator: Accelerator
) -> contextlib.AbstractContextManager[Stream | None]:
    """This process's part of a streamed training split; None within where the data is prepared before."""
    if not config.data.streaming:
        return contextlib.nullcontext()
    return contextlib.closing(
        Stream(config.data, config.seed, accelerator.process_index, accelerator.num_processes)
    )


def batch_loss(
    unet, parts: TrainingTask, config: Config, step: int, slots: torch.Tensor
) -> torch.Tensor:
    """The training loss of the examples at `slots` of the global batch of one step, one value each (B,)."""
    seed, train, device = config.seed, config.train, parts.empty.device
    x_0, states = parts.examples(config, step, slots)
    t = timesteps(seed, step, slots, train.batch_size, len(parts.scheduler)).to(device)
    eps = noise(seed, step, slots, x_0.shape[1:]).to(device)
    x_t = parts.scheduler.add_noise(x_0, eps, t)  # (5)
    keep = keep_caption(seed, step, slots, config.data.caption_dropout).to(device)
    captions = torch.where(keep[:, None, None], states, parts.empty)  # (14)
    output = unet(
        x_t.to(memory_format=torch.channels_last),
        t,
        encoder_hidden_states=captions,
        return_dict=False,
    )[0]
    return parts.loss(config, output.float(), x_0, eps, t)


@torch.no_grad()
def validate(unet, parts: TrainingTask, config: Config, stop) -> dict:
    """Loss and x_0 error by timestep on a fixed grid of (image, t, eps), for the training and the held-out split."""
    T, record = len(parts.scheduler), {}
    for split, images, states in [
        ("train", parts.images, parts.states),
        ("held_out", parts.held_out, parts.held_states),
    ]:
        if images is None:
            continue
        rows = evenly_spaced(HELD, len(images))
        x_0, chosen = parts.encoded(images, rows), states[images.first[rows]].to(parts.empty.device)
        eps = noise(0, 0, rows, x_0.shape[1:]).to(x_0.device)
        loss, error = [], {}
        for k in ((torch.arange(GRID) + 0.5) * T / GRID).long().tolist():
            if stop:
                return {}
            t = torch.full((len(rows),), k, device=x_0.device)
            x_t = parts.scheduler.add_noise(x_0, eps, t)
            output = unet(x_t, t, encoder_hidden_states=chosen, return_dict=False)[0].float()
            loss.append(parts.loss(config, output, x_0, eps, t).mean().item())
            error[k] = (parts.scheduler.predict_x_0(output, t, x_t) - x_0).square().mean().item()
        record[f"{split}_loss"], record[f"{split}_x_0_error"] = sum(loss) / GRID, error
    return record


def try_sampling(parts: TrainingTask, config: Config) -> None:
    """ConfigError where the run's model could not draw its samples, before the first step."""
    sample = config.sample
    try:
        parts.pipe.denoise(
            sample.prompts[0], w=sample.w[0], num_inference_steps=sample.steps, eta=sample.eta
        )
    except ValueError as error:
        raise ConfigError(f"sample: {error}") from error


def draw(pipe: TextToImagePipeline, config: Config, path: Path, stop) -> None:
    """Each prompt (a column) at each w (a row) from the same noise, written as one picture."""
    pipe.set_progress_bar_config(disable=True)
    sample, images = config.sample, []

    def ask(pipe, *_):
        pipe._interrupt = bool(stop)
        return {}

    for w in sample.w:
        images += pipe(
            list(sample.prompts),
            w=w,
            seed=sample.seed,
            num_inference_steps=sample.steps,
            eta=sample.eta,
            callback_on_step_end=ask,
        ).images
        if stop:
            return
    make_image_grid(images, rows=len(sample.w), cols=len(sample.prompts)).save(path)


@contextlib.contextmanager
def averaged(ema, unet):
    """The network with its moving average for weights, which change places: nothing is copied."""

    def exchange():
        for weight, mean in zip(trainable_parameters(unet), ema.shadow_params, strict=True):
            weight.data, mean.data = mean.data, weight.data

    exchange()
    try:
        yield unet.eval()
    finally:
        exchange()
        unet.train()


def resume_point(run: RunFolder, config: Config) -> Path | None:
    """The checkpoint to go on from, None for a new run; RunError where settings changed, or what lies there would be lost."""
    checkpoint = run.newest()
    if checkpoint is None:
        foreign = run.card.is_file() and not (run.folder / TRAINING_FACTS).is_file()
        if run.has_model or foreign:
            held = (
                "a model, and no checkpoint to go on from"
                if run.has_model
                else f"a {run.card.name} that no run has written"
            )
            raise RunError(
                f"{run.folder} holds {held}, expected a new folder or a run's: give the new run another --name, "
                "or move the folder away"
            )
        return None
    try:
        before = load_file(run.config)
    except ConfigError as error:
        reasons = "; ".join(str(error).splitlines())
        raise RunError(
            f"{run.config}, which the run was begun with, does not fit this version ({reasons}): mend it there, "
            "or give the new run another --name"
        ) from error
    if changed := differences(before, config, FREE):
        raise RunError(
            f"{run.folder} was begun with other settings: {'; '.join(changed)}. "
            "Undo that, or give the new run another --name"
        )
    return checkpoint


def train(config: Config, dry_run: bool = False) -> int:
    """Train as configured, from the newest checkpoint if there is one; the exit code."""
    known = [str(tracker.value) for tracker in LoggerType if tracker != LoggerType.ALL]
    if config.report_to and config.report_to not in known:
        raise ConfigError(f"report_to must be one of {', '.join(known)}, got {config.report_to!r}")
    if config.report_to and config.report_to not in [
        str(tracker.value) for tracker in get_available_trackers()
    ]:
        raise ConfigError(
            f"report_to {config.report_to!r} is not installed here: pip install {config.report_to}"
        )
    wanted = parse_flag_from_env("ACCELERATE_USE_CPU")  # of accelerate launch --cpu
    cpu = wanted or not torch.accelerator.is_available()  # told, torchrun's ranks find each other
    device = PartialState(cpu=cpu, timeout=SAMPLE_TIMEOUT).device
    precision = mixed_precision(config.train.precision, device)
    if precision == "fp16" and device.type == "cpu":
        raise ConfigError("train.precision must be auto, no or bf16 on a CPU, got fp16")
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=precision,
        log_with=config.report_to,
        gradient_accumulation_steps=config.train.accumulation,
        project_dir=config.folder,
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )  # no second copy of them
    set_threads(config.train.threads, accelerator)
    keep_freed_memory()
    share = config.train.batch_size // config.train.accumulation
    if share % accelerator.num_processes:
        raise ConfigError(
            f"train.batch_size / train.accumulation must be a multiple of the {accelerator.num_processes} "
            f"processes, got {share}"
        )
    if dry_run:
        return rehearse(config, accelerator)
    run, main = RunFolder(config.folder), accelerator.is_main_process
    if main:
        check_push(config)
    with accelerator.main_process_first():
        run.create()
    with StopSignals() as stop, run.lock() if main else contextlib.nullcontext():
        checkpoint, finished = broadcast_object_list(
            [resume_point(run, config), run.finished] if main else [None, None]
        )
        if (
            checkpoint and not (checkpoint / CHECKPOINT_MANIFEST).is_file()
        ):  # one process has decided for all
            raise RunError(
                f"process {accelerator.process_index} does not see {checkpoint}, expected `output` on a disk "
                "that all machines share: put the run there"
            )
        start = int(checkpoint.name) if checkpoint else 0
        if start > config.train.steps and not finished:
            raise RunError(
                f"{run.folder} is at step {start} already, got train.steps {config.train.steps}: give at least "
                f"{start}, or a new run another --name"
            )
        try:
            if start >= config.train.steps and finished:
                accelerator.print(
                    f"{run.folder} is finished at step {start} of {config.train.steps}.\n{usage(run, config)}"
                )
                return publish(config, run, stop) if main else 0
            with stop.raise_on_stop("before the first step"):
                opened = open_stream(config, accelerator)
            with opened as stream:
                return loop(config, accelerator, run, checkpoint, stop, stream)
        except Stopped as said:
            accelerator.print(f"{said}; run the same command to go on.")
            return stop.exit_code


class Outcome(NamedTuple):
    """What a training step came to."""

    norm: float  # of the gradient, before it was clipped
    lr: float
    seen: list[
        tuple[torch.Tensor, torch.Tensor]
    ]  # slots and losses of this process's examples, a pair a micro-step

    @property
    def sound(self) -> bool:
        """Whether its gradient was finite, so that it was taken."""
        return math.isfinite(self.norm)


class Trainer:
    """The network in training: its optimiser, learning rate, average and counters, all that a checkpoint keeps beside it."""

    def __init__(self, config: Config, accelerator: Accelerator, parts: TrainingTask):
        self.config, self.accelerator, self.parts = config, accelerator, parts
        optimizer = build_optimizer(parts.unet, config.train)
        self.schedule = build_lr_schedule(optimizer, config.train)
        self.ema = build_ema(parts.unet, config.train.ema)
        self.unet, self.optimizer = accelerator.prepare(parts.unet, optimizer)
        self.weights = trainable_parameters(parts.unet)
        self.ema.to(accelerator.device)
        self.done, self.skipped, self.in_a_row = (
            0,
            0,
            0,
        )  # steps; those without a finite gradient; the newest of these
        self.losses, self.began = [], time.monotonic()  # losses: since the last line of the log

    @property
    def seconds(self) -> float:
        """How long it has trained, earlier sittings too."""
        return time.monotonic() - self.began

    def step(
        self, reading: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    ) -> Outcome:
        """Learn from the next global batch; a step whose gradient is not finite is skipped.

        reading: makes the context in which each micro-batch is read.
        """
        train, accelerator, seen = self.config.train, self.accelerator, []
        share = train.batch_size // train.accumulation
        for micro in range(train.accumulation):
            slots = (
                torch.arange(accelerator.process_index, share, accelerator.num_processes)
                + micro * share
            )
            with accelerator.accumulate(self.unet):
                with reading():
                    each = batch_loss(self.unet, self.parts, self.config, self.done, slots)
                accelerator.backward(each.mean())
                seen.append((slots, each.detach()))
        norm = accelerator.clip_grad_norm_(
            self.weights, train.clip
        )  # of the gradients of all processes
        norm, *means = torch.stack(
            [norm, *(each.mean() for _, each in seen)]
        ).tolist()  # copies apart, the wait for a GPU
        taken = Outcome(norm, self.optimizer.param_groups[-1]["lr"], seen)
        if taken.sound:
            self.optimizer.step()
            self.ema.step(self.weights)
        elif accelerator.scaler is not None:
            accelerator.scaler.update()  # which lowers its scale
        self.optimizer.zero_grad()
        self.schedule.step()
        self.done, self.skipped = self.done + 1, self.skipped + (not taken.sound)
        self.in_a_row = 0 if taken.sound else self.in_a_row + 1
        self.losses += filter(math.isfinite, means)
        return taken

    def mean_loss(self) -> float:
        """The mean loss of all processes since it was last asked for, nan where none was finite."""
        mean = self.accelerator.reduce(
            torch.tensor(self.losses, device=self.accelerator.device).mean(), "mean"
        )
        self.losses = []
        return mean.item()

    def state_dict(self) -> dict:
        """What `resume` goes on from, of all processes: each has to ask for it."""
        scaler, stream = self.accelerator.scaler, self.parts.stream
        state = {
            "step": self.done,
            "skipped": self.skipped,
            "in_a_row": self.in_a_row,
            "seconds": self.seconds,
        }
        return {
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "ema": self.ema.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else {},
            "state": state,
            "losses": gather_object([self.losses]),
            "streams": gather_object([stream.state_dict()]) if stream is not None else [],
        }

    def resume(self, checkpoint: Path) -> tuple[float, float]:
        """Go on where a checkpoint is; train.lr as it was, and as it is by this run's plan."""
        saved = load_state(checkpoint, "trainer")
        restore_optimizer(self.optimizer, saved["optimizer"])
        rates = resume_lr_schedule(self.schedule, saved["schedule"])
        self.ema.load_state_dict(saved["ema"])
        self.ema.shadow_params = [
            torch.empty_like(weight).copy_(
                mean
            )  # as the weights lie, or it takes torch's slow path
            for weight, mean in zip(self.weights, self.ema.shadow_params, strict=True)
        ]
        if self.accelerator.scaler is not None and saved.get(
            "scaler"
        ):  # none from a machine that computes in another precision
            self.accelerator.scaler.load_state_dict(saved["scaler"])
        state = saved["state"]
        self.done, self.skipped, self.in_a_row = state["step"], state["skipped"], state["in_a_row"]
        self.began -= state["seconds"]
        self.losses = of_rank(
            saved["losses"] if "losses" in saved else [state["losses"]], self.accelerator
        )
        if self.parts.stream is not None:
            self.parts.stream.load_state_dict(of_rank(saved["streams"], self.accelerator))
        return rates


def of_rank(saved: list, accelerator: Accelerator):
    """What a checkpoint keeps for each process, of this one."""
    return saved[accelerator.process_index % len(saved)]


def loop(
    config: Config,
    accelerator: Accelerator,
    run: RunFolder,
    checkpoint: Path | None,
    stop,
    stream: Stream | None,
) -> int:
    """The training loop, from a checkpoint or from nothing to the last step; the exit code."""
    main, steps, batch = accelerator.is_main_process, config.train.steps, config.train.batch_size
    with (
        stop.raise_on_stop("before the first step"),
        local_main_first(accelerator),
    ):  # the others find in the cache what it prepares
        parts = build_task(config, checkpoint, accelerator.device, again=checkpoint is None)
    parts.stream = stream
    compare_pictures(parts, config, run, checkpoint)
    try_sampling(parts, config)
    trainer = Trainer(config, accelerator, parts)
    rates = trainer.resume(checkpoint) if checkpoint else None
    if main:
        begin(trainer, run, checkpoint, rates)
    trackers = Trackers(accelerator, config)
    busy, counted = 0.0, 0  # seconds, and steps, since the last line of the log
    bar = tqdm(
        total=steps,
        initial=trainer.done,
        disable=not main,
        desc=config.name,
        unit="step",
        dynamic_ncols=True,
    )
    if main and trainer.done:
        show(trainer, run, trackers, stop)
    with trackers, bar:
        while trainer.done < steps:
            began = time.perf_counter()
            taken = trainer.step(
                functools.partial(kept, trainer, run, stop, stream and stream.place)
            )
            step, last = trainer.done, trainer.done == steps
            if not taken.sound:
                tell_skipped(trainer, run, taken)
            busy, counted = busy + time.perf_counter() - began, counted + 1
            bar.update()
            if last or step % config.train.log_every == 0:
                mean = trainer.mean_loss()
                record = {
                    "step": step,
                    "loss": mean if math.isfinite(mean) else None,
                    "grad_norm": taken.norm if taken.sound else None,
                    "lr": taken.lr,
                    "skipped": trainer.skipped,
                    "images_per_s": batch * counted / busy,
                    "seconds": trainer.seconds,
                }
                busy, counted = 0.0, 0
                bar.set_postfix(loss=f"{mean:.4f}")
                if main:
                    run.log(**record)
                trackers.log(step, record)
            ended = stopped(stop, accelerator)
            if not ended and (
                last or step % config.train.validate_every == 0 or step % config.sample.every == 0
            ):
                if main:
                    show(trainer, run, trackers, stop)
                ended = stopped(stop, accelerator)
            if ended or last or step % config.train.save_every == 0:
                save(trainer, run)
            if ended:
                bar.close()
                accelerator.print(
                    f"Stopped ({stop.reason}) after step {step} of {steps}; run the same command to go on."
                )
                return stop.exit_code
    if main:
        with stop.raise_on_stop("after the last step"):
            finish(trainer, run)
    return publish(config, run, stop) if main else 0


def compare_pictures(
    parts: TrainingTask, config: Config, run: RunFolder, checkpoint: Path | None
) -> None:
    """Refuse pictures that are not the same on all machines, DataError, or not those that the run was begun on, RunError."""
    read = parts.fingerprint
    if len(set(gather_object([read]))) > 1:
        raise DataError(
            f"the processes read different pictures or captions in {config.data.source}, expected the same on "
            "all machines: copy those of one to the others"
        )
    if checkpoint and (was := read_checkpoint_manifest(checkpoint).get("data", read)) != read:
        raise RunError(
            f"{run.folder} was begun on other pictures or captions: the fingerprint of {config.data.source} "
            f"was {was} and is now {read}. Put them back, or give the new run another --name"
        )


def begin(
    trainer: Trainer, run: RunFolder, checkpoint: Path | None, rates: tuple[float, float] | None
) -> None:
    """Clear away what the coming steps write anew, and say what they are; rates: train.lr before the checkpoint and after."""
    steps, now = trainer.config.train.steps, trainer.accelerator.num_processes
    run.card.unlink(missing_ok=True)  # a run's own: until it is finished again
    run.rewind(trainer.done)
    if (
        trainer.done == steps
    ):  # nothing is left but its end, whose samples may be of other prompts now
        sample_path(run, steps).unlink(missing_ok=True)
    replace_text(run.config, trainer.config.to_yaml())
    print(
        f"{trainer.parts.images.report}\n{parameter_count(trainer.weights) / 1e6:.1f} M weights to train;",
        f"going on from step {trainer.done}" if checkpoint else "a new run",
    )
    if checkpoint and (before := read_checkpoint_manifest(checkpoint)["processes"]) != now:
        print(
            f"The checkpoint is of {before} process(es), now there are {now}: the batches are the same, their sums are rounded "
            "otherwise"
        )
    if rates and rates[0] != rates[1]:
        print(
            f"With {steps} steps the schedule goes on at a learning rate of {rates[1]:.3g}, where it was {rates[0]:.3g}"
        )


def save(trainer: Trainer, run: RunFolder) -> None:
    """A checkpoint of the step that is done, by all processes together."""
    config, accelerator, state = trainer.config, trainer.accelerator, trainer.state_dict()

    def write(folder):
        trainer.parts.save(config, folder)
        save_state(folder, "trainer", state)

    if accelerator.is_main_process:
        run.save(
            trainer.done,
            write,
            config.train.keep,
            processes=accelerator.num_processes,
            data=trainer.parts.fingerprint,
        )
    accelerator.wait_for_everyone()


def show(trainer: Trainer, run: RunFolder, trackers: Trackers, stop) -> None:
    """The check and the picture that are due at a step; those that a stop or a death cut short are made up on resuming."""
    config, parts, step = trainer.config, trainer.parts, trainer.done
    last, path = step == config.train.steps, sample_path(run, step)
    due = step % config.train.validate_every == 0 or last
    if due and not any(
        "train_loss" in record for record in run.history() if record["step"] == step
    ):
        record = {}
        with averaged(trainer.ema, parts.unet), skip_on_out_of_memory(f"the check of step {step}"):
            record = validate(parts.unet, parts, config, stop)
        if record:
            run.log(step=step, **record)
            trackers.log(step, record)
    if (step % config.sample.every == 0 or last) and not path.is_file() and not stop:
        with averaged(trainer.ema, parts.unet), skip_on_out_of_memory(path, FEWER):
            draw(parts.pipe, config, path, stop)
        trackers.show(step, path)


@contextlib.contextmanager
def kept(trainer: Trainer, run: RunFolder, stop, place: StreamPosition | None):
    """Save the steps before a stream fails for good, or is waited for when a stop is asked for.

    place: of the stream, where the step that is next began. Several processes cannot agree on it any more, and a step that is
    saved already is not saved again.
    """
    stream, done = trainer.parts.stream, trainer.done
    if stream is None or trainer.accelerator.num_processes > 1:
        yield
        return
    try:
        with stop.raise_on_stop(f"after step {done} of {trainer.config.train.steps}"):
            yield
    except (DataError, Stopped) as error:
        if not done:
            raise
        stream.place = place
        if (newest := run.newest()) is None or int(newest.name) != done:
            save(trainer, run)
        if isinstance(error, Stopped):
            raise
        raise type(error)(
            f"{error}\nstep {done} is saved: the same command goes on from it"
        ) from error


def tell_skipped(trainer: Trainer, run: RunFolder, taken: Outcome) -> None:
    """Say for which examples of all processes a step was skipped; Diverged where too many were in a row."""
    step, config, bad = trainer.done, trainer.config, gather_object(spoilt(trainer, taken))
    if trainer.accelerator.is_main_process:
        why = f"no finite loss for {'; '.join(bad)}" if bad else "its gradient is not finite"
        tqdm.write(f"step {step} is skipped: {why}")
        run.log(step=step, no_finite_loss=bad)
    if trainer.in_a_row >= config.train.max_skipped:
        raise Diverged(
            f"{trainer.in_a_row} steps in a row, up to step {step}, had no finite gradient; the last checkpoint "
            f"is kept: lower train.lr (now {config.train.lr:g}) in a run of another --name"
        )


def spoilt(trainer: Trainer, taken: Outcome) -> list[str]:
    """Which of this process's examples of the step that is done had no finite loss: their names and timesteps."""
    config, parts, step = trainer.config, trainer.parts, trainer.done - 1
    bad = [int(slot) for slots, each in taken.seen for slot in slots[~each.isfinite().cpu()]]
    if not bad:
        return []
    t = timesteps(config.seed, step, bad, config.train.batch_size, len(parts.scheduler)).tolist()
    return [f"{name} at t = {k}" for name, k in zip(parts.names(config, step, bad), t, strict=True)]


def sample_path(run: RunFolder, step: int) -> Path:
    """Where the samples of a step are drawn."""
    return run.samples / f"{step:06d}.png"


def publish(config: Config, run: RunFolder, stop) -> int:
    """Push a finished run where its settings say, until a stop is asked for; the exit code."""
    with stop.raise_on_stop("before the model was pushed"):
        return push.publish(config, run)


def stopped(stop, accelerator: Accelerator) -> bool:
    """Has any process been asked to stop? All of them get the same answer, and end with the same exit code."""
    if accelerator.num_processes == 1:
        return bool(stop)
    code = int(accelerator.gather(torch.tensor([stop.exit_code], device=accelerator.device)).max())
    if code:
        stop.reason, stop.exit_code = stop.reason or "as another process", code
    return bool(code)  # not `stop`: what has come meanwhile is heard by all at the next step


def finish(trainer: Trainer, run: RunFolder) -> None:
    """Leave the averaged weights as a loadable pipeline, with its card and figures."""
    config, parts, seconds = trainer.config, trainer.parts, trainer.seconds
    pipe = parts.pipe
    trainer.ema.copy_to(trainer.weights)
    parts.unet.eval()
    if config.train.method == "lora":
        replace_folder(run.adapter, lambda folder: save_adapter(parts.unet, folder))
    else:
        replace_folder(
            run.pipeline, lambda folder: pipe.save_pretrained(folder, safe_serialization=True)
        )
    with skip_on_out_of_memory(run.figures / "training.png"):
        plot_training(run, parts.images, pipe)
    sample, strips, last = (
        config.sample,
        run.figures / "strips.png",
        sample_path(run, config.train.steps),
    )
    with skip_on_out_of_memory(strips, FEWER):
        plot_strips(
            pipe,
            list(sample.prompts),
            set(parts.images.all_captions),
            strips,
            w=sample.default_w,
            seed=sample.seed,
            steps=sample.steps,
            eta=sample.eta,
            columns=min(8, sample.steps),
        )
    write_card(config, run, pipe, parts.images, seconds, **base_of(config))
    shown = f"{last} shows its samples, " if last.is_file() else ""
    print(f"\n{shown}{run.card} is its card.\n{usage(run, config)}")


def base_of(config: Config) -> dict:
    """What the card says of the model that was tuned, if one was."""
    if config.model.pretrained is None:
        return {}
    return {
        "base_model": config.model.pretrained,
        "base_license": license_of(config.model.pretrained),
        "base_model_relation": "adapter" if config.train.method == "lora" else "finetune",
    }


def usage(run: RunFolder, config: Config) -> str:
    """The line that draws a picture with a finished run."""
    sample = config.sample
    return f'Draw with it:  direct-jump sample {run.folder} "{sample.prompts[0]}" --w {sample.default_w:g} -o out.png'


def rehearse(config: Config, accelerator: Accelerator) -> int:
    """`--dry_run`: the plan, from one timed step; nothing is kept but the prepared data."""
    with local_main_first(accelerator):
        parts = build_task(config, None, accelerator.device)
    try_sampling(parts, config)
    trainer = Trainer(config, accelerator, parts)
    with open_stream(config, accelerator) as parts.stream:
        trainer.step()  # which warms up
        began = time.perf_counter()
        trainer.step()
    seconds = time.perf_counter() - began
    build_card(config, training_facts(str(parts.images.report), 0.0, **base_of(config)))
    memory = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == 'darwin' else 2**20):.1f} GiB"
    if accelerator.device.type == "cuda":
        memory += f" and {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB of each GPU's"
    accelerator.print(
        config.to_yaml()
        + f"\n{parts.images.report}\n{parameter_count(trainer.weights):,} weights to train\n"
        f"{config.train.steps} steps of {config.train.batch_size} images, {seconds:.3f} s each: about "
        f"{seconds * config.train.steps / 60:.1f} minutes\n{memory} of memory at most so far"
    )
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command line: 0 done, 1 failed and resumable, 2 bad input, 130 or 143 stopped and resumable."""
    try:
        return train(*load(sys.argv[1:] if argv is None else argv))
    except (ConfigError, DataError, EmojiError, RunError, HubError) as error:
        print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return getattr(error, "exit_code", 2)
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        print(
            f"error: {error.filename or 'a file'}: {error.strerror}, expected room and leave to write: mend that, then run the "
            "same command, which goes on from its newest checkpoint",
            file=sys.stderr,
        )
        return 1
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        print(
            f"error: there is not enough memory ({str(error).splitlines()[0]}), expected room for one micro-batch: raise "
            "train.accumulation, set train.gradient_checkpointing true or lower data.resolution; the same command goes on from "
            "its newest checkpoint, where there is one",
            file=sys.stderr,
        )
        return 1


if __name__ == "__main__":
    sys.exit(main())
