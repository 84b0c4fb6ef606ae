"""More captions and pictures from a few: the same thing in other colours, several of it, other names."""

import json

import numpy as np
import pytest
from PIL import Image

from pipeline.data import dataset
from pipeline.data.emoji import catalogue, recolour, styles, writer
from pipeline.evaluation.reference_set import ReferenceSet


@pytest.fixture(scope="module")
def entries():
    return {e.caption: e for e in catalogue.catalogue()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return writer.write_emoji(
        tmp_path_factory.mktemp("varied") / "set",
        "emoji-varied",
        32,
        categories=("Food & Drink", "Symbols"),
    )


def rows(folder, part="train"):
    return [
        json.loads(line) for line in (folder / part / "metadata.jsonl").read_text().splitlines()
    ]


def flat(*colors):
    """A picture of stripes of equal height in some colours, RGBA."""
    return Image.fromarray(
        np.repeat(np.array(colors, np.uint8), 4, 0)[:, None].repeat(8, 1), "RGBA"
    )


def only(picture, color):
    """A picture in another colour."""
    ((named, found),) = recolour.recoloured(picture, [color])
    assert named == color
    return found


def test_the_main_color_becomes_the_paint_and_its_shades_follow():
    yellow, shade, blue, clear = (
        (250, 200, 40, 255),
        (200, 160, 32, 255),
        (40, 40, 200, 255),
        (250, 200, 40, 0),
    )
    found = np.asarray(only(flat(yellow, yellow, yellow, shade, blue, clear), "red")).astype(int)
    assert found[0, 0].tolist() == [*recolour.PALETTE["red"], 255]
    assert found[12, 0, :3] == pytest.approx(
        np.array(recolour.PALETTE["red"]) * 0.8, abs=1
    )  # four fifths as light
    assert tuple(found[16, 0]) == blue
    assert found[-1, 0, 3] == 0


def test_outlines_are_no_main_color():
    black, white = (20, 20, 20, 255), (240, 240, 240, 255)
    found = np.asarray(only(flat(black, black, white, white), "green"))
    assert tuple(found[0, 0]) == black
    assert found[-1, 0, 1] > found[-1, 0, 0] + 40


@pytest.mark.parametrize(
    "colors",
    [
        [(200, 30, 30, 255)] * 2,  # red already
        [(250, 200, 40, 255), (40, 40, 200, 255), (30, 180, 30, 255)],  # of no one colour
        [(0, 0, 0, 255)] * 2,  # nothing but outline
    ],
)
def test_what_is_red_or_of_no_color_is_not_painted_red(colors):
    assert list(recolour.recoloured(flat(*colors), ["red"])) == []


def test_hues_are_those_of_the_standard_library():
    import colorsys

    some = np.random.default_rng(0).random((50, 3))
    hue, saturation, lightness = recolour.hue_saturation_lightness(some)
    for color, h, s, light in zip(some, hue, saturation, lightness, strict=True):
        assert h == pytest.approx(colorsys.rgb_to_hsv(*color)[0])
        assert s == pytest.approx(colorsys.rgb_to_hsv(*color)[1])
        assert light == pytest.approx(colorsys.rgb_to_hls(*color)[1])


@pytest.mark.parametrize("word", recolour.COUNTS)
def test_several_are_as_many_smaller_ones(word):
    one = Image.new("RGBA", (8, 8), (200, 0, 0, 255))
    many = np.asarray(recolour.repeated(one, recolour.COUNTS[word]))
    assert many.shape == (8, 8, 4)
    assert (many[..., 3] > 0).sum() == 16 * recolour.COUNTS[word]


def test_people_have_their_skin_tones_but_the_held_out_one(entries):
    found = writer.variations_of(entries["man pilot"], lambda e: styles.load_rgba(e.path))
    tones = [
        e
        for e in entries.values()
        if e.grid == "skin"
        and catalogue.strip_modifiers(e.emoji)
        == catalogue.strip_modifiers(entries["man pilot"].emoji)
    ]
    assert len(tones) == 5
    assert [captions[0] for _, captions, _ in found] == [e.caption for e in tones if not e.held_out]
    assert len(found) == 4
    assert not writer.variations_of(entries["grinning face"], lambda e: styles.load_rgba(e.path))


@pytest.fixture(scope="module")
def varied():
    """What is done to an entry and what it is called then, drawn once for all tests."""
    known = {}

    def of(entry):
        if entry.emoji not in known:
            known[entry.emoji] = [
                some[:2] for some in writer.variations_of(entry, lambda e: styles.load_rgba(e.path))
            ]
        return known[entry.emoji]

    return of


def test_only_what_has_a_short_name_comes_twice_or_three_times(entries, varied):
    """Names of three words and more are mostly phrases, which have no plural at their end."""
    found = [
        (e, captions)
        for e in entries.values()
        if e.category in catalogue.THINGS and not e.grid
        for done, captions in varied(e)
        if done in recolour.COUNTS
    ]
    assert len(found) > 200
    assert {len(e.caption.split()) for e, _ in found} == {1, 2}


def test_a_role_is_also_said_by_its_gender_alone(entries):
    assert writer.captions_of(entries["man pilot"]) == ["man pilot", "male pilot", "a man"]
    assert writer.captions_of(entries["delivery truck"]) == ["delivery truck", "truck"]


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
def test_plurals(one, many):
    assert recolour.plural(one) == many


def test_an_emoji_has_its_other_names_in_words(entries):
    assert "male pilot" in entries["man pilot"].names
    assert "truck" in entries["delivery truck"].names
    assert not any(any(c.isdigit() for c in name) for e in entries.values() for name in e.names)
    assert not any(name in entries for e in entries.values() for name in e.names)


def test_nothing_shows_or_tells_what_is_asked_at_the_end(varied):
    """No caption of the varied set, whatever its order of words, says what a held-out cell or a free prompt asks for."""
    split = catalogue.select_split("emoji")
    seen = [c for e in split["train"] for _, captions in varied(e) for c in captions]
    told = seen + [name for e in split["train"] for name in writer.captions_of(e)]
    held = {e.caption for e in catalogue.catalogue() if e.held_out}
    assert len(told) > 3000
    assert not held & set(told)
    assert not any(
        set(prompt.split()) - {"a"} <= set(caption.split())
        for prompt in recolour.OPEN_PROMPTS
        for caption in told
    )
    shapes = {"heart", "hearts", "circle", "square"}
    assert not any(
        set(caption.split()) & shapes for caption in seen if not caption.endswith("skin tone")
    )


def test_the_varied_set_trains_on_more_and_is_judged_on_the_same(folder, tmp_path):
    train, test = rows(folder), rows(folder, "test")
    plain = writer.write_emoji(
        tmp_path / "plain", "emoji", 32, categories=("Food & Drink", "Symbols")
    )
    own = [row for row in train if row["variation"] is None]
    assert [row["caption"][0] for row in own] == [row["caption"] for row in rows(plain)]
    assert [row["caption"] for row in test] == [[row["caption"]] for row in rows(plain, "test")]
    assert len(train) > 1.5 * len(own)
    assert {row["variation"] for row in train} > {None, "green", "two"}
    green = next(row for row in train if row["variation"] == "green")
    assert green["caption"][0].startswith("green ")
    images = dataset.load_images(folder, resolution=32, cache_dir=tmp_path)
    assert len(images) == len(train)
    bank = ReferenceSet.from_splits(means, [images, dataset.load_images(folder, "test", 32, tmp_path)])
    assert (bank.n_train, len(bank.train)) == (len(own), len(train))
    assert bank.captions == [row["caption"] for row in rows(plain) + rows(plain, "test")]


def test_a_written_set_is_replaced_when_its_variations_change(folder, monkeypatch):
    before = (folder / writer.EMOJI_MANIFEST).stat().st_mtime_ns
    writer.write_emoji(folder, "emoji-varied", 32, categories=("Food & Drink", "Symbols"))
    assert (folder / writer.EMOJI_MANIFEST).stat().st_mtime_ns == before
    monkeypatch.setattr(recolour, "RECOLOUR_VERSION", recolour.RECOLOUR_VERSION + 1)
    writer.write_emoji(folder, "emoji-varied", 32, categories=("Food & Drink", "Symbols"))
    assert (folder / writer.EMOJI_MANIFEST).stat().st_mtime_ns > before


def means(images):
    """What a judge of mean colours sees."""
    return images.float().mean((2, 3))
