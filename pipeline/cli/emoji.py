"""`direct-jump emoji`: write an embedded emoji dataset as an image folder."""

import argparse

from pipeline.cli.runner import run_cli
from pipeline.data.emoji.catalogue import CATEGORIES, SETS


def write(args: argparse.Namespace) -> None:
    """Write the dataset and print how many emoji it has."""
    # Imported here, because torch takes seconds and --help needs none of it.
    from pipeline.data.emoji.writer import read_manifest, write_emoji

    categories = tuple(args.categories) if args.categories else None
    folder = write_emoji(
        args.folder, args.set, args.size, categories, args.skin_tones, args.font, args.style
    )
    manifest = read_manifest(folder) or {}
    counts = {part: len(manifest.get(part, [])) for part in ("train", "test", "left_out")}
    left_out = f", {counts['left_out']} left out" if counts["left_out"] else ""
    print(f"{folder}: {counts['train']} training emoji, {counts['test']} held out{left_out}")


def main(argv: list[str] | None = None) -> int:
    """Write a dataset; 0 written, 2 refused."""
    parser = argparse.ArgumentParser(
        prog="direct-jump emoji",
        description="Write an embedded emoji dataset as an image folder.",
        allow_abbrev=False,
    )
    parser.add_argument("folder")
    parser.add_argument("--set", default="emoji", help="; ".join(SETS))
    parser.add_argument("--size", type=int, default=64, help="pixels; Twemoji's own is 72")
    parser.add_argument(
        "--categories", nargs="+", help=f"some of: {'; '.join(CATEGORIES)} (default: all but Flags)"
    )
    parser.add_argument("--skin-tones", action="store_true", help="also people's five skin tones")
    parser.add_argument(
        "--font", help="a colour emoji font (NotoColorEmoji.ttf) instead of Twemoji"
    )
    parser.add_argument("--style", default="", help='end of every caption: "in noto style"')
    args = parser.parse_args(argv)
    return run_cli(lambda: write(args), "no dataset was written.")
