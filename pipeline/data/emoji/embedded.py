"""The datasets that a name in `data.source` stands for. They are written on first use."""

from collections.abc import Callable
from pathlib import Path

from pipeline.data.emoji.catalogue import SETS
from pipeline.data.emoji.monsters import write_monsters
from pipeline.data.emoji.style_set import write_styles
from pipeline.data.emoji.styles import DEFAULT_STYLES, STYLES
from pipeline.data.emoji.writer import write_emoji

# Datasets of other drawings than the embedded emoji, and what writes them at a size in pixels.
DRAWN_SETS: dict[str, Callable[[Path, int], Path]] = {
    "emoji-styles": lambda folder, size: write_styles(folder, size=size),
    "monsters": write_monsters,
}
EMBEDDED_SETS = (*SETS, *DRAWN_SETS)
TWEMOJI_CREDIT = "Emoji images: Twemoji, (c) Twitter, Inc and other contributors, CC-BY 4.0."


def write_embedded(name: str, cache: str | Path, size: int) -> Path:
    """Write an embedded dataset as size x size images into the cache and return its folder.

    Raises EmojiError.
    """
    folder = Path(cache) / f"{name}-{size}"
    if name in DRAWN_SETS:
        return DRAWN_SETS[name](folder, size)
    return write_emoji(folder, name=name, size=size)


def attribution_of(source: str) -> str:
    """Return the credits of an embedded dataset's images; "" for other data."""
    if source == "emoji-styles":
        credits = dict.fromkeys(STYLES[style].attribution for style in DEFAULT_STYLES)
        return f"Emoji images: {'; '.join(credits)}."
    return TWEMOJI_CREDIT if source in SETS else ""
