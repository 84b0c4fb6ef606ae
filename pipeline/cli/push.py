"""`direct-jump push`: upload a run or a saved pipeline to the Hub."""

import argparse

from pipeline.cli.runner import run_cli
from pipeline.hub.push import push


def main(argv: list[str] | None = None) -> int:
    """Upload in one commit and print its address; 0 done, 1 not done, 2 bad input."""
    parser = argparse.ArgumentParser(
        prog="direct-jump push", description="Upload a model to the Hub.", allow_abbrev=False
    )
    parser.add_argument("source", metavar="RUN_OR_PATH", help="a run or a saved pipeline")
    parser.add_argument("repo_id", metavar="USER/NAME", help="created if it does not exist")
    parser.add_argument("--private", action="store_true", help="create the repository as private")
    parser.add_argument("--base", metavar="USER/NAME", help="an adapter's base model on the Hub")
    args = parser.parse_args(argv)
    return run_cli(
        lambda: print(push(args.source, args.repo_id, private=args.private, base=args.base)),
        "a push is one commit, complete or absent. Run the same command again.",
    )
