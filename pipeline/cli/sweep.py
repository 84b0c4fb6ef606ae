"""`direct-jump sweep`: measure what sampling parameters change."""

import argparse
from pathlib import Path

from pipeline.cli.evaluate import positive_int
from pipeline.cli.runner import run_cli
from pipeline.evaluation.sweep import sweep


def main(argv: list[str] | None = None) -> int:
    """Measure every point and print the table; 0 done, 2 bad input, 130 interrupted."""
    parser = argparse.ArgumentParser(
        prog="direct-jump sweep",
        allow_abbrev=False,
        description="Change one sampling parameter at a time, and measure quality and alignment.",
    )
    parser.add_argument(
        "run", type=Path, help="a run's folder, or a saved pipeline with config.yaml"
    )
    parser.add_argument(
        "parameters",
        nargs="+",
        metavar="PARAMETER=A,B",
        help="such as w=0,1,2,4 steps=10,25,50 eta=0,1 interval=0:1,0.3:0.9 weights=averaged,raw",
    )
    parser.add_argument("--w", type=float, help="of the base (default: the model's own)")
    parser.add_argument("--steps", type=positive_int, default=50, help="of the base (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="of the samples (default: 0)")
    parser.add_argument(
        "--on", type=positive_int, default=256, help="captions at every point (default: 256)"
    )
    parser.add_argument(
        "--batch", type=positive_int, default=32, help="images a call (default: 32)"
    )
    args = parser.parse_args(argv)
    options = {"w": args.w, "seed": args.seed, "on": args.on, "batch": args.batch}
    return run_cli(
        lambda: print(sweep(args.run, args.parameters, steps=args.steps, **options)),
        "samples are cached. Run the same command to resume.",
    )
