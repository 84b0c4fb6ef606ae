"""What the benchmarks share: timing in turns, intervals, and their sections of docs/benchmarks.md.

Nothing heavy is imported here, which keeps a benchmark's parent process small.
"""

import argparse
import importlib.metadata
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import numpy as np

ROOT = Path(__file__).parent.parent
DOCUMENT = Path("docs/benchmarks.md")
QUICK_DOCUMENT = Path("data/quick/benchmarks.md")  # --quick leaves the document alone
PACKAGES = ("torch", "diffusers", "transformers", "accelerate")
RESAMPLES = 10_000
MATRIX_SIZE = 4096


def parser(doc: str, **options) -> argparse.ArgumentParser:
    """Return a parser with the arguments that most benchmarks share."""
    formatter = argparse.RawDescriptionHelpFormatter
    arguments = argparse.ArgumentParser(description=doc, formatter_class=formatter, **options)
    arguments.add_argument("--quick", action="store_true", help="only check that it runs")
    arguments.add_argument(
        "--output", type=Path, help=f"the document to write a section of (default: {DOCUMENT})"
    )
    return arguments


def parse(arguments: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse a command line; by default --quick writes to a document of its own."""
    values = arguments.parse_args(argv)
    values.output = values.output or (QUICK_DOCUMENT if values.quick else DOCUMENT)
    return values


def prepare() -> None:
    """Let torch use all cores, and silence diffusers' notes on unknown settings."""
    import torch
    from diffusers.utils import logging

    torch.set_num_threads(cores())
    logging.set_verbosity_error()


def cores() -> int:
    """Return how many CPU cores this process may use; pipeline.hardware's imports are heavy."""
    return len(os.sched_getaffinity(0))


# ---- time


def matmul_rate(dtype) -> float:
    """Return the FLOP/s of a square matrix product, the median of 5."""
    import torch

    a = torch.randn(MATRIX_SIZE, MATRIX_SIZE).to(dtype)
    b = torch.randn(MATRIX_SIZE, MATRIX_SIZE).to(dtype)
    return 2 * MATRIX_SIZE**3 / median(in_turns({"product": lambda: a @ b}, 5)["product"])


def in_turns(calls: dict[str, Callable], repeats: int) -> dict[str, list[float]]:
    """Time each call `repeats` times, in seconds, after one to warm up.

    The order is A B C A B C …, so a slow minute slows them all.
    """
    for call in calls.values():
        call()
    seconds = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Return above / below, turn by turn."""
    return [a / b for a, b in zip(above, below, strict=True)]


def spread(values: Sequence[float], form: str = ".2f", scale: float = 1.0) -> str:
    """Return the median of some values with their minimum and maximum."""
    low, middle, high = (scale * f(values) for f in (min, median, max))
    return f"{middle:{form}} ({low:{form}} to {high:{form}})"


def profile_call(call: Callable, n: int = 5) -> str:
    """Return the n operators that take most of a call's CPU time, with their shares."""
    from torch.profiler import ProfilerActivity, profile

    call()
    with profile(activities=[ProfilerActivity.CPU]) as record:
        call()
    events = sorted(record.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    shares = [f"`{event.key}` {event.self_cpu_time_total / total:.0%}" for event in events[:n]]
    return ", ".join(shares)


# ---- intervals


def paired(
    ours: Sequence[float], theirs: Sequence[float], seed: int = 0
) -> tuple[float, float, float]:
    """Return the mean of ours - theirs over the same examples, with its 95 % bootstrap interval."""
    difference = np.asarray(ours, float) - np.asarray(theirs, float)
    n = len(difference)
    rows = np.random.default_rng(seed).integers(0, n, (RESAMPLES, n))
    low, high = np.quantile(difference[rows].mean(1), [0.025, 0.975])
    return float(difference.mean()), float(low), float(high)


def points(interval: tuple[float, float, float]) -> str:
    """Return a difference of proportions with its interval, in percentage points."""
    middle, low, high = (f"{100 * value:+.1f}" for value in interval)
    return f"{middle} ({low} to {high})"


# ---- the document


def machine() -> str:
    """Return the processor, the usable cores and the versions, in one line."""
    versions = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]
    parts = [processor(), f"{cores()} cores", f"Python {platform.python_version()}", *versions]
    return ", ".join(parts)


def processor() -> str:
    """Return the processor's name, and the widest of its instruction sets that matters here."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.is_file() else ""
    found = re.search(r"^model name\s*: (.*)$", text, re.M)
    name = found[1].strip() if found else platform.processor() or platform.machine()
    for flag in ("amx_bf16", "avx512_bf16", "avx512f", "avx2"):
        if re.search(rf"\b{flag}\b", text):
            return f"{name} {flag}"
    return name


def table(head: Sequence[str], rows: Sequence[Sequence]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def target(what: str, value: float, goal: float, at_least: bool = True, form: str = ".2f") -> str:
    """Return a list item that says whether a goal is met."""
    met = value >= goal if at_least else value <= goal
    sign = "≥" if at_least else "≤"
    verdict = "met" if met else "not met"
    return f"- {what}: {value:{form}}, the goal is {sign} {goal:g}: **{verdict}**."


def publish(
    arguments: argparse.Namespace,
    script: str,
    argv: Sequence[str] | None,
    title: str,
    *paragraphs: str,
) -> None:
    """Print a section and put it between its markers in the document, or at its end."""
    section = Path(script).stem
    command = shlex.join(["python", f"benchmarks/{Path(script).name}", *command_line(argv)])
    body = "\n\n".join([f"## {title}", f"Command: `{command}`\n\n{machine()}.", *paragraphs])
    print(body, flush=True)
    put(arguments.output, f"<!-- {section}: generated -->", f"<!-- {section}: end -->", body)


def put(path: Path, begin: str, end: str, body: str, before: str = "") -> None:
    """Put a text between its markers in a document; without markers, at its end after `before`."""
    text = path.read_text(encoding="utf-8") if path.is_file() else "# Benchmarks\n"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.S)
    section = f"{begin}\n{body}\n{end}"
    if pattern.search(text):
        text = pattern.sub(lambda _: section, text)
    else:
        text = f"{text.rstrip()}\n\n{before}{section}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def figure(arguments: argparse.Namespace, name: str, plot: Callable) -> str:
    """Save a figure beside the document and return it as a Markdown image.

    plot(axes) plots it and returns its alternative text.
    """
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(7, 4), layout="constrained")
    alt = plot(canvas.subplots())
    path = arguments.output.parent / "figures" / f"bench-{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(path, dpi=110)
    return f"![{alt}](figures/{path.name})"


def command_line(argv: Sequence[str] | None) -> list[str]:
    """Return the arguments of a call to `main`."""
    return sys.argv[1:] if argv is None else list(argv)
