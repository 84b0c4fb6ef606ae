"""`python benchmarks/muon.py`: AdamW and Muon at equal time and at equal images, batch 32 and 128.

Both train the same network on the same batches, in turns of one step. Each has its own clock,
which stops while it is measured. The learning rate is constant after its warm-up, so neither knows
when it will end. One seed: preliminary.
"""

import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import bench
from benchmarks.bench import spread, table
from benchmarks.training import StepRunner, load_config
from pipeline import hardware
from pipeline.config import DEFAULT, Config
from pipeline.models.ema import ema_weights
from pipeline.training.validation import validate

OPTIMIZERS = ("adamw", "muon")


class TimedRun:
    """A training run with its own clock, and the errors of its averaged weights by images seen."""

    def __init__(self, config: Config, bf16: bool):
        self.runner = StepRunner(config, bf16)
        self.seconds = []
        self.curve = {}

    @property
    def images(self) -> int:
        """The number of images seen."""
        return self.runner.global_step * self.runner.config.train.batch_size

    def step(self) -> None:
        """Take the next step."""
        start = time.perf_counter()
        self.runner.step()
        self.seconds.append(time.perf_counter() - start)

    def measure(self) -> None:
        """Record the loss, and the errors of x_0 at the noisiest timestep of the grid."""
        task = self.runner.task
        with ema_weights(task.unet, self.runner.ema):
            found = validate(self.runner.network, task, stop=False)
        noisiest = max(found["train_x_0_error"])
        held_out = found.get("held_out_x_0_error", {}).get(noisiest)
        self.curve[self.images] = (
            found["train_loss"],
            found["train_x_0_error"][noisiest],
            held_out,
        )


def race(file: str, batch: int, seconds: float, every: int) -> dict[str, TimedRun]:
    """Train with both optimizers at one batch size, and measure every `every` images."""
    bf16 = hardware.has_bf16(torch.device("cpu"))
    schedule = {"lr_schedule": "constant", "warmup": 50, "steps": 100_000}
    runs = {name: TimedRun(load_config(file, batch, name, **schedule), bf16) for name in OPTIMIZERS}
    unfinished = list(runs.values())
    while unfinished:
        for run in unfinished:
            run.step()
            if run.images % every < batch or run.runner.global_step == 1:
                run.measure()
        unfinished = [run for run in unfinished if sum(run.seconds) < seconds]
    for run in runs.values():
        run.measure()
    return runs


def cells(errors: tuple) -> list[str]:
    """Return errors as they are printed."""
    return ["-" if value is None else f"{value:.4f}" for value in errors]


def main(argv: list[str] | None = None) -> None:
    """Race the optimizers and write their section."""
    parser = bench.parser(__doc__)
    parser.add_argument("--config", default=DEFAULT, help="one that has train.matrix_lr for Muon")
    parser.add_argument("--batch", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--seconds", type=float, default=60, help="of each optimizer and batch")
    parser.add_argument("--every", type=int, default=1280, help="images between measurements")
    args = bench.parse(parser, argv)
    if args.quick:
        args.batch = [2]
        args.seconds = 0.2
        args.every = 4
    bench.prepare()
    hardware.keep_freed_memory()
    rows = []
    curves = {}
    for batch in args.batch:
        runs = race(args.config, batch, args.seconds, args.every)
        shared = max(set.intersection(*(set(run.curve) for run in runs.values())))
        for name, run in runs.items():
            at_end = [spread(run.seconds, ".2f"), f"{run.images:,}", *cells(run.curve[run.images])]
            rows.append([batch, name, *at_end, f"{shared:,}", *cells(run.curve[shared])])
            curves[f"{name}, batch {batch}"] = {n: error for n, (_, error, _) in run.curve.items()}
        profile = bench.profile_call(runs["muon"].runner.step, 8)
        limits = f"What limits a step by Muon, batch {batch}, by torch's profiler: {profile}."

    def plot(axes) -> str:
        for name, curve in curves.items():
            axes.plot(list(curve), list(curve.values()), label=name)
        axes.set(xlabel="images", ylabel="x_0 error at the noisiest timestep", yscale="log")
        axes.legend()
        return "AdamW and Muon by images seen"

    errors = ["loss", "x_0 error", "held out"]
    in_time = ["s a step", f"images in {args.seconds:g} s", *errors]
    bench.publish(
        args,
        __file__,
        argv,
        "AdamW and Muon",
        f"`{args.config}`, one seed: preliminary. Errors of the averaged weights on a fixed grid; "
        "x_0 errors are at its noisiest timestep, where only the caption says what the image is.",
        table(["batch", "", *in_time, "at equal images", *errors], rows),
        limits,
        bench.figure(args, "muon", plot),
    )


if __name__ == "__main__":
    main()
