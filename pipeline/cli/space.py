"""`direct-jump space`: upload the demo as a Gradio Space."""

import argparse

from pipeline.cli.runner import run_cli
from pipeline.hub.space import ZERO_GPU, push_space


def main(argv: list[str] | None = None) -> int:
    """Upload the demo in one commit and print its address; 0 done, 1 not done, 2 bad input."""
    parser = argparse.ArgumentParser(
        prog="direct-jump space", description="Serve a model as a Space.", allow_abbrev=False
    )
    model = {"metavar": "USER/NAME[@REVISION]", "help": "pinned to the commit it is at now"}
    parser.add_argument("repo_id", metavar="USER/NAME", help="created if it does not exist")
    parser.add_argument("--model", required=True, **model)
    hardware = "of a new Space (default: %(default)s, which is free)"
    parser.add_argument("--hardware", default=ZERO_GPU, help=hardware)
    parser.add_argument("--private", action="store_true", help="create the Space as private")
    args = parser.parse_args(argv)
    options = {"hardware": args.hardware, "private": args.private}
    return run_cli(
        lambda: print(push_space(args.repo_id, args.model, **options)),
        "a push is one commit, complete or absent. Run the same command again.",
    )
