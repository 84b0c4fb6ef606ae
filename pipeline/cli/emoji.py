"""`direct-jump emoji`: write an embedded emoji set as an image folder."""

import argparse
import sys

from pipeline.data.emoji.catalogue import CATEGORIES, SETS, EmojiError
from pipeline.data.emoji.writer import read_manifest, write_emoji


def main(argv: list[str] | None = None) -> int:
    """The command line: 0 written, 2 refused."""
    parser = argparse.ArgumentParser(prog="direct-jump emoji", description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--set", default="emoji", help="; ".join(SETS))
    parser.add_argument("--size", type=int, default=64, help="pixels a side; Twemoji's own is 72")
    parser.add_argument(
        "--categories", nargs="+", help=f"some of: {'; '.join(CATEGORIES)} (default: all but Flags)"
    )
    parser.add_argument(
        "--skin-tones", action="store_true", help="the five skin tones of a person as well"
    )
    parser.add_argument(
        "--font",
        help="draw with this colour emoji font (NotoColorEmoji.ttf, say) instead of Twemoji",
    )
    parser.add_argument(
        "--style", default="", help='what every caption ends in, such as "in noto style"'
    )
    args = parser.parse_args(argv)
    try:
        folder = write_emoji(
            args.folder,
            args.set,
            args.size,
            tuple(args.categories) if args.categories else None,
            args.skin_tones,
            args.font,
            args.style,
        )
    except (EmojiError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    counts = {
        part: len(captions)
        for part, captions in read_manifest(folder).items()
        if isinstance(captions, list)
    }
    print(
        f"{folder}: {counts['train']} emoji to train on, {counts['test']} held-out combinations"
        + (f", {counts['left_out']} left out" if counts["left_out"] else "")
    )
    return 0
