"""The styles dataset: rows, splits that stay, and what is left out of them."""

import json
from collections import Counter, defaultdict

import numpy as np
import pytest
from datasets_on_disk import load_images, read_rows
from emoji_packages import pack_images, use_tiny_styles
from PIL import Image

from pipeline.data import map_cache
from pipeline.data.emoji import packages, prompts, recolour, style_set
from pipeline.data.emoji.captions import is_plural
from pipeline.data.emoji.catalogue import THINGS, EmojiError, catalogue, select_split
from pipeline.data.emoji.prompts import STYLE_PROMPTS, names_prompt, subject_words
from pipeline.data.emoji.style_set import held_out_kind, write_styles
from pipeline.data.emoji.styles import DEFAULT_STYLES, STYLES
from pipeline.data.emoji.writer import count_of, read_manifest


@pytest.fixture(scope="module")
def entries():
    return [entry for part in select_split().values() for entry in part]


@pytest.fixture
def styles(tmp_path, monkeypatch):
    """Put three tiny packages in place of the styles', and return their names."""
    return use_tiny_styles(tmp_path / "cache", monkeypatch)


def test_held_out_kind_holds_out_enough_of_each_kind(entries):
    """At least 60 concepts, 200 cells, and the combinations of the other emoji datasets."""
    kinds = {(e.caption, style): held_out_kind(e, style) for e in entries for style in STYLES}
    concepts = {caption for (caption, _), kind in kinds.items() if kind == "concept"}
    combinations = {caption for (caption, _), kind in kinds.items() if kind == "combination"}
    assert 60 <= len(concepts) < 80
    assert combinations == {entry.caption for entry in select_split()["test"]}
    for whole in concepts | combinations:
        assert len({kinds[whole, style] for style in STYLES}) == 1
    cells = defaultdict(set)
    for (caption, style), kind in kinds.items():
        if kind == "cell":
            cells[caption].add(style)
    assert sum(len(styles & set(DEFAULT_STYLES)) for styles in cells.values()) > 250
    assert max(map(len, cells.values())) <= len(STYLES) / 2
    assert min(Counter(style for styles in cells.values() for style in styles).values()) > 20


def test_held_out_kind_is_as_recorded(entries):
    """The split is part of every published number: changing it must be a decision."""
    named = {entry.caption: entry for entry in entries}
    assert {held_out_kind(named["wolf"], style) for style in STYLES} == {"concept"}
    assert {held_out_kind(named["green heart"], style) for style in STYLES} == {"combination"}
    kinds = {style: held_out_kind(named["watermelon"], style) for style in STYLES}
    assert [style for style, kind in kinds.items() if kind] == ["flat"]
    concepts = [entry.caption for entry in entries if held_out_kind(entry, "new") == "concept"]
    assert concepts[:3] == ["grinning squinting face", "kissing face", "smiling face with tear"]


def test_held_out_concepts_are_no_prompts(entries):
    concepts = {e.caption for e in entries if held_out_kind(e, "3d") == "concept"}
    for concept in concepts:
        assert not set(concept.split()) & style_set.PROMPT_WORDS
    assert {"cat", "puppy", "snowman"} <= style_set.PROMPT_WORDS


def test_write_styles_lists_every_image_with_its_style(tmp_path, styles):
    folder = write_styles(tmp_path / "set", styles, size=16)
    for split in ("train", "test"):
        names = [row["file_name"] for row in read_rows(folder, split)]
        assert len(set(names)) == len(names)
        assert set(names) == {path.name for path in (folder / split).glob("*.png")}
    rows = {row["file_name"]: row for row in read_rows(folder, "train")}
    captions = rows["1f98a-flat.png"].pop("caption")
    assert captions[:2] == ["fox, flat style", "fox"]
    assert rows["1f98a-flat.png"] == {
        "file_name": "1f98a-flat.png",
        "emoji": "🦊",
        "concept": "fox",
        "style": "flat",
        "category": "Animals & Nature",
        "grid": None,
        "factors": {},
        "variation": None,
        "held_out": None,
        "duplicate_of": None,
        "licence": "MIT",
        "source": "@iconify-json/flat@1.0.0",
    }
    assert any("fruit" in text for text in rows["1f34b-noto.png"]["caption"])
    with Image.open(folder / "train" / "1f98a-flat.png") as image:
        pixels = np.asarray(image)
    assert pixels.shape == (16, 16, 3)
    assert pixels[0, 0].tolist() == [255] * 3 and pixels[8, 8].tolist() == [255, 165, 0]
    assert len(load_images(folder, resolution=16, cache_dir=tmp_path)) == len(rows)


def test_write_styles_holds_out_what_the_manifest_records(tmp_path, styles):
    folder = write_styles(tmp_path / "set", styles, size=16)
    manifest = read_manifest(folder) or {}
    test = read_rows(folder, "test")
    kinds = {row["file_name"]: row["held_out"] for row in test}
    assert kinds == {
        "1f49a-flat.png": "combination",
        "1f43a-flat.png": "concept",
        "1f43a-noto.png": "concept",
        "1f349-flat.png": "cell",
        "1f34b-flat.png": "cell",
    }
    assert manifest["held_out"] == {
        "combination": ["green heart"],
        "concept": ["wolf"],
        "cell": ["watermelon, flat style", "lemon, flat style"],
    }
    assert manifest["images"] == {"train": len(read_rows(folder, "train")), "test": len(test)}
    assert manifest["styles"]["flat"]["sha256"] == style_set.STYLES["flat"].sha256
    held = {(row["concept"], row["style"]) for row in test}
    trained = {(row["concept"], row["style"]) for row in read_rows(folder, "train")}
    assert not held & trained
    assert {"watermelon", "lemon"} <= {concept for concept, _ in trained}


def test_write_styles_varies_coloured_styles(tmp_path, styles):
    rows = read_rows(write_styles(tmp_path / "set", styles, size=16), "train")
    variations = {style: [row for row in rows if row["style"] == style] for style in styles}
    assert [row["variation"] for row in variations["ink"]] == [None, None]
    varied = [row for row in rows if row["variation"]]
    assert len({row["variation"] for row in varied}) >= 4
    for row in varied:
        name = recolour.plural(row["concept"]) if row["variation"] == "two" else row["concept"]
        full = f"{row['variation']} {name}, {row['style']} style"
        if row["variation"] != "three":
            assert row["caption"][0] == full
        assert not any(map(names_prompt, row["caption"]))
    assert {row["style"] for row in varied if row["concept"] == "fox"} == {"flat", "noto"}


def variations_of_square(entry, style):
    """Return the names of the variations of a red square that stands for an emoji."""
    square = Image.new("RGBA", (8, 8), (220, 40, 60, 255))
    return [name for name, _ in style_set.style_variations(entry, style, square, ())]


def test_style_variations_differ_between_styles(entries):
    fox = next(entry for entry in entries if entry.caption == "fox")
    assert len({tuple(variations_of_square(fox, style)) for style in STYLES}) > 4


def test_style_variations_are_no_prompt(entries, monkeypatch):
    monkeypatch.setattr(style_set, "COLOURS_PER_STYLE", len(recolour.PALETTE))
    named = {entry.caption: entry for entry in entries}
    banana = variations_of_square(named["banana"], "3d")
    assert "green" in banana and "purple" not in banana
    counted = next(e for e in named.values() if "two" in variations_of_square(e, "3d"))
    subject = subject_words(f"two {recolour.plural(counted.caption)}")
    monkeypatch.setattr(prompts, "SUBJECTS", [subject])
    assert "two" not in variations_of_square(counted, "3d")


def test_style_prompts_are_sixty_and_name_no_emoji(entries):
    assert len(set(STYLE_PROMPTS)) == 60
    assert set(recolour.OPEN_PROMPTS) < set(STYLE_PROMPTS)
    named = [name for entry in entries for name in entry.all_names if names_prompt(name)]
    assert not named


def test_names_prompt_ignores_style_case_and_articles():
    assert names_prompt("a blue fox in noto style")
    assert names_prompt("light blue fox face")
    assert not names_prompt("blue dogs")
    assert subject_words("A red elephant, in 3d style!") == {"red", "elephant"}


def test_style_variations_repeat_no_plural(entries):
    plurals = [e for e in entries if e.category in THINGS and is_plural(e.caption) and count_of(e)]
    assert len(plurals) > 5
    for entry in plurals:
        assert not {"two", "three"} & set(variations_of_square(entry, "3d"))


def test_write_styles_leaves_out_what_training_shows(tmp_path, styles, monkeypatch):
    """A twin of a training image, and a cell whose concept no other style shows."""
    cache = map_cache.cache_folder() / "packages"
    blue = pack_images(cache, "other", {"1f34b": "#0000c0"})
    monkeypatch.setitem(style_set.STYLES, "flat", blue)
    folder = write_styles(tmp_path / "twin", ("flat", "noto"), size=16)
    assert (read_manifest(folder) or {})["left_out"] == ["lemon, flat style"]
    assert not [row for row in read_rows(folder, "test") if row["concept"] == "lemon"]
    alone = write_styles(tmp_path / "alone", ("flat",), size=16)
    assert (read_manifest(alone) or {})["left_out"] == ["lemon, flat style"]
    assert not list((alone / "test").glob("*.png"))


def test_write_styles_names_the_first_of_equal_images(tmp_path, styles, monkeypatch):
    cache = map_cache.cache_folder() / "packages"
    twins = pack_images(cache, "twins", {"1f98a": "red", "1f42e": "red", "1f437": "blue"})
    monkeypatch.setitem(style_set.STYLES, "noto", twins)
    rows = read_rows(write_styles(tmp_path / "set", ("noto",), size=8), "train")
    twin_of = {row["file_name"]: row["duplicate_of"] for row in rows if not row["variation"]}
    first, second = sorted(("1f98a-noto.png", "1f42e-noto.png"), key=list(twin_of).index)
    assert twin_of == {first: None, second: first, "1f437-noto.png": None}


def test_write_styles_twice_changes_nothing(tmp_path, styles, monkeypatch):
    folder = write_styles(tmp_path / "a", styles, size=16)
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    again = write_styles(tmp_path / "b", styles, size=16)
    for path, content in files.items():
        assert (again / path.relative_to(folder)).read_bytes() == content
    repeated = write_styles(tmp_path / "c", (*styles, "flat"), size=16)
    assert read_rows(repeated, "train") == read_rows(folder, "train")
    before = (folder / "emoji.json").stat().st_mtime_ns
    for archive in (map_cache.cache_folder() / "packages").iterdir():
        archive.unlink()
    write_styles(folder, styles, size=16)
    assert (folder / "emoji.json").stat().st_mtime_ns == before
    monkeypatch.setenv("PATH", "")
    with pytest.raises(EmojiError, match="npm"):
        write_styles(folder, styles, size=8)
    assert json.loads((folder / "emoji.json").read_text())["size"] == 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"styles": ("3D",)}, "'3D'.*flat; noto; ink"), ({"size": 7}, "8 to 1024, got 7")],
)
def test_write_styles_refuses_invalid_requests(tmp_path, styles, arguments, message):
    with pytest.raises(EmojiError, match=message):
        write_styles(tmp_path / "set", **arguments)
    assert not (tmp_path / "set").exists()


def test_write_styles_says_which_package_is_missing(tmp_path, styles, monkeypatch):
    monkeypatch.setattr(style_set, "SOURCES", ("no-such-renderer",))
    with pytest.raises(EmojiError, match=r"no-such-renderer.*direct-jump\[emoji\]"):
        write_styles(tmp_path / "set", styles)


@pytest.mark.slow
@pytest.mark.parametrize("style", STYLES)
def test_each_style_draws_the_catalogue(style, entries):
    """Uses the packages that `direct-jump emoji DIR --styles` has downloaded."""
    cache = map_cache.cache_folder() / "packages"
    if not packages.archive_path(STYLES[style], cache).exists():
        pytest.skip(f"not downloaded yet: direct-jump emoji DIR --styles {style} (needs npm)")
    drawings = packages.load_drawings(STYLES[style], cache)
    keys = drawings.keys_of(entries)
    assert len(keys) > 1000
    assert len({entry.category for entry in catalogue() if entry.emoji in keys}) == 8
    for emoji in list(keys)[::100]:
        pixels = np.asarray(drawings.draw(keys[emoji], 64))
        assert pixels.shape == (64, 64, 4)
        assert 0.01 < (pixels[..., 3] > 128).mean() < 1
