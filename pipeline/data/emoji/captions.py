"""Captions of an emoji in a style: its names in several word orders, and apt tags."""

import re

from pipeline.data.emoji.catalogue import THINGS, Emoji, choose_by_name
from pipeline.data.emoji.recolour import COUNTS, plural, shuffled_by_name, split_names

FULL = "{name}, {style} style"
PLAIN = "{name}"
WORD_ORDERS = ("{style} style {name}", "{name} in {style} style")
WITH_ARTICLE = ("{a_name}", "{a_name} in {style} style", "{a_style} style {name}")
FACES = "Smileys & Emotion"
# Tags of faces that say what is felt, and tags of things that say of what kind they are, the better
# known first. Other tags fit too many emoji ("face") or mislead ("dog" for a hot dog).
EXPRESSIONS = split_names("""
    happy, sad, laughing, scared, surprised, sick, excited, bored, nervous, shocked, embarrassed,
    proud, crazy, funny, evil, shy, cool, relaxed, frustrated, exhausted, anxious, upset, mad,
    hungry, cheerful, peaceful
""")
KINDS = split_names("""
    fruit, vegetable, flower, insect, drink, dessert, vehicle, building, instrument, dinosaur, hat
""")
TAGS_PER_EMOJI = 3
OTHER_NAMES_PER_EMOJI = 2
# Last words of names that take no article.
UNCOUNTED = split_names("""
    bread, rice, cheese, bacon, honey, butter, salt, ice, fire, sushi, sake, money, soap, wood, fog,
    water, corn, ginger, garlic, popcorn, spaghetti, rain, snow, cooking, tea, milk, poo, mahjong,
    tennis, badminton, curling, lacrosse, softball, yarn, construction, weather, people, teeth
""")


def article_of(name: str) -> str:
    """Return "a", "an", or "" for plurals, masses and names that begin with no letter."""
    last = name.split()[-1]
    if is_plural(name) or last in UNCOUNTED or not name[0].islower():
        return ""
    return "an" if re.match("[aeio]|u(?!ni|se)|hour", name) else "a"


def is_plural(name: str) -> bool:
    """Return whether a name ends like a plural, as "grapes" does and "cross" does not."""
    return name.endswith("s") and not name.endswith(("ss", "us"))


def phrase(template: str, name: str, style: str) -> str:
    """Return a caption of a template."""
    article = article_of(name)
    a_style = f"{article_of(style) or 'a'} {style}" if article else style
    return template.format(
        name=name, style=style, a_name=f"{article} {name}".strip(), a_style=a_style
    )


def tag_names(entry: Emoji, tags: list[str], names: set[str]) -> tuple[str, ...]:
    """Return names from tags that are not in `names`: "happy face", or "bird" for a parrot."""
    words = re.findall(r"\w+", entry.caption.lower())
    found: list[str] = []
    if entry.category == FACES:
        noun = next((noun for noun in ("face", "cat") if noun in words), None)
        found = [f"{tag} {noun}" for tag in EXPRESSIONS if noun and tag in tags]
    elif entry.category in THINGS:
        found = [tag for tag in KINDS if tag in tags and tag not in words]
    return tuple(name for name in found if name not in names)[:TAGS_PER_EMOJI]


def varied_names(entry: Emoji, tagged: tuple[str, ...], variation: str | None = None) -> list[str]:
    """Return an emoji's names, the caption first, with a colour ("red") or a number ("two")."""
    names = [entry.caption, *entry.names[:OTHER_NAMES_PER_EMOJI], *tagged]
    if variation in COUNTS:
        return [f"{variation} {plural(name)}" for name in names]
    return [f"{variation} {name}" for name in names] if variation else names


def style_captions(names: list[str], style: str, articles: bool) -> list[str]:
    """Return the captions of one image: "fox, 3d style", "fox", and others.

    The first name comes in four forms, each other one in a single form without an article. The
    forms are chosen by name and style.
    """
    first, *others = names
    orders = WORD_ORDERS + WITH_ARTICLE if articles else WORD_ORDERS
    forms = [FULL, PLAIN, *shuffled_by_name(f"{first} {style}", orders)[:2]]
    captions = [phrase(form, first, style) for form in forms]
    for name in others:
        form = choose_by_name(f"{name} {style}", (FULL, PLAIN, *WORD_ORDERS))
        captions.append(phrase(form, name, style))
    return list(dict.fromkeys(captions))
