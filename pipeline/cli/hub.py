"""`direct-jump push`, `pull`, `export` and `space`."""

import argparse
import sys
from pathlib import Path

from pipeline.hub.client import HubError
from pipeline.hub.export import export, pull
from pipeline.hub.push import push
from pipeline.hub.space import push_space


def main(argv: list[str] | None = None) -> int:
    """The command line: 0 done, 1 not done, 2 a model that is not what was named; each is told in one sentence."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.hub",
        description="Share models through the Hugging Face Hub.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    pushing = commands.add_parser("push", help="upload a run or a saved pipeline")
    pushing.add_argument(
        "source", metavar="RUN_OR_PATH", help="a run's folder (runs/NAME) or a saved pipeline's"
    )
    pushing.add_argument(
        "--base",
        metavar="USER/NAME",
        help="of an adapter: the name on the Hub of the model that it adapts",
    )
    pulling = commands.add_parser("pull", help="download a model, without code")
    pulling.add_argument("model", metavar="USER/NAME[@REVISION]")
    pulling.add_argument("folder", type=Path, help="a new folder")
    shipping = commands.add_parser(
        "ship", help="make a run's model small enough for a git repository"
    )
    shipping.add_argument("source", metavar="RUN", help="a finished run's folder (runs/NAME)")
    shipping.add_argument("folder", type=Path, help="a new folder")
    showing = commands.add_parser("space", help="upload this project's page as a Space of a model")
    showing.add_argument(
        "--model",
        required=True,
        metavar="USER/NAME[@REVISION]",
        help="what it draws with, at that commit",
    )
    for command in (pushing, showing):
        command.add_argument(
            "repo_id", metavar="USER/NAME", help="where to; it is made where there is none"
        )
        command.add_argument(
            "--private", action="store_true", help="make it private, where it has to be made"
        )
    args = parser.parse_args(argv)
    try:
        if args.command == "push":
            print(push(args.source, args.repo_id, private=args.private, base=args.base))
        elif args.command == "ship":
            print(export(args.source, args.folder))
        elif args.command == "pull":
            print(pull(args.model, args.folder))
        else:
            print(push_space(args.repo_id, args.model, private=args.private))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, HubError) else 2
    return 0
