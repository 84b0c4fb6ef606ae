"""`python benchmarks/training.py`: our training step beside diffusers' text-to-image example.

Both train the same network. As users run it, the example opens every image and encodes image and
caption at every step. Like for like, both sides read them from memory. Both use AdamW in the same
precision. The example keeps its attention, memory format, EMA and optimizer kernels. glibc keeps
freed memory for both.
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
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import bench
from benchmarks.bench import ratios, spread, table, target
from pipeline import hardware
from pipeline.config import DEFAULT, Config, load
from pipeline.diffusion.losses import network_target
from pipeline.models.build import trainable_parameters
from pipeline.models.ema import build_ema
from pipeline.training.optimizers import build_lr_schedule, build_optimizer
from pipeline.training.task import TrainingTask, predict

CPU = torch.device("cpu")


def load_config(file: str, batch: int, optimizer: str = "adamw", **train) -> Config:
    """Load a configuration at a batch size, with an optimizer; AdamW has no matrix_lr."""
    settings = {"batch_size": batch, "optimizer": optimizer}
    if optimizer == "adamw":
        settings["matrix_lr"] = "null"
    options = [f"--train.{name}={value}" for name, value in (settings | train).items()]
    return load(["--config", file, *options])[0]


class StepRunner:
    """The training loop of train_text2img.py on the CPU, one step at a time."""

    def __init__(self, config: Config, bf16: bool):
        self.config = config
        self.bf16 = bf16
        self.global_step = 0
        self.task = TrainingTask.build(config, CPU)
        self.weights = trainable_parameters(self.task.unet)
        self.optimizer = build_optimizer(self.task.unet, config.train)
        self.schedule = build_lr_schedule(self.optimizer, config.train)
        self.ema = build_ema(self.task.unet, config.train.ema)

    def network(self, *args, **kwargs) -> tuple[Tensor]:
        """Call the network in the run's precision."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            return self.task.unet(*args, **kwargs)

    def step(self) -> None:
        """Take the next step of the run."""
        task = self.task
        batch = task.get_batch(self.global_step, torch.arange(self.config.train.batch_size))
        t = task.timesteps(batch)
        eps = task.noise(batch)
        x_t = task.scheduler.add_noise(batch.x_0, eps, t)
        captions = torch.where(task.keep_captions(batch), batch.captions, task.empty_caption)
        prediction = predict(self.network, x_t, t, captions)
        task.loss(prediction, batch, eps, t).mean().backward()
        torch.nn.utils.clip_grad_norm_(self.weights, self.config.train.clip)
        self.optimizer.step()
        self.ema.step(self.weights)
        self.optimizer.zero_grad()
        self.schedule.step()
        self.global_step += 1


def example_step(task: TrainingTask, bf16: bool, cached: bool) -> Callable[[], None]:
    """Return a step of diffusers' train_text_to_image.py with --use_ema on our network."""
    config = task.config
    batch = config.train.batch_size
    side = config.data.resolution
    unet = UNet2DConditionModel.from_config(task.unet.config).train()
    adam = {"lr": 1e-4, "betas": (0.9, 0.999), "weight_decay": 1e-2, "eps": 1e-8}
    optimizer = torch.optim.AdamW(unet.parameters(), **adam)
    schedule = get_scheduler("constant", optimizer)
    scheduler = diffusers.DDPMScheduler.from_config(task.scheduler.config)
    T = scheduler.config.num_train_timesteps
    ema = EMAModel(unet.parameters(), model_cls=UNet2DConditionModel, model_config=unet.config)
    dtype = torch.bfloat16 if bf16 else torch.float32
    encoder = copy.deepcopy(task.pipe.text_encoder).to(dtype)
    captions = task.images.captions
    files = [encode_png(image) for image in task.images.images[:]]
    x_0s = task.encode_images(task.images, slice(None))
    states = task.caption_states[task.images.first]
    generator = torch.Generator().manual_seed(0)
    order = itertools.cycle(torch.randperm(len(files), generator=generator).tolist())
    padding = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}

    def read(rows: list[int]) -> tuple[Tensor, Tensor]:
        if cached:
            return x_0s[rows], states[rows]
        pixels = torch.stack([read_png(files[row], side) for row in rows])
        texts = [captions[row] for row in rows]
        tokens = task.pipe.tokenizer(texts, max_length=config.data.caption_length, **padding)
        with torch.no_grad():
            return task.pipe.encode(pixels), encoder(tokens.input_ids)[0].float()

    def step() -> None:
        x_0, encoded = read([next(order) for _ in range(batch)])
        eps = torch.randn_like(x_0)
        t = torch.randint(0, T, (batch,))
        x_t = scheduler.add_noise(x_0, eps, t)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            output = unet(x_t, t, encoded, return_dict=False)[0]
        F.mse_loss(output.float(), network_target(task.scheduler, x_0, eps, t)).backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        ema.step(unet.parameters())

    return step


def encode_png(pixels: Tensor) -> bytes:
    """Return a uint8 image (3, H, W) as a PNG file in memory: the example pays for no disk."""
    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, "PNG")
    return file.getvalue()


def read_png(file: bytes, side: int) -> Tensor:
    """Return an image as the example reads it: RGB, resized, (3, H, W) in [-1, 1]."""
    with Image.open(io.BytesIO(file)) as image:
        resized = image.convert("RGB").resize((side, side), Image.Resampling.BILINEAR)
        pixels = np.asarray(resized, dtype=np.float32)
    return torch.from_numpy(pixels.transpose(2, 0, 1) / 127.5 - 1)


def compare(file: str, batch: int, repeats: int) -> tuple[list[list], list[list], list[str], str]:
    """Compare one batch size: rows of throughput and of ratios, the goals, and a step's profile."""
    bf16 = hardware.has_bf16(CPU)
    config = load_config(file, batch)
    recipe = StepRunner(load(["--config", file, f"--train.batch_size={batch}"])[0], bf16)
    fast = StepRunner(config, bf16)
    plain = StepRunner(config, bf16=False)
    by_recipe = f"ours, by {recipe.config.train.optimizer}"
    steps = {"ours": fast.step, "ours, float32": plain.step, by_recipe: recipe.step}
    for wide in (True, False) if bf16 else (False,):
        for cached in (False, True):
            name = f"example, {'bf16' if wide else 'float32'}{', cached' if cached else ''}"
            steps[name] = example_step(fast.task, wide, cached)
    seconds = bench.in_turns(steps, repeats)
    peak = bench.matmul_rate(torch.bfloat16 if bf16 else torch.float32)
    with FlopCounterMode(display=False) as counter:
        fast.step()
    shares = [counter.get_total_flops() / s / peak for s in seconds["ours"]]
    throughput = []
    for name, some in seconds.items():
        share = spread(shares, ".0%") if name == "ours" else ""
        throughput.append([batch, name, spread([batch / s for s in some], ".1f"), share])
    # (theirs, ours): what is compared, and the goal.
    pairs = {("example, float32", "ours"): ("as users run it, the example's default precision", 2)}
    if bf16:
        pairs["example, bf16", "ours"] = ("as users run it, both bf16", 2)
        pairs["example, bf16, cached", "ours"] = ("like for like, bf16", 1.15)
    pairs["example, float32, cached", "ours, float32"] = ("like for like, float32", 1.15)
    compared = []
    goals = []
    for (theirs, ours), (what, goal) in pairs.items():
        found = ratios(seconds[theirs], seconds[ours])
        compared.append([batch, what, spread(found)])
        goals.append(target(f"{what}, batch {batch}", median(found), goal))
    if batch == 64:
        goals.append(target("share of the matmul rate, batch 64", median(shares), 0.55))
    return throughput, compared, goals, bench.profile_call(fast.step, 8)


def main(argv: list[str] | None = None) -> None:
    """Run the comparison and write its section."""
    parser = bench.parser(__doc__)
    parser.add_argument("--config", default=DEFAULT)
    parser.add_argument("--batch", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--repeats", type=int, default=5)
    args = bench.parse(parser, argv)
    if args.quick:
        args.batch = [2]
        args.repeats = 2
    bench.prepare()
    hardware.keep_freed_memory()
    throughput = []
    compared = []
    goals = []
    for batch in args.batch:
        rows, more_rows, met, limits = compare(args.config, batch, args.repeats)
        throughput += rows
        compared += more_rows
        goals += met
    size = bench.MATRIX_SIZE
    bench.publish(
        args,
        __file__,
        argv,
        "Training",
        f"`{args.config}` by AdamW unless stated otherwise; medians of {args.repeats} turns with "
        f"minimum and maximum. The share is of the rate of a {size} x {size} matrix product in "
        "the same precision.",
        table(["batch", "", "images/s", "share of the matmul rate"], throughput),
        table(["batch", "the example's time over ours", ""], compared),
        "\n".join(goals),
        f"What limits our step at batch {args.batch[-1]}, by torch's profiler: {limits}.",
    )


if __name__ == "__main__":
    main()
