"""Captions of emoji in a style: names, word orders, articles and tags."""

import pytest

from pipeline.data.emoji import captions
from pipeline.data.emoji.catalogue import catalogue
from pipeline.data.emoji.recolour import split_names


@pytest.fixture(scope="module")
def named():
    return {entry.caption: entry for entry in catalogue()}


@pytest.fixture(scope="module")
def names(named):
    return {name for entry in named.values() for name in entry.all_names}


@pytest.mark.parametrize(
    ("name", "article"),
    [
        ("fox", "a"),
        ("orange whale", "an"),
        ("unicorn", "a"),
        ("umbrella", "an"),
        ("hourglass done", "an"),
        ("octopus", "an"),
        ("compass", "a"),
        ("grapes", ""),
        ("baguette bread", ""),
        ("ON! arrow", ""),
        ("3d", ""),
    ],
)
def test_article_of_follows_english(name, article):
    assert captions.article_of(name) == article


def test_phrase_has_the_article_of_what_follows():
    template = "{a_style} style {name}"
    assert captions.phrase(template, "apple", "flat") == "a flat style apple"
    assert captions.phrase(template, "fox", "ink") == "an ink style fox"
    assert captions.phrase(template, "fox", "3d") == "a 3d style fox"
    assert captions.phrase(template, "grapes", "ink") == "ink style grapes"
    assert captions.phrase("{a_name} in {style} style", "apple", "3d") == "an apple in 3d style"
    assert captions.phrase("{a_name}", "grapes", "3d") == "grapes"


def test_style_captions_begin_with_the_full_and_the_plain_one():
    texts = captions.style_captions(["fox", "red fox"], "3d", articles=True)
    assert texts[:2] == ["fox, 3d style", "fox"]
    assert len(texts) == len(set(texts)) == 5
    assert all("fox" in text for text in texts)
    assert "red fox" in texts[-1]
    assert texts == captions.style_captions(["fox", "red fox"], "3d", articles=True)


def test_style_captions_use_all_word_orders(named):
    texts = {
        text.replace(caption, "fox")
        for caption in named
        for text in captions.style_captions([caption], "3d", articles=True)
    }
    assert texts >= set(
        split_names("a fox, a fox in 3d style, a 3d style fox, 3d style fox, fox in 3d style")
    )
    plain = captions.style_captions(["fox"], "3d", articles=False)
    assert sorted(plain) == sorted(["fox, 3d style", "fox", "3d style fox", "fox in 3d style"])


def test_tag_names_of_faces_say_what_is_felt(named, names):
    tags = ["cheerful", "face", "happy", "laugh", "teeth"]
    found = captions.tag_names(named["grinning face"], tags, names)
    assert found == ("happy face", "cheerful face")
    assert captions.tag_names(named["crying cat"], ["sad", "tear"], names) == ("sad cat",)
    assert captions.tag_names(named["red heart"], ["happy", "love"], names) == ()


def test_tag_names_of_things_say_of_what_kind_they_are(named, names):
    assert captions.tag_names(named["lemon"], ["citrus", "food", "fruit"], names) == ("fruit",)
    assert captions.tag_names(named["kiwi fruit"], ["food", "fruit"], names) == ()
    assert captions.tag_names(named["hot dog"], ["dog", "hot", "sausage"], set()) == ()
    assert captions.tag_names(named["woman cook"], ["chef", "fruit"], set()) == ()
    assert captions.tag_names(named["lemon"], ["fruit"], names | {"fruit"}) == ()


def test_varied_names_have_the_variation_in_each_name(named):
    names = captions.varied_names(named["delivery truck"], ("vehicle",), "red")
    assert names == ["red delivery truck", "red truck", "red vehicle"]
    assert captions.varied_names(named["lemon"], ("fruit",), "two") == ["two lemons", "two fruits"]
    assert captions.varied_names(named["lemon"], ("fruit",)) == ["lemon", "fruit"]
