"""More to learn from a few pictures: other names of an emoji, the same thing in other colours, and several of it.

1,528 pictures are soon known by heart, and none of them says that "green" means the same of a frog and of a car. So things
of mostly one colour are painted in others and drawn two and three at a time, and captions have synonyms. None of it shows
a held-out combination or one of the prompts that a model is asked at the end (`FREE`).
"""

import re
import zlib
from collections.abc import Iterable, Iterator

import numpy as np
from PIL import Image

RECOLOUR_VERSION = (
    3  # raise it when the pictures or captions change, so that written sets are replaced
)
OPEN_PROMPTS = (
    "green cat",
    "blue dog",
    "purple banana",
    "red tree",
    "yellow frog",
    "pink lion",
    "blue strawberry",
    "green rocket",
    "orange whale",
    "red snowman",
    "purple bus",
    "blue house",
    "golden fish",
    "cat astronaut",
    "white pizza",
    "rainbow heart",
    "a happy puppy",
    "blue cow",
    "three stars",
    "yellow car",
)  # of no picture in any set
PALETTE = {
    "red": (221, 46, 68),
    "pink": (244, 154, 193),
    "orange": (244, 144, 12),
    "yellow": (253, 203, 88),
    "green": (120, 177, 89),
    "blue": (59, 136, 195),
    "light blue": (136, 201, 249),
    "purple": (146, 102, 204),
    "brown": (138, 75, 56),
    "black": (49, 55, 61),
    "grey": (153, 170, 181),
    "white": (241, 245, 248),
}
COUNTS = {"two": 2, "three": 3}
COUNT_POSITIONS = {
    2: ((0, 0.25), (0.5, 0.25)),
    3: ((0.25, 0), (0, 0.5), (0.5, 0.5)),
}  # left, top; each half as wide as the picture
HUE_TOLERANCE = 30 / 360  # hues of one colour and its shades
SATURATED, DARK = 0.2, 0.35  # from which a colour has a hue; below which it is an outline
MIN_MAIN_SHARE = 0.35  # of a picture must be of one colour to be painted in another
MIN_COLOUR_DISTANCE = 0.25  # root mean square, from which two colours are called by two names


def hue_saturation_lightness(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hue in [0, 1), saturation (of HSV) and lightness in [0, 1] of colours (..., 3) in [0, 1]."""
    high, low = rgb.max(-1), rgb.min(-1)
    spread = high - low
    red, green, blue = np.moveaxis(rgb, -1, 0)
    safe = np.where(spread > 0, spread, 1)
    sixth = np.select(
        [high == red, high == green],
        [(green - blue) / safe, 2 + (blue - red) / safe],
        4 + (red - green) / safe,
    )
    return sixth / 6 % 1, spread / np.where(high > 0, high, 1), (high + low) / 2


def main_color(rgb: np.ndarray, solid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(the most frequent colour (3,) of the solid pixels, outlines aside; which pixels are it or a shade of it)."""
    hue, saturation, lightness = hue_saturation_lightness(rgb)
    bright = rgb[solid & (rgb.max(-1) > DARK)]
    if not len(bright):
        return np.zeros(3), np.zeros_like(solid)
    _, places, counts = np.unique(
        (bright * 15).round(), axis=0, return_inverse=True, return_counts=True
    )
    found = bright[places.ravel() == counts.argmax()].mean(0)
    h, s, _ = hue_saturation_lightness(found)
    if s < SATURATED:
        return found, solid & (saturation < SATURATED) & (lightness > DARK)
    apart = np.abs((hue - h + 0.5) % 1 - 0.5)
    return found, solid & (apart < HUE_TOLERANCE) & (saturation > SATURATED)


def recoloured(picture: Image.Image, colors: Iterable[str]) -> Iterator[tuple[str, Image.Image]]:
    """An RGBA picture with its main colour and that colour's shades in others, one by one; without those that it has.

    Nothing where a picture is not mostly of one colour.
    """
    rgba = np.asarray(picture.convert("RGBA")).astype(np.float64) / 255
    rgb, solid = rgba[..., :3], rgba[..., 3] > 0.1
    found, where = main_color(rgb, solid)
    light, middle = rgb.mean(-1, keepdims=True), found.mean()
    for color in colors if where.sum() > MIN_MAIN_SHARE * solid.sum() else ():
        paint = np.array(PALETTE[color]) / 255
        if np.sqrt(((found - paint) ** 2).mean()) > MIN_COLOUR_DISTANCE:
            shade = paint * np.minimum(light / middle, 1)
            tint = shade + (1 - shade) * np.clip((light - middle) / max(1 - middle, 1e-3), 0, 1)
            new = np.concatenate([np.where(where[..., None], tint, rgb), rgba[..., 3:]], -1)
            yield color, Image.fromarray(np.rint(new * 255).astype(np.uint8), "RGBA")


def repeated(picture: Image.Image, count: int) -> Image.Image:
    """Two or three of an RGBA picture in one of the same size."""
    canvas, size = Image.new("RGBA", picture.size, (255, 255, 255, 0)), picture.width
    small = picture.resize((size // 2, size // 2), Image.Resampling.LANCZOS)
    for left, top in COUNT_POSITIONS[count]:
        canvas.alpha_composite(small, (round(left * size), round(top * size)))
    return canvas


def plural(name: str) -> str:
    """The usual English plural of a name's last word."""
    if re.search("[^aeiou]y$", name):
        return name[:-1] + "ies"
    return name + ("es" if re.search("(s|x|z|ch|sh)$", name) else "s")


def mentions_open_prompt(caption: str) -> bool:
    """Would a caption tell what one of the FREE prompts asks for?"""
    return any(set(prompt.split()) - {"a"} <= set(caption.split()) for prompt in OPEN_PROMPTS)


def shuffled_by_name(name: str, values: tuple) -> list:
    """Some values in an order that the name alone decides."""
    return sorted(values, key=lambda value: zlib.crc32(f"{name} {value}".encode()))
