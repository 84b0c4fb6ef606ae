"""`python benchmarks/growth.py`: time per image and peak memory against batch, resolution and steps; memory against the data set.

Every point is a process of its own: its peak is `ru_maxrss`. What a process holds before it draws or reads is told beside it.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import bench
from benchmarks.bench import spread, table, target

CONFIG = "configs/emoji-small.yaml"
BATCH = 64  # images read at a time


def held() -> float:
    """MiB that this process has held at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        2**20 if sys.platform == "darwin" else 2**10
    )


def anonymous() -> float | None:
    """MiB that this process holds now, without the pages of files that the kernel may take back; None where it does not say."""
    status = Path("/proc/self/status")
    lines = (
        [line for line in status.read_text().splitlines() if line.startswith("RssAnon")]
        if status.is_file()
        else []
    )
    return int(lines[0].split()[1]) / 2**10 if lines else None


# ---- the points


def draw(config: str, batch: int, side: int, steps: int, repeats: int) -> dict:
    """Seconds an image, and MiB, of drawing with random weights of a configuration at another size (side, in pixels)."""
    import torch

    from pipeline import hardware
    from pipeline.config import load
    from pipeline.diffusion.text_to_image import TextToImagePipeline
    from pipeline.models import build

    bench.prepare()
    chosen, _ = load(["--config", config, f"--data.resolution={side}"])
    torch.manual_seed(0)
    network, patches = build.build_unet(chosen, 384).eval(), build.build_autoencoder(chosen.model)
    pipe = TextToImagePipeline(
        network, build.build_scheduler(chosen.diffusion), vae=patches, caption_dropout=0.1
    )
    pipe.set_progress_bar_config(disable=True)
    states, before, seconds = torch.randn(2, batch, chosen.data.caption_length, 384), held(), []
    bf16 = hardware.has_bf16(torch.device("cpu"))
    for n in [1, *[steps] * repeats]:
        began = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            pipe(
                prompt_embeds=states[0],
                negative_prompt_embeds=states[1],
                w=1.0,
                seed=0,
                num_inference_steps=n,
            )
        seconds.append((time.perf_counter() - began) / batch)
    return {"seconds": seconds[1:], "before": before, "peak": held()}


def write(path: str, rows: int, side: int) -> dict:
    """A table of so many different pictures."""
    import datasets
    import numpy as np

    from benchmarks.training import encoded

    def example(i: int) -> dict:
        import torch

        pixels = np.empty((3, side, side), np.uint8)
        pixels[:] = np.array([i % 256, i // 256 % 256, 128], np.uint8)[:, None, None]
        pixels[:, : side // 2] ^= np.arange(side, dtype=np.uint8) * 3
        return {
            "image": {"bytes": encoded(torch.from_numpy(pixels)), "path": None},
            "text": f"picture {i}",
        }

    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_list([example(i) for i in range(rows)], features=features).to_parquet(
        path
    )
    return {}


def read(path: str, rows: int, side: int, streaming: bool) -> dict:
    """MiB of reading an epoch of a table, prepared before or streamed."""
    from pipeline.config import DataConfig
    from pipeline.data import dataset, sampler
    from pipeline.data.streaming import Stream

    config = DataConfig(
        path,
        held_out=None,
        resolution=side,
        streaming=streaming,
        cache=str(Path(path).parent / "cache"),
    )
    before, began = held(), time.perf_counter()
    if streaming:
        stream = Stream(config, seed=0)
        for _ in range(rows // BATCH):
            stream.take(BATCH)
        stream.close()
    else:
        images = dataset.load_split(config, config.split)
        for step in range(rows // BATCH):
            images.images[sampler.batch_indices(0, step, BATCH, len(images))]
    return {
        "seconds": [(time.perf_counter() - began) / rows],
        "before": before,
        "peak": held(),
        "anonymous": anonymous(),
    }


POINTS = {function.__name__: function for function in (draw, write, read)}


def point(kind: str, **values) -> dict:
    """What a process of its own finds at one point."""
    done = subprocess.run(
        [sys.executable, __file__, "--point", json.dumps([kind, values])],
        stdout=subprocess.PIPE,
        check=True,
        cwd=bench.ROOT,
    )
    return json.loads(done.stdout.splitlines()[-1])


# ---- the tables


def sampling(args: argparse.Namespace) -> tuple[str, dict[str, list]]:
    """The table of drawing, and its curves: one thing grows at a time."""
    rows, times, curves = {}, {}, {}
    for what, values in (("batch", args.batch), ("side", args.side), ("steps", args.steps)):
        curves[what] = []
        for value in values:
            at = {"batch": 1, "side": 64, "steps": 10} | {what: value}
            if (place := tuple(at.values())) not in rows:
                found = point("draw", config=args.config, repeats=args.repeats, **at)
                rows[place] = [
                    *place,
                    spread(found["seconds"], ".1f", 1000),
                    f"{found['peak']:.0f}",
                    f"{found['peak'] - found['before']:.0f}",
                ]
                times[place] = median(found["seconds"])
            curves[what].append((value, times[place]))
    return table(
        ["batch", "pixels a side", "steps", "ms an image", "peak, MiB", "of it to draw"],
        list(rows.values()),
    ), curves


def reading(args: argparse.Namespace) -> tuple[str, list[str]]:
    """The table of data sets by size, and what it says of the goals."""
    rows, needed = [], {False: [], True: []}
    with tempfile.TemporaryDirectory() as folder:
        for size in args.rows:
            path = str(Path(folder) / f"{size}.parquet")
            point("write", path=path, rows=size, side=64)
            for streaming in needed:
                found = point("read", path=path, rows=size, side=64, streaming=streaming)
                needed[streaming].append(found["peak"] - found["before"])
                kept = "-" if found["anonymous"] is None else f"{found['anonymous']:.0f}"
                rows.append(
                    [
                        f"{size:,}",
                        "streaming" if streaming else "map-style",
                        f"{found['peak']:.0f}",
                        f"{needed[streaming][-1]:.0f}",
                        kept,
                        spread(found["seconds"], ".2f", 1000),
                    ]
                )
    first, last = args.rows[
        -2:
    ]  # before that buffers fill: Arrow's, the allocator's, and the rows that are mixed
    growth = max(needed[True][-1] - needed[True][-2], 0) / (last - first) * 2**10
    goals = [
        target(f"streaming, KiB a row from {first:,} to {last:,} rows", growth, 1, at_least=False)
    ]
    head = [
        "rows of 64 x 64",
        "",
        "peak, MiB",
        "of it to read",
        "not of files, at the end",
        "ms a row, preparation too",
    ]
    return table(head, rows), goals


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = bench.parser(__doc__)
    parser.add_argument("--config", default=CONFIG)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--side", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 25, 50])
    parser.add_argument(
        "--rows",
        type=int,
        nargs="+",
        default=[2_000, 16_000, 48_000],
        help="of the data sets, two at the least",
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--point", help=argparse.SUPPRESS)
    args = bench.parse(parser, argv)
    if args.point:
        kind, values = json.loads(args.point)
        print(json.dumps(POINTS[kind](**values)))
        return
    if len(args.rows) < 2:
        parser.error(f"--rows is {args.rows}, expected two at the least: pass 2000 16000")
    if args.quick:
        args.batch, args.side, args.steps, args.rows, args.repeats = [1], [], [], [], 1
    drawn, curves = sampling(args)
    paragraphs = [
        f"Drawing with random weights of `{args.config}`, w = 1; medians of {args.repeats}, with the least and the "
        "greatest.",
        drawn,
    ]
    if args.rows:
        found, goals = reading(args)
        paragraphs += [
            "One epoch of a parquet table. Map-style data lies on disk and is mapped: its pages count in the peak, "
            "and the kernel takes them back when it needs them.",
            found,
            "\n".join(goals),
        ]

    def picture(axes) -> str:
        for what, curve in curves.items():
            axes.plot(
                [value for value, _ in curve], [seconds for _, seconds in curve], "o-", label=what
            )
        axes.set(
            xlabel="batch, pixels a side, or steps",
            ylabel="seconds an image",
            xscale="log",
            yscale="log",
        )
        axes.legend()
        return "seconds an image as one thing grows"

    bench.publish(
        args,
        __file__,
        bench.command_line(argv),
        "Growth",
        *paragraphs,
        bench.figure(args, "growth", picture),
    )


if __name__ == "__main__":
    main()
