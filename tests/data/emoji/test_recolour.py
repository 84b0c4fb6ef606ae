"""Other colours, several of a thing, and plurals."""

import colorsys

import numpy as np
import pytest
from PIL import Image

from pipeline.data.emoji import recolour


def flat(*colors):
    """Return an RGBA image of stripes, four pixels high and eight wide."""
    stripes = np.repeat(np.array(colors, np.uint8), 4, 0)
    return Image.fromarray(stripes[:, None].repeat(8, 1), "RGBA")


def only(image, color):
    """Return the pixels of an image in another colour."""
    ((name, result),) = recolour.recoloured(image, [color])
    assert name == color
    return np.asarray(result).astype(int)


def test_recoloured_paints_the_main_colour_and_its_shades():
    yellow = (250, 200, 40, 255)
    # Four fifths as light.
    shade = (200, 160, 32, 255)
    blue = (40, 40, 200, 255)
    clear = (250, 200, 40, 0)
    pixels = only(flat(yellow, yellow, yellow, shade, blue, clear), "red")
    red = np.array(recolour.PALETTE["red"])
    assert pixels[0, 0].tolist() == [*red, 255]
    assert pixels[12, 0, :3] == pytest.approx(red * 0.8, abs=1)
    assert tuple(pixels[16, 0]) == blue
    assert pixels[-1, 0, 3] == 0


def test_main_color_ignores_outlines():
    black = (20, 20, 20, 255)
    white = (240, 240, 240, 255)
    pixels = only(flat(black, black, white, white), "green")
    assert tuple(pixels[0, 0]) == black
    assert pixels[-1, 0, 1] > pixels[-1, 0, 0] + 40


@pytest.mark.parametrize(
    "colors",
    [
        [(200, 30, 30, 255)] * 2,
        [(250, 200, 40, 255), (40, 40, 200, 255), (30, 180, 30, 255)],
        [(0, 0, 0, 255)] * 2,
    ],
    ids=["red", "three colours", "outline"],
)
def test_recoloured_skips_red_or_mixed_images_for_red(colors):
    assert list(recolour.recoloured(flat(*colors), ["red"])) == []


def test_hue_saturation_lightness_matches_colorsys():
    colors = np.random.default_rng(0).random((50, 3))
    hue, saturation, lightness = recolour.hue_saturation_lightness(colors)
    for color, h, s, light in zip(colors, hue, saturation, lightness, strict=True):
        assert h == pytest.approx(colorsys.rgb_to_hsv(*color)[0])
        assert s == pytest.approx(colorsys.rgb_to_hsv(*color)[1])
        assert light == pytest.approx(colorsys.rgb_to_hls(*color)[1])


@pytest.mark.parametrize("word", recolour.COUNTS)
def test_repeated_has_that_many_smaller_copies(word):
    one = Image.new("RGBA", (8, 8), (200, 0, 0, 255))
    many = np.asarray(recolour.repeated(one, recolour.COUNTS[word]))
    assert many.shape == (8, 8, 4)
    assert (many[..., 3] > 0).sum() == 16 * recolour.COUNTS[word]


@pytest.mark.parametrize(
    ("one", "many"),
    [
        ("star", "stars"),
        ("cherry", "cherries"),
        ("fox", "foxes"),
        ("key", "keys"),
        ("peach", "peaches"),
    ],
)
def test_plural_follows_english_rules(one, many):
    assert recolour.plural(one) == many
