"""`direct-jump export`: write a run for a git repository, or as one file for other programs."""

import argparse
from pathlib import Path

from pipeline.cli.runner import run_cli
from pipeline.hub.client import HubError
from pipeline.hub.export import export
from pipeline.hub.single_file import export_single_file


def main(argv: list[str] | None = None) -> int:
    """Write a run to a new folder or file and print its name; 0 done, 1 not done, 2 bad input."""
    parser = argparse.ArgumentParser(
        prog="direct-jump export",
        description="Save a run's model in bf16 shards, without code or text encoder. Or save one "
        "file for ComfyUI and others: an adapter in kohya's keys, a whole model as a checkpoint.",
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="RUN", help="a finished run's folder (runs/NAME)")
    parser.add_argument("target", type=Path, help="a new folder, or a new file NAME.safetensors")
    parser.add_argument(
        "--merge", action="store_true", help="write an adapter's file with its base model in it"
    )
    args = parser.parse_args(argv)

    def write() -> None:
        if args.target.suffix == ".safetensors":
            print(export_single_file(args.source, args.target, merge=args.merge))
        elif args.merge:
            raise HubError(f"--merge writes a file NAME.safetensors, got {args.target}.")
        else:
            print(export(args.source, args.target))

    return run_cli(write, "nothing was written.")
