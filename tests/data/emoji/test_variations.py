"""The varied dataset trains on more and is measured on the same."""

import functools

import pytest
from datasets_on_disk import load_images, read_rows

from pipeline.data.emoji import catalogue, recolour, styles, writer
from pipeline.evaluation.reference_set import ReferenceSet

CATEGORIES = ("Food & Drink", "Symbols")


def draw(entry):
    return styles.load_rgba(entry.path)


def mean_colors(images):
    return images.float().mean((2, 3))


@pytest.fixture(scope="module")
def entries():
    return {e.caption: e for e in catalogue.catalogue()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("varied") / "set"
    return writer.write_emoji(folder, "emoji-varied", 32, categories=CATEGORIES)


@pytest.fixture(scope="module")
def varied():
    """(variation, captions) of each variation of an entry, rendered once for all tests."""

    @functools.cache
    def of(emoji):
        entry = next(e for e in catalogue.catalogue() if e.emoji == emoji)
        return [variant[:2] for variant in writer.variations_of(entry, draw)]

    return lambda entry: of(entry.emoji)


def test_variations_of_people_are_tones_not_held_out(entries):
    variations = writer.variations_of(entries["man pilot"], draw)
    stripped = catalogue.strip_modifiers(entries["man pilot"].emoji)
    skin = [e for e in entries.values() if e.grid == "skin"]
    tones = [e for e in skin if catalogue.strip_modifiers(e.emoji) == stripped]
    assert len(tones) == 5
    trained = [e.caption for e in tones if not e.held_out]
    assert [captions[0] for _, captions, _ in variations] == trained
    assert len(variations) == 4
    assert not writer.variations_of(entries["grinning face"], draw)


def test_variations_of_short_names_come_in_numbers(entries, varied):
    """Names of three words or more are mostly phrases, whose plural is not at the end."""
    things = [e for e in entries.values() if e.category in catalogue.THINGS and not e.grid]
    several = [e for e in things for variation, _ in varied(e) if variation in recolour.COUNTS]
    assert len(several) > 200
    assert {len(e.caption.split()) for e in several} == {1, 2}


def test_captions_of_a_role_include_its_gender(entries):
    assert writer.captions_of(entries["man pilot"]) == ["man pilot", "male pilot", "a man"]
    assert writer.captions_of(entries["delivery truck"]) == ["delivery truck", "truck"]


def test_variations_of_never_show_what_is_measured(varied):
    """No caption, in any word order, has the words of a held-out cell or an open prompt."""
    split = catalogue.select_split("emoji")
    of_variations = [c for e in split["train"] for _, captions in varied(e) for c in captions]
    trained = of_variations + [name for e in split["train"] for name in writer.captions_of(e)]
    held = {e.caption for e in catalogue.catalogue() if e.held_out}
    assert len(trained) > 3000
    assert not held & set(trained)
    for prompt in recolour.OPEN_PROMPTS:
        words = set(prompt.split()) - {"a"}
        assert not any(words <= set(caption.split()) for caption in trained)
    things = [caption for caption in of_variations if not caption.endswith("skin tone")]
    words = {word for caption in things for word in caption.split()}
    assert not words & {"heart", "hearts", "circle", "square"}


def test_write_splits_varies_the_training_split_only(folder, tmp_path):
    train = read_rows(folder, "train")
    test = read_rows(folder, "test")
    plain = writer.write_emoji(tmp_path / "plain", "emoji", 32, categories=CATEGORIES)
    plain_train = [row["caption"] for row in read_rows(plain, "train")]
    plain_test = [row["caption"] for row in read_rows(plain, "test")]
    own = [row for row in train if row["variation"] is None]
    assert [row["caption"][0] for row in own] == plain_train
    assert [row["caption"] for row in test] == [[caption] for caption in plain_test]
    assert len(train) > 1.5 * len(own)
    assert {row["variation"] for row in train} > {None, "green", "two"}
    green = next(row for row in train if row["variation"] == "green")
    assert green["caption"][0].startswith("green ")
    images = load_images(folder, resolution=32, cache_dir=tmp_path)
    assert len(images) == len(train)
    held_out = load_images(folder, "test", 32, tmp_path)
    references = ReferenceSet.from_splits(mean_colors, [images, held_out])
    assert references.n_train == len(own)
    assert len(references.train) == len(train)
    assert references.captions == plain_train + plain_test


def test_write_emoji_replaces_older_variations(folder, monkeypatch):
    manifest = folder / writer.EMOJI_MANIFEST
    before = manifest.stat().st_mtime_ns
    writer.write_emoji(folder, "emoji-varied", 32, categories=CATEGORIES)
    assert manifest.stat().st_mtime_ns == before
    monkeypatch.setattr(recolour, "RECOLOUR_VERSION", recolour.RECOLOUR_VERSION + 1)
    writer.write_emoji(folder, "emoji-varied", 32, categories=CATEGORIES)
    assert manifest.stat().st_mtime_ns > before
