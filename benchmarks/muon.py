"""`python benchmarks/muon.py`: AdamW against Muon at equal time and at equal images, batch 32 and 128.

Both train the same network on the same batches, a step each in turn, and each has its own clock, which stands still while they
are measured. The learning rate is constant after its warm-up: neither knows when it will end. One seed: a lead.
"""

import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import train_text2img
from benchmarks import bench
from benchmarks.bench import spread, table
from benchmarks.training import Trainer, configured
from pipeline import hardware
from pipeline.config import DEFAULT, Config

NAMES = ("adamw", "muon")


class Timed:
    """A training run with its own clock: the seconds of every step, and what the averaged weights were worth by images seen."""

    def __init__(self, config: Config, bf16: bool):
        self.trainer, self.seconds, self.curve = Trainer(config, bf16), [], {}

    @property
    def images(self) -> int:
        """How many it has seen."""
        return self.trainer.done * self.trainer.config.train.batch_size

    def step(self) -> None:
        """The next step."""
        began = time.perf_counter()
        self.trainer.step()
        self.seconds.append(time.perf_counter() - began)

    def measure(self) -> None:
        """Note the errors of now: of the loss, and of x_0 at the noisiest timestep of the grid."""
        parts = self.trainer.parts
        with train_text2img.averaged(self.trainer.ema, parts.unet):
            found = train_text2img.validate(
                self.trainer.predict, parts, self.trainer.config, stop=False
            )
        noisiest = max(found["train_x_0_error"])
        held = found.get("held_out_x_0_error", {}).get(noisiest)
        self.curve[self.images] = (found["train_loss"], found["train_x_0_error"][noisiest], held)


def race(file: str, batch: int, seconds: float, every: int) -> dict[str, Timed]:
    """Both optimisers at one batch size, until each has trained for so many seconds; measured every `every` images."""
    bf16 = hardware.has_bf16(torch.device("cpu"))
    runs = {
        name: Timed(
            configured(file, batch, name, lr_schedule="constant", warmup=50, steps=100_000), bf16
        )
        for name in NAMES
    }
    while waiting := [run for run in runs.values() if sum(run.seconds) < seconds]:
        for run in waiting:
            run.step()
            if run.images % every < batch or run.trainer.done == 1:
                run.measure()
    for run in runs.values():
        run.measure()
    return runs


def cells(found: tuple) -> list[str]:
    """Errors as they are printed."""
    return ["-" if value is None else f"{value:.4f}" for value in found]


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = bench.parser(__doc__)
    parser.add_argument(
        "--config", default=DEFAULT, help="one that trains by Muon: its matrix_lr is used"
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[32, 128])
    parser.add_argument(
        "--seconds", type=float, default=60, help="of training, for each optimiser and batch size"
    )
    parser.add_argument("--every", type=int, default=1280, help="images between two measurements")
    args = bench.parse(parser, argv)
    if args.quick:
        args.batch, args.seconds, args.every = [2], 0.2, 4
    bench.prepare()
    hardware.keep_freed_memory()
    rows, curves = [], {}
    for batch in args.batch:
        runs = race(args.config, batch, args.seconds, args.every)
        shared = max(set.intersection(*(set(run.curve) for run in runs.values())))
        for name, run in runs.items():
            at_end = run.curve[run.images]
            rows.append(
                [
                    batch,
                    name,
                    spread(run.seconds, ".2f"),
                    f"{run.images:,}",
                    *cells(at_end),
                    f"{shared:,}",
                    *cells(run.curve[shared]),
                ]
            )
            curves[f"{name}, batch {batch}"] = {n: found[1] for n, found in run.curve.items()}
        limits = f"What limits a step by Muon, batch {batch}, by torch's profiler: {bench.where(runs['muon'].trainer.step, 8)}."

    def draw(axes) -> str:
        for name, curve in curves.items():
            axes.plot(list(curve), list(curve.values()), label=name)
        axes.set(xlabel="images", ylabel="x_0 error at the noisiest timestep", yscale="log")
        axes.legend()
        return "AdamW and Muon by images seen"

    head = [
        "batch",
        "",
        "s a step",
        f"images in {args.seconds:g} s",
        "loss",
        "x_0 error",
        "held out",
        "at equal images",
        "loss",
        "x_0 error",
        "held out",
    ]
    bench.publish(
        args,
        __file__,
        bench.command_line(argv),
        "AdamW and Muon",
        f"`{args.config}`, one seed: a lead. Errors of the averaged weights on a fixed grid; x_0 errors are those at "
        "its noisiest timestep, where only the caption says what the picture is.",
        table(head, rows),
        limits,
        bench.figure(args, "muon", draw),
    )


if __name__ == "__main__":
    main()
