"""`direct-jump pull`: download a model from the Hub, without its code."""

import argparse
from pathlib import Path

from pipeline.cli.runner import run_cli
from pipeline.hub.export import pull


def main(argv: list[str] | None = None) -> int:
    """Copy a model into a new folder and print the folder; 0 done, 1 not done, 2 bad input."""
    parser = argparse.ArgumentParser(
        prog="direct-jump pull", description="Download a model from the Hub.", allow_abbrev=False
    )
    parser.add_argument("model", metavar="USER/NAME[@REVISION]")
    parser.add_argument("folder", type=Path, help="a new folder")
    args = parser.parse_args(argv)
    return run_cli(lambda: print(pull(args.model, args.folder)), "no folder was written.")
