"""The monsters dataset: images from named parts, with exact captions and held-out pairs of parts.

A caption says everything that varies, so a composition is right or wrong without a judge: "a green
round monster with horns and three eyes, smiling". The drawings are DiceBear's Critters (CC0).
"""

import importlib.resources
import io
import itertools
import json
import zlib
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from pipeline.data.emoji.captions import article_of
from pipeline.data.emoji.catalogue import choose_by_name
from pipeline.data.emoji.recolour import PALETTE
from pipeline.data.emoji.writer import (
    SPLITS,
    require_packages,
    require_size,
    write_folder,
    write_rows,
)
from pipeline.data.image_ops import flatten_on_white

# Raise it when images, captions or the split change, so that written datasets are replaced.
MONSTERS_VERSION = 1
SOURCES = ("dicebear-core", "dicebear-styles", "resvg-py", "pillow")
LICENCE = "CC0-1.0"
ATTRIBUTION = "Critters by DiceBear, CC0 1.0"
# Factor -> value in captions -> DiceBear's name of the part. The two names of colours agree.
PARTS: dict[str, dict[str, str]] = {
    "color": {
        color: color
        for color in ("red", "orange", "yellow", "green", "blue", "purple", "pink", "grey")
    },
    "shape": {
        "round": "round",
        "square": "block",
        "tall": "tower",
        "pointed": "peak",
        "bell-shaped": "bell",
    },
    "top": {
        "horns": "horns",
        "antennae": "antennae",
        "round ears": "earsRound",
        "pointed ears": "earsPointy",
        "spikes": "spikes",
        "a crown": "crown",
    },
    "eyes": {"one eye": "mono", "two eyes": "round", "three eyes": "trio", "four eyes": "four"},
    "mood": {
        "smiling": "smile",
        "laughing": "laugh",
        "sad": "frown",
        "surprised": "open",
        "calm": "line",
    },
}
# The first caption has all factors, so it is the only one of its image.
CAPTION = "{a_color} {shape} monster with {top} and {eyes}, {mood}"
LIST = "{mood} {color} monster, {shape}, {eyes}, {top}"
PARTIAL = (
    "{a_color} monster with {top}",
    "{a_color} monster with {eyes}",
    "{a_shape} monster with {top}",
    "{a_mood} monster with {eyes}",
    "{a_mood} {color} monster",
)
# One pair of values of two factors in n is held out.
PAIRS_PER_HELD_OUT = 25


def held_out_pairs(factors: dict[str, str]) -> list[list[str]]:
    """Return the pairs of values that are never shown together, such as ["green", "horns"]."""
    return [
        [first, second]
        for first, second in itertools.combinations(factors.values(), 2)
        if zlib.crc32(f"{first} and {second}".encode()) % PAIRS_PER_HELD_OUT == 0
    ]


def monster_captions(factors: dict[str, str]) -> list[str]:
    """Return the full caption, a list of all parts, and a caption of two parts."""
    names = factors | {
        f"a_{factor}": f"{article_of(value)} {value}" for factor, value in factors.items()
    }
    partial = choose_by_name(" ".join(factors.values()), PARTIAL)
    return [template.format(**names) for template in (CAPTION, LIST, partial)]


def load_artist() -> Callable[[dict[str, str], int], Image.Image]:
    """Return a function that draws a monster of some factors at a size."""
    # Parts of an extra, which other datasets do without.
    import dicebear
    import resvg_py

    text = (importlib.resources.files("dicebear_styles") / "critters.json").read_text("utf-8")
    style = dicebear.Style(json.loads(text))

    def draw(factors: dict[str, str], size: int) -> Image.Image:
        color = factors["color"]
        top = "blue" if color in ("yellow", "orange") else "yellow"
        options = {
            "seed": "monster",
            "size": size,
            "bodyColor": ["{:02x}{:02x}{:02x}".format(*PALETTE[color])],
            "accentColor": ["{:02x}{:02x}{:02x}".format(*PALETTE[top])],
            "backgroundColor": ["ffffff"],
            "topProbability": 100,
            "patternProbability": 0,
            "cheeksProbability": 0,
        }
        parts = {"body": "shape", "top": "top", "eyes": "eyes", "mouth": "mood"}
        for part, factor in parts.items():
            options[f"{part}Variant"] = [PARTS[factor][factors[factor]]]
        svg = dicebear.Avatar(style, options).to_string()
        png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)
        with Image.open(io.BytesIO(png)) as image:
            return flatten_on_white(image)

    return draw


def write_monsters(folder: str | Path, size: int = 64) -> Path:
    """Write all monsters as a folder of size x size PNGs and return the folder.

    As with `write_emoji`, the folder appears complete or not at all, and one with the same
    selection stays. Raises EmojiError.
    """
    require_size(size)
    selection = {
        "set": "monsters",
        "size": size,
        "version": MONSTERS_VERSION,
        "sources": require_packages(SOURCES),
        "licence": LICENCE,
        "attribution": ATTRIBUTION,
    }
    return write_folder(Path(folder), selection, lambda new: selection | write_all(new, size))


def write_all(folder: Path, size: int) -> dict:
    """Write train/ and test/ with metadata.jsonl; return what the manifest records of them."""
    draw = load_artist()
    rows: dict[str, list[dict]] = {split: [] for split in SPLITS}
    pairs = set()
    for split in SPLITS:
        (folder / split).mkdir()
    for values in itertools.product(*PARTS.values()):
        factors = dict(zip(PARTS, values, strict=True))
        held_out = held_out_pairs(factors)
        pairs |= set(map(tuple, held_out))
        row = {
            "file_name": "-".join(values).replace(" ", "-") + ".png",
            "caption": monster_captions(factors),
            "factors": factors,
            "held_out": held_out,
            "licence": LICENCE,
        }
        split = "test" if held_out else "train"
        draw(factors, size).save(folder / split / row["file_name"])
        rows[split].append(row)
    for split, lines in rows.items():
        write_rows(folder / split, lines)
    images = {split: len(lines) for split, lines in rows.items()}
    return {"images": images, "held_out": {"pair": sorted(pairs)}}
