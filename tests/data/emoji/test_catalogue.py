"""The catalogue of emoji: names, grids and the fixed held-out split."""

from collections import Counter, defaultdict

import pytest
from datasets_on_disk import render_emoji

from pipeline.data.emoji import catalogue


@pytest.mark.parametrize("skin_tones", [False, True])
@pytest.mark.parametrize("name", catalogue.SETS)
def test_select_split_trains_on_held_out_factor_values(name, skin_tones):
    split = catalogue.select_split(name, skin_tones=skin_tones)
    trained = {factor for e in split["train"] for factor in e.factors.items()}
    assert split["test"]
    assert not split["left_out"]
    for e in split["test"]:
        assert e.factors, e.caption
        assert e.factors.items() <= trained, e.caption


@pytest.mark.parametrize("name", catalogue.SETS)
def test_select_split_trains_on_no_held_out_cell(name):
    split = catalogue.select_split(name, skin_tones=True)
    trained = {frozenset(e.factors.items()) for e in split["train"]}
    assert not trained & {frozenset(e.factors.items()) for e in split["test"]}
    assert not {e.caption for e in split["train"]} & {e.caption for e in split["test"]}


def test_held_out_role_is_held_out_in_all_tones_and_facings():
    """A training image that differs only in skin or by a mirror would reveal a held-out one."""
    split = catalogue.select_split("emoji", skin_tones=True)
    cells = {
        part: {(e.factors["role"], e.factors["gender"]) for e in split[part] if e.grid == "roles"}
        for part in split
    }
    shown = {
        (e.factors["role"], e.factors["gender"]) for e in split["train"] if "role" in e.factors
    }
    assert len(cells["test"]) > 70
    assert not shown & cells["test"]


@pytest.mark.parametrize("name", ["emoji", "emoji-small"])
def test_select_split_has_enough_of_both_splits(name):
    split = catalogue.select_split(name)
    assert len(split["test"]) >= 40 and len(split["train"]) >= 400
    assert set(catalogue.SHAPES.values()) | {"roles"} == {e.grid for e in split["test"]}


def test_select_split_is_one_split_for_all_sets():
    everything = catalogue.select_split("emoji")
    for name in ("emoji-small", "shapes"):
        split = catalogue.select_split(name)
        for part in ("train", "test"):
            assert {e.emoji for e in split[part]} <= {e.emoji for e in everything[part]}


def test_catalogue_grids_are_those_of_twemoji():
    """12 hearts, 9 circles and 7 squares come in plain colours."""
    grids = defaultdict(list)
    for e in catalogue.catalogue():
        grids[e.grid].append(e)
    assert [len(grids[g]) for g in ("hearts", "circles", "squares")] == [12, 9, 7]
    roles = Counter(e.factors["role"] for e in grids["roles"] if "facing" not in e.factors)
    assert set(roles.values()) == {3}
    assert {e.factors["tone"] for e in grids["skin"]} == set(catalogue.TONES.values())


def test_select_split_of_shapes_is_as_recorded():
    """The split is part of every published number: changing it must be a decision."""
    held = {e.caption for e in catalogue.select_split("shapes")["test"]}
    assert held == {
        "green heart",
        "purple heart",
        "blue circle",
        "brown circle",
        "yellow square",
        "orange square",
    }


def test_held_genders_depend_on_the_role_alone():
    """One gender of each role is held out, two of some roles outside SMALL_ROLES."""
    held = defaultdict(set)
    for e in catalogue.select_split("emoji")["test"]:
        if e.grid == "roles":
            held[e.factors["role"]].add(e.factors["gender"])
    assert {len(genders) for genders in held.values()} == {1, 2}
    two = [role for role, genders in held.items() if len(genders) == 2]
    assert len(two) > 10
    assert not set(two) & catalogue.SMALL_ROLES
    counts = Counter(gender for genders in held.values() for gender in genders)
    assert min(counts.values()) > 15
    assert set(counts) == {"person", "man", "woman"}
    assert held["cook"] == {"man"}
    assert held["astronaut"] == {"woman"}
    assert held["pilot"] == {"person"}


def test_catalogue_captions_are_distinct_plain_words():
    captions = [e.caption for e in catalogue.catalogue()]
    assert len(set(captions)) == len(captions)
    assert not any(c in caption for caption in captions for c in ":_’")
    named = {e.emoji: e.caption for e in catalogue.catalogue()}
    assert named["❤️"] == "red heart"
    assert named["🐱"] == "cat face"
    assert named["👩‍🍳"] == "woman cook"
    assert named["🌭"] == "hot dog"


def test_catalogue_has_all_categories_of_unicode():
    categories = {e.caption: e.category for e in catalogue.catalogue()}
    assert set(categories.values()) == set(catalogue.CATEGORIES)
    assert categories["harp"] == "Objects"
    assert categories["red heart"] == "Smileys & Emotion"
    assert categories["fox"] == "Animals & Nature"
    assert categories["root vegetable"] == "Food & Drink"


def test_select_split_adds_flags_and_tones_on_request():
    plain = [e for part in catalogue.select_split().values() for e in part]
    assert not any(e.category == "Flags" or set(e.emoji) & set(catalogue.TONES) for e in plain)
    assert len(catalogue.select_split(categories=("Flags",))["train"]) > 250
    toned = [e for part in catalogue.select_split(skin_tones=True).values() for e in part]
    assert len({catalogue.base_of(e) for e in toned if e.grid == "skin"}) > 280


def test_select_split_leaves_out_unmeasurable_cells():
    """Without circles and squares, no training factor shows what green is."""
    split = catalogue.select_split(categories=("Smileys & Emotion",))
    assert {e.caption for e in split["left_out"]} == {"green heart", "purple heart"}
    assert not split["test"]


@pytest.mark.parametrize("name", ["emoji", "emoji-small"])
def test_select_split_holds_out_no_duplicate_image(name):
    split = catalogue.select_split(name)
    counts = Counter(render_emoji(e.path, 32).tobytes() for e in split["train"] + split["test"])
    assert all(counts[render_emoji(e.path, 32).tobytes()] == 1 for e in split["test"])
    if name == "emoji-small":
        assert set(counts.values()) == {1}


def test_other_names_are_words():
    entries = {e.caption: e for e in catalogue.catalogue()}
    assert "male pilot" in entries["man pilot"].names
    assert "truck" in entries["delivery truck"].names
    assert not any(any(c.isdigit() for c in name) for e in entries.values() for name in e.names)
    assert not any(name in entries for e in entries.values() for name in e.names)
