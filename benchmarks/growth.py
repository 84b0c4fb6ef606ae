"""`python benchmarks/growth.py`: time and peak memory as batch, resolution, steps and dataset grow.

Every point is a process of its own: its peak is `ru_maxrss`. The tables also have what a process
holds before it samples or reads.
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
CAPTION_WIDTH = 384


def peak_memory() -> float:
    """Return the most MiB that this process has held so far."""
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def anonymous_memory() -> float | None:
    """Return the MiB that this process holds now without pages of files; None if unknown."""
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.is_file() else []:
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 2**10
    return None


# ---- the points


def sample_point(config: str, batch: int, side: int, steps: int, repeats: int) -> dict:
    """Return seconds an image and MiB of sampling with random weights at a side in pixels."""
    import torch

    from pipeline import TextToImagePipeline, hardware
    from pipeline.config import load
    from pipeline.models import build

    bench.prepare()
    chosen, _ = load(["--config", config, f"--data.resolution={side}"])
    torch.manual_seed(0)
    network = build.build_unet(chosen, CAPTION_WIDTH, build.build_autoencoder(chosen.model)).eval()
    scheduler = build.build_scheduler(chosen.diffusion)
    vae = build.build_autoencoder(chosen.model)
    pipe = TextToImagePipeline(network, scheduler, vae=vae, caption_dropout=0.1)
    pipe.set_progress_bar_config(disable=True)
    states = torch.randn(2, batch, chosen.data.caption_length, CAPTION_WIDTH)
    prompts = {"prompt_embeds": states[0], "negative_prompt_embeds": states[1]}
    before = peak_memory()
    seconds = []
    bf16 = hardware.has_bf16(torch.device("cpu"))
    for n in [1, *[steps] * repeats]:
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            pipe(**prompts, w=1.0, seed=0, num_inference_steps=n)
        seconds.append((time.perf_counter() - start) / batch)
    return {"seconds": seconds[1:], "before": before, "peak": peak_memory()}


def write_point(path: str, rows: int, side: int) -> dict:
    """Write a table of distinct images."""
    import datasets
    import numpy as np
    import torch

    from benchmarks.training import encode_png

    def example(i: int) -> dict:
        pixels = np.empty((3, side, side), np.uint8)
        pixels[:] = np.array([i % 256, i // 256 % 256, 128], np.uint8)[:, None, None]
        pixels[:, : side // 2] ^= np.arange(side, dtype=np.uint8) * 3
        content = encode_png(torch.from_numpy(pixels))
        return {"image": {"bytes": content, "path": None}, "text": f"image {i}"}

    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    examples = [example(i) for i in range(rows)]
    datasets.Dataset.from_list(examples, features=features).to_parquet(path)
    return {}


def read_point(path: str, rows: int, side: int, streaming: bool) -> dict:
    """Return the MiB of reading an epoch of a table, prepared beforehand or streamed."""
    from pipeline.config import DataConfig
    from pipeline.data.dataset import load_split
    from pipeline.data.sampler import batch_indices
    from pipeline.data.streaming import Stream

    cache = str(Path(path).parent / "cache")
    settings = {"held_out": None, "resolution": side, "streaming": streaming, "cache": cache}
    config = DataConfig(source=path, **settings)
    before = peak_memory()
    start = time.perf_counter()
    if streaming:
        stream = Stream(config, seed=0)
        for _ in range(rows // BATCH):
            stream.take(BATCH)
        stream.close()
    else:
        images = load_split(config, config.split)
        for step in range(rows // BATCH):
            images.images[batch_indices(0, step, BATCH, len(images))]
    seconds = [(time.perf_counter() - start) / rows]
    memory = {"before": before, "peak": peak_memory(), "anonymous": anonymous_memory()}
    return {"seconds": seconds, **memory}


POINTS = {function.__name__: function for function in (sample_point, write_point, read_point)}


def run_point(kind: str, **values) -> dict:
    """Return what a process of its own finds at one point."""
    command = [sys.executable, __file__, "--point", json.dumps([kind, values])]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, cwd=bench.ROOT)
    return json.loads(done.stdout.splitlines()[-1])


# ---- the tables


def measure_sampling(args: argparse.Namespace) -> tuple[str, dict[str, list]]:
    """Return the table of sampling, and its curves: one value grows at a time."""
    rows = {}
    times = {}
    curves = {}
    for what, values in (("batch", args.batch), ("side", args.side), ("steps", args.steps)):
        curves[what] = []
        for value in values:
            at = {"batch": 1, "side": 64, "steps": 10} | {what: value}
            place = tuple(at.values())
            if place not in rows:
                found = run_point("sample_point", config=args.config, repeats=args.repeats, **at)
                needed = found["peak"] - found["before"]
                memory = [f"{found['peak']:.0f}", f"{needed:.0f}"]
                rows[place] = [*place, spread(found["seconds"], ".1f", 1000), *memory]
                times[place] = median(found["seconds"])
            curves[what].append((value, times[place]))
    head = ["batch", "pixels a side", "steps", "ms an image", "peak, MiB", "of it to sample"]
    return table(head, list(rows.values())), curves


def measure_reading(args: argparse.Namespace) -> tuple[str, str]:
    """Return the table of datasets by size, and what it says of the goal."""
    rows = []
    needed = {False: [], True: []}
    with tempfile.TemporaryDirectory() as folder:
        for size in args.rows:
            at = {"path": str(Path(folder) / f"{size}.parquet"), "rows": size, "side": 64}
            run_point("write_point", **at)
            for streaming in needed:
                found = run_point("read_point", streaming=streaming, **at)
                needed[streaming].append(found["peak"] - found["before"])
                anonymous = found["anonymous"]
                memory = [f"{found['peak']:.0f}", f"{needed[streaming][-1]:.0f}"]
                memory.append("-" if anonymous is None else f"{anonymous:.0f}")
                name = "streaming" if streaming else "map-style"
                rows.append([f"{size:,}", name, *memory, spread(found["seconds"], ".2f", 1000)])
    # Before the last two sizes buffers fill: Arrow's, the allocator's, and the rows that are mixed.
    first, last = args.rows[-2:]
    growth = max(needed[True][-1] - needed[True][-2], 0) / (last - first) * 2**10
    what = f"streaming, KiB a row from {first:,} to {last:,} rows"
    head = ["rows of 64 x 64", "", "peak, MiB", "of it to read", "not of files, at the end"]
    head.append("ms a row, preparation included")
    return table(head, rows), target(what, growth, 1, at_least=False)


def main(argv: list[str] | None = None) -> None:
    """Measure and write the section."""
    parser = bench.parser(__doc__)
    add = parser.add_argument
    add("--config", default=CONFIG)
    add("--batch", type=int, nargs="+", default=[1, 4, 16, 64])
    add("--side", type=int, nargs="+", default=[64, 128, 256])
    add("--steps", type=int, nargs="+", default=[10, 25, 50])
    sizes = [2_000, 16_000, 48_000]
    add("--rows", type=int, nargs="+", default=sizes, help="of the datasets, two or more")
    add("--repeats", type=int, default=3)
    add("--point", help=argparse.SUPPRESS)
    args = bench.parse(parser, argv)
    if args.point:
        kind, values = json.loads(args.point)
        print(json.dumps(POINTS[kind](**values)))
        return
    if len(args.rows) < 2:
        parser.error(f"--rows needs two or more sizes, got {args.rows}")
    if args.quick:
        args.batch = [1]
        args.side = args.steps = args.rows = []
        args.repeats = 1
    sampled, curves = measure_sampling(args)
    paragraphs = [
        f"Sampling with random weights of `{args.config}`, w = 1; medians of {args.repeats} with "
        "minimum and maximum.",
        sampled,
    ]
    if args.rows:
        found, goal = measure_reading(args)
        paragraphs += [
            "One epoch of a parquet table. Map-style data lies on disk and is memory-mapped: its "
            "pages count in the peak, and the kernel takes them back when it needs them.",
            found,
            goal,
        ]

    def plot(axes) -> str:
        for what, curve in curves.items():
            axes.plot(*zip(*curve, strict=True) if curve else ([], []), "o-", label=what)
        axes.set(xlabel="batch, pixels a side, or steps", ylabel="seconds an image")
        axes.set(xscale="log", yscale="log")
        axes.legend()
        return "seconds an image as one value grows"

    bench.publish(args, __file__, argv, "Growth", *paragraphs, bench.figure(args, "growth", plot))


if __name__ == "__main__":
    main()
