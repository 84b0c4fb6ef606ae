"""`direct-jump emoji`: write an embedded emoji dataset as an image folder."""

import argparse
from pathlib import Path

from pipeline.cli.runner import run_cli
from pipeline.data.emoji.catalogue import CATEGORIES, SETS, EmojiError
from pipeline.data.emoji.styles import STYLES

MONSTERS = "monsters"


def write(args: argparse.Namespace) -> None:
    """Write a dataset of one style and print how many emoji it has."""
    # Imported here, because torch takes seconds and --help needs none of it.
    from pipeline.data.emoji.writer import read_manifest, write_emoji

    size = 64 if args.size is None else args.size
    categories = tuple(args.categories) if args.categories else None
    folder = write_emoji(
        args.folder, args.set, size, categories, args.skin_tones, args.font, args.style
    )
    manifest = read_manifest(folder) or {}
    counts = {part: len(manifest.get(part, [])) for part in ("train", "test", "left_out")}
    print_counts(folder, counts, "emoji")


def write_drawings(args: argparse.Namespace, others: list[str]) -> None:
    """Write the dataset of styles or of monsters and print how many images it has."""
    from pipeline.data.emoji.monsters import write_monsters
    from pipeline.data.emoji.style_set import write_styles
    from pipeline.data.emoji.writer import read_manifest

    name = "--set monsters" if args.styles is None else "--styles"
    if others:
        raise EmojiError(f"{name} takes no {', '.join(others)}. Leave one of them out.")
    if args.styles is None:
        folder = write_monsters(args.folder, 64 if args.size is None else args.size)
    else:
        size = 128 if args.size is None else args.size
        folder = write_styles(args.folder, tuple(args.styles), size)
    manifest = read_manifest(folder) or {}
    counts = manifest["images"] | {"left_out": len(manifest.get("left_out", []))}
    print_counts(folder, counts, "images")


def print_counts(folder: Path, counts: dict[str, int], noun: str) -> None:
    """Print how large the splits are."""
    left_out = f", {counts['left_out']} left out" if counts["left_out"] else ""
    print(f"{folder}: {counts['train']} training {noun}, {counts['test']} held out{left_out}")


def main(argv: list[str] | None = None) -> int:
    """Write a dataset; 0 written, 2 refused."""
    parser = argparse.ArgumentParser(
        prog="direct-jump emoji",
        description="Write an embedded emoji dataset as an image folder.",
        allow_abbrev=False,
    )
    parser.add_argument("folder")
    sets = "; ".join((*SETS, f"{MONSTERS}, drawn from parts"))
    parser.add_argument("--set", default="emoji", help=sets)
    parser.add_argument(
        "--styles",
        nargs="*",
        metavar="NAME",
        help=f"every emoji in several drawing styles, some of: {'; '.join(STYLES)} (default: all "
        "but openmoji, whose licence is share-alike). npm downloads them once, 30 MB",
    )
    parser.add_argument(
        "--size", type=int, help="pixels (default: 64, with --styles 128); Twemoji's own is 72"
    )
    parser.add_argument(
        "--categories", nargs="+", help=f"some of: {'; '.join(CATEGORIES)} (default: all but Flags)"
    )
    parser.add_argument("--skin-tones", action="store_true", help="also people's five skin tones")
    parser.add_argument(
        "--font", help="a colour emoji font (NotoColorEmoji.ttf) instead of Twemoji"
    )
    parser.add_argument("--style", default="", help='end of every caption: "in noto style"')
    args = parser.parse_args(argv)
    if args.styles is None and args.set != MONSTERS:
        return run_cli(lambda: write(args), "no dataset was written.")
    names = ["categories", "skin_tones", "font", "style"]
    if args.styles is not None:
        names.insert(0, "set")
    changed = [name for name in names if getattr(args, name) != parser.get_default(name)]
    others = [f"--{name.replace('_', '-')}" for name in changed]
    return run_cli(lambda: write_drawings(args, others), "no dataset was written.")
