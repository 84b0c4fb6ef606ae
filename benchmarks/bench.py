"""What the benchmarks share: calls timed in turns, intervals, and their sections of docs/benchmarks.md.

Nothing heavy is imported here, so that a benchmark's parent process stays small.
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
DOCUMENT, QUICK = (
    Path("docs/benchmarks.md"),
    Path("data/quick/benchmarks.md"),
)  # quick forms leave the document alone
PACKAGES = ("torch", "diffusers", "transformers", "accelerate")
DRAWS = 10_000  # of a bootstrap
SIDE = 4096  # of the matrices of `matmul_rate`


def parser(doc: str, **options) -> argparse.ArgumentParser:
    """The arguments that most benchmarks share."""
    arguments = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, **options
    )
    arguments.add_argument(
        "--quick",
        action="store_true",
        help="the smallest form, which shows that it runs and no more",
    )
    arguments.add_argument(
        "--output",
        type=Path,
        help=f"the document to write a section of, figures beside it ({DOCUMENT})",
    )
    return arguments


def parse(arguments: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The values of a command line; `--quick` writes to a document of its own unless told where."""
    values = arguments.parse_args(argv)
    values.output = values.output or (QUICK if values.quick else DOCUMENT)
    return values


def prepare() -> None:
    """Torch on every core that this process may use, and diffusers quiet about settings that a scheduler does not know."""
    import torch
    from diffusers.utils import logging

    torch.set_num_threads(cores())
    logging.set_verbosity_error()


def cores() -> int:
    """How many CPU cores this process may use: pipeline.machine's, without its imports."""
    return len(os.sched_getaffinity(0))


# ---- time


def matmul_rate(dtype) -> float:
    """FLOP/s of a square matrix product, the median of 5."""
    import torch

    a, b = torch.randn(SIDE, SIDE).to(dtype), torch.randn(SIDE, SIDE).to(dtype)
    return 2 * SIDE**3 / median(in_turns({"product": lambda: a @ b}, 5)["product"])


def in_turns(calls: dict[str, Callable], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call, `repeats` a name: each once to warm up, then A B C A B C …, so that a slow minute is everyone's."""
    for call in calls.values():
        call()
    seconds = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """above / below, turn by turn."""
    return [a / b for a, b in zip(above, below, strict=True)]


def spread(values: Sequence[float], form: str = ".2f", scale: float = 1.0) -> str:
    """The median of some values, and the least and the greatest of them."""
    low, middle, high = (
        format(scale * v, form) for v in (min(values), median(values), max(values))
    )
    return f"{middle} ({low} to {high})"


def where(call: Callable, n: int = 5) -> str:
    """The operators that take most of a call's time on the CPU, with their shares, by torch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    call()
    with profile(activities=[ProfilerActivity.CPU]) as record:
        call()
    found = sorted(record.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in found)
    return ", ".join(
        f"`{event.key}` {event.self_cpu_time_total / total:.0%}" for event in found[:n]
    )


# ---- intervals


def paired(
    mine: Sequence[float], theirs: Sequence[float], seed: int = 0
) -> tuple[float, float, float]:
    """The mean of mine - theirs over the same examples, and its 95 % bootstrap interval."""
    apart = np.asarray(mine, float) - np.asarray(theirs, float)
    means = apart[np.random.default_rng(seed).integers(0, len(apart), (DRAWS, len(apart)))].mean(1)
    return float(apart.mean()), *(float(bound) for bound in np.quantile(means, [0.025, 0.975]))


def points(interval: tuple[float, float, float]) -> str:
    """A difference of shares with its interval, in percentage points."""
    middle, low, high = (f"{100 * value:+.1f}" for value in interval)
    return f"{middle} ({low} to {high})"


# ---- the document


def machine() -> str:
    """The processor, the cores that may be used, and the versions, in a line."""
    versions = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]
    return ", ".join(
        [processor(), f"{cores()} cores", f"Python {platform.python_version()}", *versions]
    )


def processor() -> str:
    """The processor's name, and the widest of its instruction sets that matters here."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.is_file() else ""
    name = re.search(r"^model name\s*: (.*)$", text, re.M)
    wide = next(
        (
            flag
            for flag in ("amx_bf16", "avx512_bf16", "avx512f", "avx2")
            if re.search(rf"\b{flag}\b", text)
        ),
        "",
    )
    return " ".join(
        [name[1].strip() if name else platform.processor() or platform.machine(), wide]
    ).strip()


def table(head: Sequence[str], rows: Sequence[Sequence]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def target(what: str, value: float, goal: float, at_least: bool = True, form: str = ".2f") -> str:
    """A list item that says whether a goal is met."""
    met = value >= goal if at_least else value <= goal
    return f"- {what}: {value:{form}}, the goal is {'≥' if at_least else '≤'} {goal:g}: **{'met' if met else 'not met'}**."


def publish(
    arguments: argparse.Namespace, script: str, argv: Sequence[str], title: str, *paragraphs: str
) -> None:
    """Print a section and put it between its markers in the document, or at its end where it has none."""
    section = Path(script).stem
    command = shlex.join(["python", f"benchmarks/{Path(script).name}", *argv])
    body = "\n\n".join([f"## {title}", f"Command: `{command}`\n\n{machine()}.", *paragraphs])
    print(body, flush=True)
    put(arguments.output, f"<!-- {section}: generated -->", f"<!-- {section}: end -->", body)


def put(path: Path, begin: str, end: str, body: str, before: str = "") -> None:
    """Put a text between its markers in a document, or with them at its end, after `before`, where it has none."""
    text = path.read_text(encoding="utf-8") if path.is_file() else "# Benchmarks\n"
    pattern, section = (
        re.compile(re.escape(begin) + ".*?" + re.escape(end), re.S),
        f"{begin}\n{body}\n{end}",
    )
    text = (
        pattern.sub(lambda _: section, text)
        if pattern.search(text)
        else f"{text.rstrip()}\n\n{before}{section}\n"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def figure(arguments: argparse.Namespace, name: str, draw: Callable) -> str:
    """A figure beside the document, by `draw(axes)`, as a Markdown image."""
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(7, 4), layout="constrained")
    alt = draw(canvas.subplots())
    path = arguments.output.parent / "figures" / f"bench-{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(path, dpi=110)
    return f"![{alt}](figures/{path.name})"


def command_line(argv: Sequence[str] | None) -> list[str]:
    """The arguments of a call to `main`."""
    return sys.argv[1:] if argv is None else list(argv)
