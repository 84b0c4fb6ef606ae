"""Train a text-to-image diffusion model: `accelerate launch train_text2img.py [--config FILE] [--train.lr 3e-4 …]`.

The loop is the lecture's: a batch of captioned images, a timestep and noise each, the direct jump (5), caption dropout
(14), the network's prediction, its loss (13), a step. Everything random is a function of (seed, step, position in the
global batch), so running the same command again after an interruption repeats what was lost, on a CPU bit for bit.
"""

import contextlib
import errno
import math
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

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
from diffusers import UNet2DConditionModel
from diffusers.utils import make_image_grid
from tqdm.auto import tqdm

from pipeline import card, data, emoji, hub, latents, losses, models, randomness
from pipeline import config as settings
from pipeline import run as runs
from pipeline.config import Config, ConfigError
from pipeline.machine import DRAWING, keep_freed_memory, local_main_first, of_memory, set_threads, spared
from pipeline.optim import lr_schedule, optimizer_of, restore, resume_schedule
from pipeline.patches import PatchAutoencoder
from pipeline.scheduler import DDPMScheduler
from pipeline.stream import Stream
from pipeline.text_to_image import TextToImagePipeline
from pipeline.trackers import Trackers

FREE = ("name", "output", "report_to", "hub", "sample", "data.cache", "train.steps", "train.threads", "train.log_every",
        "train.validate_every", "train.save_every", "train.keep", "data.max_broken", "train.max_skipped", "train.accumulation",
        "train.gradient_checkpointing")  # fmt: skip  # what a resumed run may change
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)  # no room, or no leave to write
FEWER = ": give fewer sample.prompts"
GRID, HELD = 8, 16  # timesteps, and images of each split, of the validation grid


@dataclass
class Parts:
    """What a step needs: the images with their caption states, and the models."""

    images: data.CaptionedImages  # of a stream its first rows
    held_out: data.CaptionedImages | None
    states: torch.Tensor  # (M, L, D) on the CPU, one row a caption of the training split
    held_states: torch.Tensor | None  # on the CPU
    empty: torch.Tensor  # (1, L, D) where the network is, the empty caption
    pipe: TextToImagePipeline
    latents: latents.Latents | None  # of the training split, where an autoencoder is worth asking only once
    encode: data.CaptionStates  # of a stream's captions
    stream: Stream | None = None

    @property
    def unet(self) -> UNet2DConditionModel:
        """The network that trains."""
        return self.pipe.unet

    @property
    def scheduler(self) -> DDPMScheduler:
        """The noise process."""
        return self.pipe.scheduler

    def encoded(self, images: data.CaptionedImages, rows, flip: torch.Tensor | None = None,
                noise: torch.Tensor | None = None) -> torch.Tensor:  # fmt: skip
        """Images by row as the network sees them, (B, c, h, w), mirrored where `flip` (B,) says so; noise: as `encode` has it."""
        pixels = data.as_float(images.images[rows].to(self.empty.device))
        if flip is not None:
            pixels = torch.where(flip.to(pixels.device)[:, None, None, None], pixels.flip(-1), pixels)
        return self.pipe.encode(pixels, noise)

    def loss(self, config: Config, output, x_0, eps, t) -> torch.Tensor:
        """The configured loss of a batch, one value each (B,)."""
        return losses.training_loss(self.scheduler, output, x_0, eps, t, config.train.weighting, config.train.gamma)


def prepare(config: Config, checkpoint: Path | None, device: torch.device, again: bool = False) -> Parts:
    """Load or build the models, read the data, encode its captions: what may be misspelt is looked for before what takes long.

    again: whether pictures that could not be read are tried anew.
    """
    noise = [f"diffusion.{name}" for name, value in vars(config.diffusion).items() if value is not None]
    if config.train.method == "lora" and noise and checkpoint is None:
        raise ConfigError(f"an adapter is drawn with its model's own noise process: leave {', '.join(noise)} out")
    base = None if config.model.pretrained is None else pretrained(config)
    tokenizer, encoder = (base.tokenizer, base.text_encoder) if base else models.text_encoder(config.model.text_encoder)
    length = (base.config.caption_length or tokenizer.model_max_length) if base else config.data.caption_length
    if length > (limit := getattr(encoder.config, "max_position_embeddings", None) or length):
        where = "data.caption_length" if base is None else f"the tokenizer's model_max_length of {config.model.pretrained}"
        raise ConfigError(f"{where} must be at most {limit}, the text encoder's positions, got {length}")
    if config.train.method == "lora":
        torch.manual_seed(config.seed)  # the adapter's first weights
        models.adapt(base.unet, config.lora)
    images, held_out = data.load_splits(config.data, again)
    images = images.measured(tokenizer, length)
    encode = lambda captions: data.encode_captions(captions, tokenizer, encoder, length, config.data.cache, device)
    states = encode(images.all_captions)
    whitening = models.saved_whitening(checkpoint) if checkpoint else None
    if whitening is None:
        whitening = base.whitening if base else models.whitening(config.model, states)
    white = whitening.whiten_ if whitening else lambda raw: raw
    held = white(encode(held_out.all_captions)) if held_out else None
    states, empty = white(states), white(encode([""]))
    torch.manual_seed(config.seed)  # the network's first weights
    unet = base.unet if base else models.unet(config, empty.shape[-1]) if checkpoint is None else None
    if config.train.method == "lora" and checkpoint:
        models.load_adapter(unet, checkpoint / "lora")
    elif checkpoint:
        unet = UNet2DConditionModel.from_pretrained(checkpoint / "unet", use_safetensors=True)
    if config.train.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    pipe = models.pipeline(config, models.for_training(unet, device), tokenizer, encoder, whitening, base).to(device)
    if found := settings.zero_snr_problems(pipe.scheduler.config, config.train.weighting):
        raise ConfigError(found[0])
    keep = costly(pipe.vae) and not config.data.streaming
    kept = latents.encode(images, pipe.vae, config.data.cache, mirrored=config.data.flip) if keep else None
    return Parts(images, held_out, states, held, empty.to(device), pipe, kept, data.CaptionStates(tokenizer, encoder, length))


def costly(vae: torch.nn.Module | None) -> bool:
    """Whether an autoencoder is a network, which is worth asking only once an image, and says a distribution of it."""
    return vae is not None and not isinstance(vae, PatchAutoencoder)


def pretrained(config: Config) -> TextToImagePipeline:
    """The pipeline that a fine-tune goes on from, set to the data's resolution; ConfigError where it cannot be used."""
    try:
        pipe = hub.load(config.model.pretrained)
    except ValueError as error:
        raise ConfigError(f"model.pretrained: {error}") from error
    if getattr(pipe.unet, "peft_config", None):
        raise ConfigError(f"model.pretrained must be a whole model, got {config.model.pretrained}, which is an adapter: give the "
                          "model that it adapts")  # fmt: skip
    side, rest = divmod(config.data.resolution, pipe.vae_scale_factor)
    halvings = 2 ** (len(pipe.unet.config.block_out_channels) - 1)
    if rest or side % halvings:
        raise ConfigError(f"data.resolution must be a multiple of {pipe.vae_scale_factor * halvings} for "
                          f"{config.model.pretrained}, got {config.data.resolution}")  # fmt: skip
    pipe.unet.register_to_config(sample_size=side)
    return pipe


def open_stream(config: Config, accelerator: Accelerator) -> contextlib.AbstractContextManager[Stream | None]:
    """This process's part of a streamed training split; None within where the data is prepared before."""
    if not config.data.streaming:
        return contextlib.nullcontext()
    return contextlib.closing(Stream(config.data, config.seed, accelerator.process_index, accelerator.num_processes))


def examples(parts: Parts, config: Config, step: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x_0 (B, c, h, w) and caption states (B, L, D) of the examples at `slots` of the global batch of one step."""
    seed, device = config.seed, parts.empty.device
    flip = randomness.flips(seed, step, slots) if config.data.flip else None
    if parts.stream is None:
        rows = data.batch_indices(seed, step, config.train.batch_size, len(parts.images), slots=slots)
        states = parts.states[parts.images.chosen(seed, step, slots, rows)].to(device)
        if parts.latents is None:
            return parts.encoded(parts.images, rows, flip), states
        z = randomness.noise(seed, step, slots, parts.latents.shape, "posterior")
        return parts.latents.sample(rows, rows < 0 if flip is None else flip, z).to(device), states
    batch = parts.stream.take(len(slots))
    choice = randomness.caption_choice(seed, step, slots, [len(captions) for captions in batch.alternatives]).tolist()
    states = parts.encode([captions[i] for captions, i in zip(batch.alternatives, choice, strict=True)]).to(device)
    shape = (parts.unet.config.in_channels, *[parts.unet.config.sample_size] * 2)
    z = randomness.noise(seed, step, slots, shape, "posterior") if costly(parts.pipe.vae) else None
    return parts.encoded(batch, slice(None), flip, z), states if parts.pipe.whitening is None else parts.pipe.whitening(states)


def batch_loss(unet, parts: Parts, config: Config, step: int, slots: torch.Tensor) -> torch.Tensor:
    """The training loss of the examples at `slots` of the global batch of one step, one value each (B,)."""
    seed, train, device = config.seed, config.train, parts.empty.device
    x_0, states = examples(parts, config, step, slots)
    t = randomness.timesteps(seed, step, slots, train.batch_size, len(parts.scheduler)).to(device)
    eps = randomness.noise(seed, step, slots, x_0.shape[1:]).to(device)
    x_t = parts.scheduler.add_noise(x_0, eps, t)  # (5)
    keep = randomness.keep_caption(seed, step, slots, config.data.caption_dropout).to(device)
    captions = torch.where(keep[:, None, None], states, parts.empty)  # (14)
    output = unet(x_t.to(memory_format=torch.channels_last), t, encoder_hidden_states=captions, return_dict=False)[0]
    return parts.loss(config, output.float(), x_0, eps, t)


@torch.no_grad()
def validate(unet, parts: Parts, config: Config, stop) -> dict:
    """Loss and x_0 error by timestep on a fixed grid of (image, t, eps), for the training and the held-out split."""
    T, record = len(parts.scheduler), {}
    for split, images, states in [("train", parts.images, parts.states), ("held_out", parts.held_out, parts.held_states)]:
        if images is None:
            continue
        rows = data.evenly(HELD, len(images))
        x_0, chosen = parts.encoded(images, rows), states[images.first[rows]].to(parts.empty.device)
        eps = randomness.noise(0, 0, rows, x_0.shape[1:]).to(x_0.device)
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


def try_sampling(parts: Parts, config: Config) -> None:
    """ConfigError where the run's model could not draw its samples, before the first step."""
    sample = config.sample
    try:
        parts.pipe.denoise(sample.prompts[0], w=sample.w[0], num_inference_steps=sample.steps, eta=sample.eta)
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
        images += pipe(list(sample.prompts), w=w, seed=sample.seed, num_inference_steps=sample.steps, eta=sample.eta,
                       callback_on_step_end=ask).images  # fmt: skip
        if stop:
            return
    make_image_grid(images, rows=len(sample.w), cols=len(sample.prompts)).save(path)


@contextlib.contextmanager
def averaged(ema, unet):
    """The network with its moving average for weights, which change places: nothing is copied."""

    def exchange():
        for weight, mean in zip(models.trainable(unet), ema.shadow_params, strict=True):
            weight.data, mean.data = mean.data, weight.data

    exchange()
    try:
        yield unet.eval()
    finally:
        exchange()
        unet.train()


def resume_point(run: runs.Run, config: Config) -> Path | None:
    """The checkpoint to go on from, None for a new run; RunError where settings changed, or what lies there would be lost."""
    checkpoint = run.newest()
    if checkpoint is None:
        foreign = run.card.is_file() and not (run.folder / card.FACTS).is_file()
        if run.drawable or foreign:
            held = "a model, and no checkpoint to go on from" if run.drawable else f"a {run.card.name} that no run has written"
            raise runs.RunError(f"{run.folder} holds {held}, expected a new folder or a run's: give the new run another --name, "
                                "or move the folder away")  # fmt: skip
        return None
    try:
        before = settings.load_file(run.config)
    except ConfigError as error:
        reasons = "; ".join(str(error).splitlines())
        raise runs.RunError(f"{run.config}, which the run was begun with, does not fit this version ({reasons}): mend it there, "
                            "or give the new run another --name") from error  # fmt: skip
    if changed := settings.differences(before, config, FREE):
        raise runs.RunError(f"{run.folder} was begun with other settings: {'; '.join(changed)}. "
                            "Undo that, or give the new run another --name")  # fmt: skip
    return checkpoint


def train(config: Config, dry_run: bool = False) -> int:
    """Train as configured, from the newest checkpoint if there is one; the exit code."""
    known = [str(tracker.value) for tracker in LoggerType if tracker != LoggerType.ALL]
    if config.report_to and config.report_to not in known:
        raise ConfigError(f"report_to must be one of {', '.join(known)}, got {config.report_to!r}")
    if config.report_to and config.report_to not in [str(tracker.value) for tracker in get_available_trackers()]:
        raise ConfigError(f"report_to {config.report_to!r} is not installed here: pip install {config.report_to}")
    wanted = parse_flag_from_env("ACCELERATE_USE_CPU")  # of accelerate launch --cpu
    cpu = wanted or not (torch.cuda.is_available() or torch.backends.mps.is_available())  # told, torchrun's ranks find each other
    device = PartialState(cpu=cpu, timeout=DRAWING).device
    precision = models.precision(config.train.precision, device)
    if precision == "fp16" and device.type == "cpu":
        raise ConfigError("train.precision must be auto, no or bf16 on a CPU, got fp16")
    accelerator = Accelerator(
        cpu=cpu, mixed_precision=precision, log_with=config.report_to,
        gradient_accumulation_steps=config.train.accumulation, project_dir=config.folder,
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)])  # fmt: skip  # no second copy of them
    set_threads(config.train.threads, accelerator)
    keep_freed_memory()
    share = config.train.batch_size // config.train.accumulation
    if share % accelerator.num_processes:
        raise ConfigError(f"train.batch_size / train.accumulation must be a multiple of the {accelerator.num_processes} "
                          f"processes, got {share}")  # fmt: skip
    if dry_run:
        return rehearse(config, accelerator)
    run, main = runs.Run(config.folder), accelerator.is_main_process
    if main:
        hub.check(config)
    with accelerator.main_process_first():
        run.create()
    with runs.StopRequest() as stop, run.lock() if main else contextlib.nullcontext():
        checkpoint, finished = broadcast_object_list([resume_point(run, config), run.finished] if main else [None, None])
        if checkpoint and not (checkpoint / runs.MANIFEST).is_file():  # one process has decided for all
            raise runs.RunError(f"process {accelerator.process_index} does not see {checkpoint}, expected `output` on a disk "
                                "that all machines share: put the run there")  # fmt: skip
        start = int(checkpoint.name) if checkpoint else 0
        if start > config.train.steps and not finished:
            raise runs.RunError(f"{run.folder} is at step {start} already, got train.steps {config.train.steps}: give at least "
                                f"{start}, or a new run another --name")  # fmt: skip
        try:
            if start >= config.train.steps and finished:
                accelerator.print(f"{run.folder} is finished at step {start} of {config.train.steps}.\n{usage(run, config)}")
                return publish(config, run, stop) if main else 0
            with stop.at_once("before the first step"):
                opened = open_stream(config, accelerator)
            with opened as stream:
                return loop(config, accelerator, run, checkpoint, stop, stream)
        except runs.Stopped as said:
            accelerator.print(f"{said}; run the same command to go on.")
            return stop.exit_code


def loop(config: Config, accelerator: Accelerator, run: runs.Run, checkpoint: Path | None, stop, stream: Stream | None) -> int:
    """The training loop, from a checkpoint or from nothing to the last step; the exit code."""
    main, share, steps = accelerator.is_main_process, config.train.batch_size // config.train.accumulation, config.train.steps
    with stop.at_once("before the first step"), local_main_first(accelerator):  # the others find in the cache what it prepares
        parts = prepare(config, checkpoint, accelerator.device, again=checkpoint is None)
    read = None if stream is not None else parts.images.fingerprint
    if len(set(gather_object([read]))) > 1:
        raise data.DataError(f"the processes read different pictures or captions in {config.data.source}, expected the same on "
                             "all machines: copy those of one to the others")  # fmt: skip
    if checkpoint and (was := runs.manifest(checkpoint).get("data", read)) != read:
        raise runs.RunError(f"{run.folder} was begun on other pictures or captions: the fingerprint of {config.data.source} "
                            f"was {was} and is now {read}. Put them back, or give the new run another --name")  # fmt: skip
    try_sampling(parts, config)
    parts.stream = stream
    optimizer = optimizer_of(parts.unet, config.train)
    schedule = lr_schedule(optimizer, config.train)
    ema = models.moving_average(parts.unet, config.train.ema)
    state = {"step": 0, "skipped": 0, "in_a_row": 0, "seconds": 0.0, "losses": []}  # losses: since the last line of the log
    if checkpoint:
        saved = runs.load_state(checkpoint, "trainer")
        restore(optimizer, saved["optimizer"])
        was, now = resume_schedule(schedule, saved["schedule"])
        ema.load_state_dict(saved["ema"])
        ema.shadow_params = [torch.empty_like(weight).copy_(mean)  # as the weights lie, or the average takes torch's slow path
                             for weight, mean in zip(models.trainable(parts.unet), ema.shadow_params, strict=True)]  # fmt: skip
        if accelerator.scaler is not None and saved.get("scaler"):  # none from a machine that computes in another precision
            accelerator.scaler.load_state_dict(saved["scaler"])
        state |= saved["state"] | {"losses": of_rank(saved.get("losses", [saved["state"]["losses"]]), accelerator)}
        if stream is not None:
            stream.load_state_dict(of_rank(saved["streams"], accelerator))
        del saved  # which maps the trainer's file: deleted, that would keep its room on the disk
    if main:
        run.card.unlink(missing_ok=True)  # a run's own: until it is finished again
        run.rewind(state["step"])
        if state["step"] == steps:  # nothing is left but its end, whose samples may be of other prompts now
            sample_path(run, steps).unlink(missing_ok=True)
        runs.replace(run.config, config.to_yaml())
        print(f"{parts.images.report}\n{models.count(models.trainable(parts.unet)) / 1e6:.1f} M weights to train;",
              f"going on from step {state['step']}" if checkpoint else "a new run")  # fmt: skip
        if checkpoint and (before := runs.manifest(checkpoint)["processes"]) != accelerator.num_processes:
            print(f"The checkpoint is of {before} process(es), now there are {accelerator.num_processes}: the batches are the "
                  "same, their sums are rounded otherwise")  # fmt: skip
        if checkpoint and was != now:
            print(f"With {steps} steps the schedule goes on at a learning rate of {now:.3g}, where it was {was:.3g}")
    unet, optimizer = accelerator.prepare(parts.unet, optimizer)
    weights = models.trainable(parts.unet)
    ema.to(accelerator.device)
    trackers = Trackers(accelerator, config)
    pipe, busy, counted = parts.pipe, 0.0, 0  # steps, and their seconds, since the last line
    began_at = time.monotonic() - state["seconds"]  # those of earlier sittings count
    clock = lambda: time.monotonic() - began_at
    bar = tqdm(total=steps, initial=state["step"], disable=not main, desc=config.name, unit="step", dynamic_ncols=True)

    def save():
        state["seconds"] = clock()
        trainer = {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(), "ema": ema.state_dict(),
                   "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else {}, "state": state,
                   "losses": gather_object([state["losses"]]),
                   "streams": gather_object([stream.state_dict()]) if stream is not None else []}  # fmt: skip

        def write(folder):
            if config.train.method == "lora":
                models.save_adapter(parts.unet, folder / "lora")
            else:
                parts.unet.save_pretrained(folder / "unet", safe_serialization=True)
                if pipe.whitening is not None:
                    pipe.whitening.save_pretrained(folder / "whitening", safe_serialization=True)
            runs.save_state(folder, "trainer", trainer)

        if main:
            run.save(state["step"], write, config.train.keep, processes=accelerator.num_processes, data=read)
        accelerator.wait_for_everyone()

    def show(step):
        """The check and the picture that are due at a step; those that a stop or a death cut short are made up on resuming."""
        last, path = step == steps, sample_path(run, step)
        due = step % config.train.validate_every == 0 or last
        if due and not any("train_loss" in record for record in run.history() if record["step"] == step):
            record = {}
            with averaged(ema, parts.unet), spared(f"the check of step {step}"):
                record = validate(parts.unet, parts, config, stop)
            if record:
                run.log(step=step, **record)
                trackers.log(step, record)
        if (step % config.sample.every == 0 or last) and not path.is_file() and not stop:
            with averaged(ema, parts.unet), spared(path, FEWER):
                draw(pipe, config, path, stop)
            trackers.show(step, path)

    @contextlib.contextmanager
    def kept(place):
        """Save the steps before a stream fails for good, or is waited for when a stop is asked for.

        Several processes cannot agree on it any more, and a step that is saved already is not saved again.
        """
        if stream is None or accelerator.num_processes > 1:
            yield
            return
        try:
            with stop.at_once(f"after step {state['step']} of {steps}"):
                yield
        except (data.DataError, runs.Stopped) as error:
            if not state["step"]:
                raise
            stream.place = place
            if (newest := run.newest()) is None or int(newest.name) != state["step"]:
                save()
            if isinstance(error, runs.Stopped):
                raise
            raise type(error)(f"{error}\nstep {state['step']} is saved: the same command goes on from it") from error

    if main and state["step"]:
        show(state["step"])
    with trackers, bar:
        while state["step"] < steps:
            step, began, seen, place = state["step"], time.perf_counter(), [], stream and stream.place
            for micro in range(config.train.accumulation):
                mine = torch.arange(accelerator.process_index, share, accelerator.num_processes) + micro * share
                with accelerator.accumulate(unet):
                    with kept(place):
                        each = batch_loss(unet, parts, config, step, mine)
                    accelerator.backward(each.mean())
                    seen.append((mine, each.detach()))
                    if accelerator.sync_gradients:
                        norm = accelerator.clip_grad_norm_(weights, config.train.clip)  # of the gradients of all processes
                        norm, *means = torch.stack([norm, *(each.mean() for _, each in seen)]).tolist()  # the one wait for a GPU
                        sound = math.isfinite(norm)
                        if sound:
                            optimizer.step()
                            ema.step(weights)
                        elif accelerator.scaler is not None:
                            accelerator.scaler.update()  # which lowers its scale
                    optimizer.zero_grad()
            lr = optimizer.param_groups[-1]["lr"]  # what this step took
            schedule.step()
            state["in_a_row"] = 0 if sound else state["in_a_row"] + 1
            state["skipped"] += not sound
            state["losses"] += filter(math.isfinite, means)
            state["step"] = step = step + 1
            if not sound:
                bad = gather_object(spoilt(parts, config, step - 1, seen))
                if main:
                    tell(step, bad)
                    run.log(step=step, no_finite_loss=bad)
                if state["in_a_row"] >= config.train.max_skipped:
                    raise runs.Diverged(f"{state['in_a_row']} steps in a row, up to step {step}, had no finite gradient; the "
                                        f"last checkpoint is kept: lower train.lr (now {config.train.lr:g}) in a run of another "
                                        "--name")  # fmt: skip
            busy, counted = busy + time.perf_counter() - began, counted + 1
            bar.update()
            if step % config.train.log_every == 0 or step == steps:
                mean = accelerator.reduce(torch.tensor(state["losses"], device=accelerator.device).mean(), "mean").item()
                record = {"step": step, "loss": mean if math.isfinite(mean) else None,
                          "grad_norm": norm if sound else None, "lr": lr, "skipped": state["skipped"],
                          "images_per_s": config.train.batch_size * counted / busy, "seconds": clock()}  # fmt: skip
                state["losses"], busy, counted = [], 0.0, 0
                bar.set_postfix(loss=f"{mean:.4f}")
                if main:
                    run.log(**record)
                trackers.log(step, record)
            last, ended = step == steps, stopped(stop, accelerator)
            if not ended and (last or step % config.train.validate_every == 0 or step % config.sample.every == 0):
                if main:
                    show(step)
                ended = stopped(stop, accelerator)
            if ended or last or step % config.train.save_every == 0:
                save()
            if ended:
                bar.close()
                accelerator.print(f"Stopped ({stop.reason}) after step {step} of {steps}; run the same command to go on.")
                return stop.exit_code
    if main:
        with stop.at_once("after the last step"):
            finish(config, run, parts, ema, clock())
    return publish(config, run, stop) if main else 0


def of_rank(saved: list, accelerator: Accelerator):
    """What a checkpoint keeps for each process, of this one."""
    return saved[accelerator.process_index % len(saved)]


def sample_path(run: runs.Run, step: int) -> Path:
    """Where the samples of a step are drawn."""
    return run.samples / f"{step:06d}.png"


def publish(config: Config, run: runs.Run, stop) -> int:
    """Push a finished run where its settings say, until a stop is asked for; the exit code."""
    with stop.at_once("before the model was pushed"):
        return hub.publish(config, run)


def spoilt(parts: Parts, config: Config, step: int, seen: list[tuple[torch.Tensor, torch.Tensor]]) -> list[str]:
    """Which of this process's examples of a step, of (slots, losses) each, had no finite loss: their names and timesteps."""
    bad = [int(slot) for slots, each in seen for slot in slots[~each.isfinite().cpu()]]
    if bad:
        size, T = config.train.batch_size, len(parts.scheduler)
        t = randomness.timesteps(config.seed, step, bad, size, T).tolist()
        names = [f"the batch's image {slot}" for slot in bad]  # of a stream
        if parts.stream is None:
            rows = data.batch_indices(config.seed, step, size, len(parts.images), slots=bad).tolist()
            names = [parts.images.metadata[row].get("file_name", f"row {row}") for row in rows]
        return [f"{name} at t = {k}" for name, k in zip(names, t, strict=True)]
    return []


def tell(step: int, bad: list[str]) -> None:
    """Say that a step is skipped, and for which examples of all processes."""
    why = f"no finite loss for {'; '.join(bad)}" if bad else "its gradient is not finite"
    tqdm.write(f"step {step} is skipped: {why}")


def stopped(stop, accelerator: Accelerator) -> bool:
    """Has any process been asked to stop? All of them get the same answer, and end with the same exit code."""
    if accelerator.num_processes == 1:
        return bool(stop)
    code = int(accelerator.gather(torch.tensor([stop.exit_code], device=accelerator.device)).max())
    if code:
        stop.reason, stop.exit_code = stop.reason or "as another process", code
    return bool(code)  # not `stop`: what has come meanwhile is heard by all at the next step


def finish(config: Config, run: runs.Run, parts: Parts, ema, seconds: float) -> None:
    """Leave the averaged weights as a loadable pipeline, with its card and figures."""
    pipe = parts.pipe
    ema.copy_to(models.trainable(parts.unet))
    parts.unet.eval()
    if config.train.method == "lora":
        runs.replace_folder(run.adapter, lambda folder: models.save_adapter(parts.unet, folder))
    else:
        runs.replace_folder(run.pipeline, lambda folder: pipe.save_pretrained(folder, safe_serialization=True))
    with spared(run.figures / "training.png"):
        card.plot_run(run, parts.images, pipe)
    sample, strips, last = config.sample, run.figures / "strips.png", sample_path(run, config.train.steps)
    with spared(strips, FEWER):
        card.plot_strips(pipe, list(sample.prompts), set(parts.images.all_captions), strips, w=sample.default_w,
                         seed=sample.seed, steps=sample.steps, eta=sample.eta, columns=min(8, sample.steps))  # fmt: skip
    card.describe(config, run, pipe, parts.images, seconds, **base_of(config))
    shown = f"{last} shows its samples, " if last.is_file() else ""
    print(f"\n{shown}{run.card} is its card.\n{usage(run, config)}")


def base_of(config: Config) -> dict:
    """What the card says of the model that was tuned, if one was."""
    if config.model.pretrained is None:
        return {}
    return {"base_model": config.model.pretrained, "base_license": card.license_of(config.model.pretrained),
            "base_model_relation": "adapter" if config.train.method == "lora" else "finetune"}  # fmt: skip


def usage(run: runs.Run, config: Config) -> str:
    """The line that draws a picture with a finished run."""
    sample = config.sample
    return f'Draw with it:  python -m pipeline.sample {run.folder} "{sample.prompts[0]}" --w {sample.default_w:g} -o out.png'


def rehearse(config: Config, accelerator: Accelerator) -> int:
    """`--dry_run`: the plan, from one timed step; nothing is kept but the prepared data."""
    with local_main_first(accelerator):
        parts = prepare(config, None, accelerator.device)
    try_sampling(parts, config)
    optimizer, ema = optimizer_of(parts.unet, config.train), models.moving_average(parts.unet, config.train.ema)
    unet, optimizer = accelerator.prepare(parts.unet, optimizer)
    ema.to(accelerator.device)
    share, weights, timed = config.train.batch_size // config.train.accumulation, models.trainable(parts.unet), []
    slots = torch.arange(accelerator.process_index, share, accelerator.num_processes)
    with open_stream(config, accelerator) as parts.stream:
        for step in range(2):  # the first one warms up
            began = time.perf_counter()
            accelerator.backward(batch_loss(unet, parts, config, step, slots).mean())
            norm = accelerator.clip_grad_norm_(weights, config.train.clip)
            optimizer.step()
            ema.step(weights)
            optimizer.zero_grad()
            norm.item()  # a GPU's clock stops when it is done
            timed.append((time.perf_counter() - began) * config.train.accumulation)
    card.build(config, card.facts(str(parts.images.report), 0.0, **base_of(config)))
    minutes = timed[-1] * config.train.steps / 60
    memory = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == 'darwin' else 2**20):.1f} GiB"
    if accelerator.device.type == "cuda":
        memory += f" and {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB of each GPU's"
    accelerator.print(config.to_yaml() + f"\n{parts.images.report}\n{models.count(weights):,} weights to train\n"
                      f"{config.train.steps} steps of {config.train.batch_size} images, {timed[-1]:.3f} s each: about "
                      f"{minutes:.1f} minutes\n{memory} of memory at most so far")  # fmt: skip
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command line: 0 done, 1 failed and resumable, 2 bad input, 130 or 143 stopped and resumable."""
    try:
        return train(*settings.load(sys.argv[1:] if argv is None else argv))
    except (ConfigError, data.DataError, emoji.EmojiError, runs.RunError, hub.HubError) as error:
        print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return getattr(error, "exit_code", 2)
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        print(f"error: {error.filename or 'a file'}: {error.strerror}, expected room and leave to write: mend that, then run the "
              "same command, which goes on from its newest checkpoint", file=sys.stderr)  # fmt: skip
        return 1
    except RuntimeError as error:
        if not of_memory(error):
            raise
        print(f"error: a step needs more memory than there is ({str(error).splitlines()[0]}), expected room for one micro-batch: "
              "raise train.accumulation or set train.gradient_checkpointing true; the same command goes on from its newest "
              "checkpoint", file=sys.stderr)  # fmt: skip
        return 1


if __name__ == "__main__":
    sys.exit(main())
