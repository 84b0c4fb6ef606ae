"""`python benchmarks/scheduler.py`: `step` and `add_noise` beside diffusers'.

Both return the same numbers (asserted), so only the time differs. A step samples its noise, as in
sampling. torch's noise costs the same in both and bounds the ratio from below. The section also has
the scheduler's share of sampling.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

import diffusers
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import bench
from benchmarks.bench import ratios, spread, table, target
from benchmarks.sampling import Contenders, load_or_build
from pipeline import TextToImagePipeline, hardware
from pipeline.config import DEFAULT
from pipeline.diffusion.scheduler import DDPMScheduler

IMAGE = (4, 32, 32)  # 4,096 elements
SMALL = 2**16  # elements up to which the goal is half of diffusers' time
STEPS = 50


def build_calls(batch: int) -> dict[str, dict[str, Callable]]:
    """Return the timed calls by method and library; AssertionError if their results differ."""
    settings = {"timestep_spacing": "trailing", "prediction_type": "epsilon"}
    ours = DDPMScheduler(**settings)
    theirs = diffusers.DDPMScheduler(**settings)
    x, eps = torch.randn(2, batch, *IMAGE, generator=torch.Generator().manual_seed(0))
    t = torch.randint(0, 1000, (batch,), generator=torch.Generator().manual_seed(1))
    found = {"step": {}, "add_noise": {}}
    for name, scheduler in {"ours": ours, "diffusers": theirs}.items():
        scheduler.set_timesteps(STEPS)
        at = scheduler.timesteps[STEPS // 2]
        generator = torch.Generator().manual_seed(0)

        def step(scheduler=scheduler, at=at, generator=generator):
            return scheduler.step(eps, at, x, generator=generator, return_dict=False)[0]

        found["step"][name] = step
        found["add_noise"][name] = lambda scheduler=scheduler: scheduler.add_noise(x, eps, t)
    for pair in found.values():
        torch.testing.assert_close(pair["ours"](), pair["diffusers"](), rtol=1e-4, atol=1e-4)
    return found


def repeated(call: Callable, times: int) -> Callable[[], None]:
    """Return a call that makes this one several times."""

    def calls() -> None:
        for _ in range(times):
            call()

    return calls


def compare(batches: list[int], repeats: int) -> tuple[str, list[str]]:
    """Return the table by size, and what it says of the goals."""
    rows = []
    goals = []
    for batch in batches:
        elements = batch * 4096
        # Calls a turn: long enough to be timed.
        times = max(2**19 // elements, 4)
        scale = 1e6 / times
        noise = torch.empty(batch, *IMAGE)
        generator = torch.Generator()

        def sample_noise(noise=noise, generator=generator):
            noise.normal_(generator=generator)

        seconds = bench.in_turns({"noise": repeated(sample_noise, times)}, repeats)
        row = [f"{elements:,}", spread(seconds["noise"], ".1f", scale)]
        for name, pair in build_calls(batch).items():
            calls = {library: repeated(call, times) for library, call in pair.items()}
            seconds = bench.in_turns(calls, repeats)
            ratio = ratios(seconds["ours"], seconds["diffusers"])
            row += [spread(seconds["ours"], ".1f", scale), spread(ratio)]
            goal = 0.5 if elements <= SMALL else 1
            what = f"`{name}`, {elements:,} elements, ours / diffusers'"
            goals.append(target(what, median(ratio), goal, at_least=False))
        rows.append(row)
    ratio = "ours / diffusers'"
    head = ["elements", "a step's noise, µs", "`step`, µs", ratio, "`add_noise`, µs", ratio]
    return table(head, rows), goals


@torch.no_grad()
def share_of_sampling(
    pipe: TextToImagePipeline, batches: list[int], repeats: int, w: float
) -> tuple[str, list[str]]:
    """Return the scheduler's share of a sampling step by batch, beside the network's call."""
    rows = []
    goals = []
    bf16 = hardware.has_bf16(torch.device("cpu"))
    for batch in batches:
        some = Contenders(pipe, batch, 2, w, bf16)
        scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
        scheduler.set_timesteps(STEPS)
        t = scheduler.timesteps[STEPS // 2]
        x = some.x_T
        generators = some.generators()

        def step(scheduler=scheduler, t=t, x=x, generators=generators):
            return scheduler.step(x, t, x, generator=generators)

        seconds = bench.in_turns(
            {"step": repeated(step, 10), "network": some.call_network}, repeats
        )
        one_step = [s / 10 for s in seconds["step"]]
        one_call = [s / 2 for s in seconds["network"]]
        shares = [a / (a + b) for a, b in zip(one_step, one_call, strict=True)]
        times = [spread(one_step, ".2f", 1000), spread(one_call, ".1f", 1000)]
        rows.append([batch, *times, spread(shares, ".2%")])
        what = f"share of sampling, batch {batch}"
        goals.append(target(what, median(shares), 0.01, at_least=False, form=".2%"))
    head = ["batch", "`step`, ms", "the network's doubled call, ms", "share of the two"]
    return table(head, rows), goals


def main(argv: list[str] | None = None) -> None:
    """Measure and write the section."""
    parser = bench.parser(__doc__)
    add = parser.add_argument
    add("--model", help="whose network (default: the newest run's, else pretrained/emoji's)")
    add("--config", default=DEFAULT, help="the shape of the random weights")
    add("--batch", type=int, nargs="+", default=[1, 4, 16, 64, 256, 1024], help="of 4,096 elements")
    add("--repeats", type=int, default=15)
    args = bench.parse(parser, argv)
    if args.quick:
        args.batch = [1, 4]
        args.repeats = 3
    bench.prepare()
    pipe, name = load_or_build(args.model, args.config)
    times, goals = compare(args.batch, args.repeats)
    batches = [1, 2] if args.quick else [1, 4, 16]
    shares, share_goals = share_of_sampling(pipe, batches, args.repeats, 1.0)
    profiles = [
        f"`{method}`: {bench.profile_call(pair['ours'])}"
        for method, pair in build_calls(max(args.batch)).items()
    ]
    bench.publish(
        args,
        __file__,
        argv,
        "Scheduler",
        f"One call, medians of {args.repeats} turns with minimum and maximum.",
        times,
        "\n".join(goals),
        f"Beside the network of {name}:",
        shares,
        "\n".join(share_goals),
        f"What limits it at the largest size, by torch's profiler: {'; '.join(profiles)}.",
    )


if __name__ == "__main__":
    main()
