"""Recolour and repeat emoji, so that a model sees one thing in several colours and numbers.

A model soon memorizes 1,528 images, and none shows that "green" means the same for a frog and a
car. Nothing made here shows a held-out combination or an open prompt.
"""

import re
import zlib
from collections.abc import Iterable, Iterator

import numpy as np
from PIL import Image

# Raise it when images or captions change, so that written datasets are replaced.
RECOLOUR_VERSION = 3


def split_names(text: str) -> tuple[str, ...]:
    """Return the names in a text that are separated by commas."""
    return tuple(" ".join(name.split()) for name in text.split(","))


# Prompts that no image of any dataset shows.
OPEN_PROMPTS = split_names("""
    green cat, blue dog, purple banana, red tree, yellow frog, pink lion, blue strawberry,
    green rocket, orange whale, red snowman, purple bus, blue house, golden fish, cat astronaut,
    white pizza, rainbow heart, a happy puppy, blue cow, three stars, yellow car
""")
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
# Left and top of each copy, which is half as wide as the image.
COUNT_POSITIONS = {2: ((0, 0.25), (0.5, 0.25)), 3: ((0.25, 0), (0, 0.5), (0.5, 0.5))}
# Hues within this distance are one colour and its shades.
HUE_TOLERANCE = 30 / 360
# The saturation above which a colour has a hue, and the brightness below which it is an outline.
SATURATED = 0.2
DARK = 0.35
# The share of the main colour in an image that can be recoloured.
MIN_MAIN_SHARE = 0.35
# The root mean square distance between colours with different names.
MIN_COLOUR_DISTANCE = 0.25


def hue_saturation_lightness(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return hue in [0, 1), HSV saturation and lightness in [0, 1] of RGB (..., 3) in [0, 1]."""
    high = rgb.max(-1)
    low = rgb.min(-1)
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
    """Return the most frequent colour (3,) of the solid pixels and the mask of its shades.

    Outlines do not count.
    """
    hue, saturation, lightness = hue_saturation_lightness(rgb)
    bright = rgb[solid & (rgb.max(-1) > DARK)]
    if not len(bright):
        return np.zeros(3), np.zeros_like(solid)
    rounded = (bright * 15).round()
    _, bins, counts = np.unique(rounded, axis=0, return_inverse=True, return_counts=True)
    color = bright[bins.ravel() == counts.argmax()].mean(0)
    color_hue, color_saturation, _ = hue_saturation_lightness(color)
    if color_saturation < SATURATED:
        return color, solid & (saturation < SATURATED) & (lightness > DARK)
    distance = np.abs((hue - color_hue + 0.5) % 1 - 0.5)
    return color, solid & (distance < HUE_TOLERANCE) & (saturation > SATURATED)


def recoloured(image: Image.Image, colors: Iterable[str]) -> Iterator[tuple[str, Image.Image]]:
    """Yield an RGBA image with its main colour and its shades in each other colour.

    Yields nothing for an image without a main colour, and no colour close to the main one.
    """
    rgba = np.asarray(image.convert("RGBA")).astype(np.float64) / 255
    rgb = rgba[..., :3]
    solid = rgba[..., 3] > 0.1
    main, mask = main_color(rgb, solid)
    if mask.sum() <= MIN_MAIN_SHARE * solid.sum():
        return
    light = rgb.mean(-1, keepdims=True)
    middle = main.mean()
    for color in colors:
        paint = np.array(PALETTE[color]) / 255
        if np.sqrt(((main - paint) ** 2).mean()) > MIN_COLOUR_DISTANCE:
            shade = paint * np.minimum(light / middle, 1)
            tint = shade + (1 - shade) * np.clip((light - middle) / max(1 - middle, 1e-3), 0, 1)
            new = np.concatenate([np.where(mask[..., None], tint, rgb), rgba[..., 3:]], -1)
            yield color, Image.fromarray(np.rint(new * 255).astype(np.uint8), "RGBA")


def repeated(image: Image.Image, count: int) -> Image.Image:
    """Return two or three copies of an RGBA image in one of the same size."""
    canvas = Image.new("RGBA", image.size, (255, 255, 255, 0))
    size = image.width
    small = image.resize((size // 2, size // 2), Image.Resampling.LANCZOS)
    for left, top in COUNT_POSITIONS[count]:
        canvas.alpha_composite(small, (round(left * size), round(top * size)))
    return canvas


def plural(name: str) -> str:
    """Return the usual English plural of a name's last word."""
    if re.search("[^aeiou]y$", name):
        return name[:-1] + "ies"
    return name + ("es" if re.search("(s|x|z|ch|sh)$", name) else "s")


def mentions_open_prompt(caption: str) -> bool:
    """Return whether a caption has all words of an open prompt."""
    return any(set(prompt.split()) - {"a"} <= set(caption.split()) for prompt in OPEN_PROMPTS)


def shuffled_by_name(name: str, values: tuple) -> list:
    """Return values in an order that the name alone decides."""
    return sorted(values, key=lambda value: zlib.crc32(f"{name} {value}".encode()))
