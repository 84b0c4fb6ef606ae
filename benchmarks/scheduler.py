"""`python benchmarks/scheduler.py`: `step` and `add_noise` beside diffusers', and their share of sampling.

The same numbers come out of both (asserted), so only the time differs. A step draws its noise, as in sampling: torch's draw
is the same in both and bounds the ratio from below.
"""

import sys
from pathlib import Path
from statistics import median

import diffusers
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import bench
from benchmarks.bench import ratios, spread, table, target
from benchmarks.sampling import Contenders, opened
from pipeline import config, hardware
from pipeline.diffusion.scheduler import DDPMScheduler

IMAGE = (4, 32, 32)  # 4,096 elements
SMALL = 2**16  # elements up to which the goal is half of diffusers' time
STEPS = 50


def calls(batch: int) -> dict[str, dict]:
    """What is timed for a batch of images of 4,096 elements, as (ours, theirs) by name; AssertionError where they differ."""
    settings = {"timestep_spacing": "trailing", "prediction_type": "epsilon"}
    schedulers = {
        "ours": DDPMScheduler(**settings),
        "diffusers": diffusers.DDPMScheduler(**settings),
    }
    x, eps = torch.randn(2, batch, *IMAGE, generator=torch.Generator().manual_seed(0))
    t = torch.randint(0, 1000, (batch,), generator=torch.Generator().manual_seed(1))
    found = {"step": {}, "add_noise": {}}
    for name, scheduler in schedulers.items():
        scheduler.set_timesteps(STEPS)
        at, generator = scheduler.timesteps[STEPS // 2], torch.Generator().manual_seed(0)

        def step(scheduler=scheduler, at=at, generator=generator):
            return scheduler.step(eps, at, x, generator=generator, return_dict=False)[0]

        found["step"][name] = step
        found["add_noise"][name] = lambda scheduler=scheduler: scheduler.add_noise(x, eps, t)
    for pair in found.values():
        torch.testing.assert_close(pair["ours"](), pair["diffusers"](), rtol=1e-4, atol=1e-4)
    return found


def again(call, times: int):
    """The call, so many times."""

    def repeated() -> None:
        for _ in range(times):
            call()

    return repeated


def compare(batches: list[int], repeats: int) -> tuple[str, list[str]]:
    """The table by size, and what it says of the goals."""
    rows, goals = [], []
    for batch in batches:
        elements = batch * 4096
        times = max(2**19 // elements, 4)  # calls a turn: long enough to be timed
        draw, generator = torch.empty(batch, *IMAGE), torch.Generator()
        (drawn,) = bench.in_turns(
            {"draw": again(lambda: draw.normal_(generator=generator), times)}, repeats
        ).values()
        row = [f"{elements:,}", spread(drawn, ".1f", 1e6 / times)]
        for name, pair in calls(batch).items():
            seconds = bench.in_turns(
                {who: again(call, times) for who, call in pair.items()}, repeats
            )
            share = ratios(seconds["ours"], seconds["diffusers"])
            row += [spread(seconds["ours"], ".1f", 1e6 / times), spread(share)]
            goal = 0.5 if elements <= SMALL else 1
            goals.append(
                target(
                    f"`{name}`, {elements:,} elements, ours / diffusers'",
                    median(share),
                    goal,
                    at_least=False,
                )
            )
        rows.append(row)
    names = [
        "elements",
        "a step's draw, µs",
        "`step`, µs",
        "ours / diffusers'",
        "`add_noise`, µs",
        "ours / diffusers'",
    ]
    return table(names, rows), goals


@torch.no_grad()
def share_of_sampling(pipe, batches: list[int], repeats: int, w: float) -> tuple[str, list[str]]:
    """The scheduler's share of a sampling step by batch: `step` beside the network's doubled call."""
    rows, goals, bf16 = [], [], hardware.has_bf16(torch.device("cpu"))
    for batch in batches:
        some = Contenders(pipe, batch, 2, w, bf16)
        scheduler, x = DDPMScheduler.from_config(pipe.scheduler.config), some.x_T
        scheduler.set_timesteps(STEPS)
        generators = some.generators()  # made once a picture
        step = lambda: scheduler.step(x, scheduler.timesteps[STEPS // 2], x, generator=generators)
        seconds = bench.in_turns({"step": again(step, 10), "network": some.bare}, repeats)
        one, call = [s / 10 for s in seconds["step"]], [s / 2 for s in seconds["network"]]
        shares = [a / (a + b) for a, b in zip(one, call, strict=True)]
        rows.append(
            [batch, spread(one, ".2f", 1000), spread(call, ".1f", 1000), spread(shares, ".2%")]
        )
        goals.append(
            target(
                f"share of sampling, batch {batch}",
                median(shares),
                0.01,
                at_least=False,
                form=".2%",
            )
        )
    return table(
        ["batch", "`step`, ms", "the network's doubled call, ms", "share of the two"], rows
    ), goals


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = bench.parser(__doc__)
    parser.add_argument(
        "--model", help="whose network (default: that of the newest run, else of pretrained/emoji)"
    )
    parser.add_argument("--config", default=config.DEFAULT, help="the shape of the random weights")
    parser.add_argument(
        "--batch",
        type=int,
        nargs="+",
        default=[1, 4, 16, 64, 256, 1024],
        help="of 4,096 elements each",
    )
    parser.add_argument("--repeats", type=int, default=15)
    args = bench.parse(parser, argv)
    if args.quick:
        args.batch, args.repeats = [1, 4], 3
    bench.prepare()
    pipe, name = opened(args.model, args.config)
    times, goals = compare(args.batch, args.repeats)
    shares, more = share_of_sampling(pipe, [1, 2] if args.quick else [1, 4, 16], args.repeats, 1.0)
    largest = calls(max(args.batch))
    limits = "What limits it at the largest size, by torch's profiler: " + "; ".join(
        f"`{what}`: {bench.where(pair['ours'])}" for what, pair in largest.items()
    )
    bench.publish(
        args,
        __file__,
        bench.command_line(argv),
        "Scheduler",
        f"One call, medians of {args.repeats} turns, with the least and the greatest.",
        times,
        "\n".join(goals),
        f"Beside the network of {name}:",
        shares,
        "\n".join(more),
        limits + ".",
    )


if __name__ == "__main__":
    main()
