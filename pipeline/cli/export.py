"""`direct-jump export`: make a run's model small enough for a git repository."""

import argparse
from pathlib import Path

from pipeline.cli.runner import run_cli
from pipeline.hub.export import export


def main(argv: list[str] | None = None) -> int:
    """Write a run's model into a new folder and print it; 0 done, 1 not done, 2 bad input."""
    parser = argparse.ArgumentParser(
        prog="direct-jump export",
        description="Save a run's model in bf16 shards, without code or text encoder.",
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="RUN", help="a finished run's folder (runs/NAME)")
    parser.add_argument("folder", type=Path, help="a new folder")
    args = parser.parse_args(argv)
    return run_cli(lambda: print(export(args.source, args.folder)), "no folder was written.")
