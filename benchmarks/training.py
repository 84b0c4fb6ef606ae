"""`python benchmarks/training.py`: the training step beside the loop of diffusers' text-to-image example, on the same network.

As users run it, the example opens every picture and encodes picture and caption anew at every step; like for like, both sides
read them from memory. Both use AdamW in the same precision; the example keeps its attention, memory format, EMA and optimiser
kernels. What keeps glibc from handing memory back is set for both.
"""

import copy
import io
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

import diffusers
import numpy as np
import torch
from diffusers import UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from PIL import Image
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))
import train_text2img
from benchmarks import bench
from benchmarks.bench import ratios, spread, table, target
from pipeline import hardware
from pipeline.config import DEFAULT, Config, load
from pipeline.diffusion import losses
from pipeline.models import build
from pipeline.models.ema import build_ema
from pipeline.training import optimizers

CPU = torch.device("cpu")


def configured(file: str, batch: int, optimizer: str = "adamw", **train) -> Config:
    """A configuration file at a batch size, by an optimiser; AdamW knows no matrix_lr."""
    train = (
        {"batch_size": batch, "optimizer": optimizer}
        | ({"matrix_lr": "null"} if optimizer == "adamw" else {})
        | train
    )
    return load(["--config", file, *(f"--train.{name}={value}" for name, value in train.items())])[
        0
    ]


class Trainer:
    """Training as train_text2img.py does it, a step at a time, with its parts open to view."""

    def __init__(self, config: Config, bf16: bool):
        self.config, self.bf16, self.done = config, bf16, 0
        self.parts = train_text2img.prepare(config, None, CPU)
        self.weights = build.trainable_parameters(self.parts.unet)
        self.optimizer = optimizers.build_optimizer(self.parts.unet, config.train)
        self.schedule = optimizers.build_lr_schedule(self.optimizer, config.train)
        self.ema = build_ema(self.parts.unet, config.train.ema)

    def predict(self, *args, **kwargs):
        """The network, in the run's precision."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            return self.parts.unet(*args, **kwargs)

    def step(self) -> None:
        """The next step of the run."""
        slots = torch.arange(self.config.train.batch_size)
        train_text2img.batch_loss(
            self.predict, self.parts, self.config, self.done, slots
        ).mean().backward()
        torch.nn.utils.clip_grad_norm_(self.weights, self.config.train.clip)
        self.optimizer.step()
        self.ema.step(self.weights)
        self.optimizer.zero_grad()
        self.schedule.step()
        self.done += 1


def example(
    parts: train_text2img.Parts, config: Config, bf16: bool, cached: bool
) -> Callable[[], None]:
    """A step of diffusers' examples/text_to_image/train_text_to_image.py with --use_ema, on our network, patches and encoder."""
    dtype, batch, pipe = (
        torch.bfloat16 if bf16 else torch.float32,
        config.train.batch_size,
        parts.pipe,
    )
    unet = UNet2DConditionModel.from_config(parts.unet.config).train()
    optimizer = torch.optim.AdamW(
        unet.parameters(), lr=1e-4, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8
    )
    schedule, scheduler = (
        get_scheduler("constant", optimizer),
        diffusers.DDPMScheduler.from_config(parts.scheduler.config),
    )
    ema = EMAModel(unet.parameters(), model_cls=UNet2DConditionModel, model_config=unet.config)
    encoder, captions = copy.deepcopy(pipe.text_encoder).to(dtype), parts.images.captions
    files, side = [encoded(image) for image in parts.images.images[:]], config.data.resolution
    x_0s, states = parts.encoded(parts.images, slice(None)), parts.states[parts.images.first]
    order = itertools.cycle(
        torch.randperm(len(files), generator=torch.Generator().manual_seed(0)).tolist()
    )

    def read(rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        if cached:
            return x_0s[rows], states[rows]
        pixels = torch.stack([transformed(files[row], side) for row in rows])
        tokens = pipe.tokenizer(
            [captions[row] for row in rows],
            max_length=config.data.caption_length,
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        )
        with torch.no_grad():
            return pipe.encode(pixels), encoder(tokens.input_ids)[0].float()

    def step() -> None:
        x_0, captions = read([next(order) for _ in range(batch)])
        eps, t = (
            torch.randn_like(x_0),
            torch.randint(0, scheduler.config.num_train_timesteps, (batch,)),
        )
        x_t = scheduler.add_noise(x_0, eps, t)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            output = unet(x_t, t, captions, return_dict=False)[0]
        F.mse_loss(output.float(), losses.network_target(parts.scheduler, x_0, eps, t)).backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        ema.step(unet.parameters())

    return step


def encoded(pixels: torch.Tensor) -> bytes:
    """An image (3, H, W) uint8 as a PNG file, in memory: the disk costs the example nothing."""
    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, "PNG")
    return file.getvalue()


def transformed(file: bytes, side: int) -> torch.Tensor:
    """A picture's file as the example reads it: RGB, resized, (3, H, W) in [-1, 1]."""
    with Image.open(io.BytesIO(file)) as picture:
        pixels = np.asarray(
            picture.convert("RGB").resize((side, side), Image.Resampling.BILINEAR), dtype=np.float32
        )
    return torch.from_numpy(pixels.transpose(2, 0, 1) / 127.5 - 1)


def compare(file: str, batch: int, repeats: int) -> tuple[list[list], list[list], list[str], str]:
    """One batch size: rows of throughput, rows of ratios, the goals, and where a step's time goes."""
    bf16, config = hardware.has_bf16(CPU), configured(file, batch)
    recipe = Trainer(load(["--config", file, f"--train.batch_size={batch}"])[0], bf16)
    fast, plain = Trainer(config, bf16), Trainer(config, False)
    steps = {
        "ours": fast.step,
        "ours, float32": plain.step,
        f"ours, by {recipe.config.train.optimizer}": recipe.step,
    }
    for wide in (True, False) if bf16 else (False,):
        for cached in (False, True):
            name = f"example, {'bf16' if wide else 'float32'}{', cached' if cached else ''}"
            steps[name] = example(fast.parts, config, wide, cached)
    seconds = bench.in_turns(steps, repeats)
    peak = bench.matmul_rate(torch.bfloat16 if bf16 else torch.float32)
    with FlopCounterMode(display=False) as counter:
        fast.step()
    shares = [counter.get_total_flops() / s / peak for s in seconds["ours"]]
    throughput = [
        [
            batch,
            name,
            spread([batch / s for s in some], ".1f"),
            spread(shares, ".0%") if name == "ours" else "",
        ]
        for name, some in seconds.items()
    ]
    against = {
        ("example, float32", "ours"): ("as users run it, the example's default precision", 2)
    }
    if bf16:
        against[("example, bf16", "ours")] = ("as users run it, both bf16", 2)
        against[("example, bf16, cached", "ours")] = ("like for like, bf16", 1.15)
    against[("example, float32, cached", "ours, float32")] = ("like for like, float32", 1.15)
    table_rows, goals = [], []
    for (theirs, mine), (what, goal) in against.items():
        found = ratios(seconds[theirs], seconds[mine])
        table_rows.append([batch, what, spread(found)])
        goals.append(target(f"{what}, batch {batch}", median(found), goal))
    if batch == 64:
        goals.append(target("share of the matmul rate, batch 64", median(shares), 0.55))
    return throughput, table_rows, goals, bench.where(fast.step, 8)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = bench.parser(__doc__)
    parser.add_argument("--config", default=DEFAULT)
    parser.add_argument("--batch", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--repeats", type=int, default=5)
    args = bench.parse(parser, argv)
    if args.quick:
        args.batch, args.repeats = [2], 2
    bench.prepare()
    hardware.keep_freed_memory()
    throughput, compared, goals, limits = [], [], [], ""
    for batch in args.batch:
        rows, more, met, limits = compare(args.config, batch, args.repeats)
        throughput, compared, goals = throughput + rows, compared + more, goals + met
    bench.publish(
        args,
        __file__,
        bench.command_line(argv),
        "Training",
        f"`{args.config}` by AdamW unless said otherwise; medians of {args.repeats} turns, with the least and the greatest. The "
        f"share is of the rate of a {bench.SIDE} x {bench.SIDE} matrix product in the same precision.",
        table(["batch", "", "images/s", "share of the matmul rate"], throughput),
        table(["batch", "the example's time over ours", ""], compared),
        "\n".join(goals),
        f"What limits our step at batch {args.batch[-1]}, by torch's profiler: {limits}.",
    )


if __name__ == "__main__":
    main()
