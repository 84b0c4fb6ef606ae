"""The varied dataset trains on more and is measured on the same."""

import pytest
from datasets_on_disk import load_images, read_rows

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


def test_variations_of_people_are_tones_not_held_out(entries):
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


def test_variations_of_short_names_come_in_numbers(entries, varied):
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


def test_captions_of_a_role_include_its_gender(entries):
    assert writer.captions_of(entries["man pilot"]) == ["man pilot", "male pilot", "a man"]
    assert writer.captions_of(entries["delivery truck"]) == ["delivery truck", "truck"]


def test_variations_of_never_show_what_is_measured(varied):
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


def test_write_splits_varies_the_training_split_only(folder, tmp_path):
    train, test = read_rows(folder), read_rows(folder, "test")
    plain = writer.write_emoji(
        tmp_path / "plain", "emoji", 32, categories=("Food & Drink", "Symbols")
    )
    own = [row for row in train if row["variation"] is None]
    assert [row["caption"][0] for row in own] == [row["caption"] for row in read_rows(plain)]
    assert [row["caption"] for row in test] == [
        [row["caption"]] for row in read_rows(plain, "test")
    ]
    assert len(train) > 1.5 * len(own)
    assert {row["variation"] for row in train} > {None, "green", "two"}
    green = next(row for row in train if row["variation"] == "green")
    assert green["caption"][0].startswith("green ")
    images = load_images(folder, resolution=32, cache_dir=tmp_path)
    assert len(images) == len(train)
    bank = ReferenceSet.from_splits(means, [images, load_images(folder, "test", 32, tmp_path)])
    assert (bank.n_train, len(bank.train)) == (len(own), len(train))
    assert bank.captions == [row["caption"] for row in read_rows(plain) + read_rows(plain, "test")]


def test_write_emoji_replaces_older_variations(folder, monkeypatch):
    before = (folder / writer.EMOJI_MANIFEST).stat().st_mtime_ns
    writer.write_emoji(folder, "emoji-varied", 32, categories=("Food & Drink", "Symbols"))
    assert (folder / writer.EMOJI_MANIFEST).stat().st_mtime_ns == before
    monkeypatch.setattr(recolour, "RECOLOUR_VERSION", recolour.RECOLOUR_VERSION + 1)
    writer.write_emoji(folder, "emoji-varied", 32, categories=("Food & Drink", "Symbols"))
    assert (folder / writer.EMOJI_MANIFEST).stat().st_mtime_ns > before


def means(images):
    """What a feature extractor of mean colours sees."""
    return images.float().mean((2, 3))
