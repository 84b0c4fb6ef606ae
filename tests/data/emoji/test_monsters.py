"""Monsters from parts: exact captions, and pairs of parts that are never shown together."""

import itertools

import numpy as np
import pytest
from datasets_on_disk import read_rows
from PIL import Image

from pipeline.data.emoji import monsters, writer
from pipeline.data.emoji.catalogue import EmojiError
from pipeline.data.emoji.recolour import PALETTE

EVERY = [
    dict(zip(monsters.PARTS, values, strict=True))
    for values in itertools.product(*monsters.PARTS.values())
]
FEW = {
    "color": ("green", "blue"),
    "shape": ("round", "square"),
    "top": ("horns", "antennae"),
    "eyes": ("one eye", "three eyes"),
    "mood": ("smiling", "sad"),
}


@pytest.fixture
def few(monkeypatch):
    """Leave two values of each factor: 32 monsters."""
    parts = {
        factor: {value: monsters.PARTS[factor][value] for value in values}
        for factor, values in FEW.items()
    }
    monkeypatch.setattr(monsters, "PARTS", parts)


@pytest.fixture(scope="module")
def draw():
    return monsters.load_artist()


def test_held_out_pairs_leave_every_value_trained():
    held = {pair: [] for factors in EVERY for pair in map(tuple, monsters.held_out_pairs(factors))}
    trained = [factors for factors in EVERY if not monsters.held_out_pairs(factors)]
    assert 8 <= len(held) <= 20
    assert ("blue", "antennae") in held
    assert 0.5 < len(trained) / len(EVERY) < 0.9
    for factor, parts in monsters.PARTS.items():
        assert {factors[factor] for factors in trained} == set(parts)
    for first, second in held:
        assert not any({first, second} <= set(factors.values()) for factors in trained)


def test_monster_captions_say_all_factors_in_the_first():
    factors = dict(zip(FEW, ("green", "round", "horns", "three eyes", "smiling"), strict=True))
    captions = monsters.monster_captions(factors)
    assert captions[0] == "a green round monster with horns and three eyes, smiling"
    orange = monsters.monster_captions(factors | {"color": "orange"})
    assert orange[0].startswith("an orange round monster")
    assert all(value in text for value in factors.values() for text in captions[:2])
    full = [monsters.monster_captions(factors)[0] for factors in EVERY]
    assert len(set(full)) == len(full) == 4800
    partial = {monsters.monster_captions(factors)[2].split()[0] for factors in EVERY}
    assert partial == {"a", "an"}


@pytest.mark.parametrize("factor", monsters.PARTS)
def test_load_artist_draws_each_value_differently(factor, draw):
    base = EVERY[0]
    images = [draw(base | {factor: value}, 64).tobytes() for value in monsters.PARTS[factor]]
    assert len(set(images)) == len(images)


@pytest.mark.parametrize("color", monsters.PARTS["color"])
def test_load_artist_uses_the_palette_on_white(color, draw):
    pixels = np.asarray(draw(EVERY[0] | {"color": color, "shape": "square"}, 100))
    assert pixels.shape == (100, 100, 3)
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert tuple(pixels[90, 50]) == PALETTE[color]
    horns = {PALETTE["yellow"], PALETTE["blue"]} - {PALETTE[color]}
    assert horns & set(map(tuple, pixels[:20].reshape(-1, 3).tolist()))


def test_write_monsters_splits_by_pairs(tmp_path, few):
    folder = monsters.write_monsters(tmp_path / "set", size=16)
    rows = {split: read_rows(folder, split) for split in ("train", "test")}
    manifest = writer.read_manifest(folder) or {}
    assert manifest["held_out"] == {"pair": [["blue", "antennae"], ["green", "round"]]}
    assert manifest["images"] == {split: len(listed) for split, listed in rows.items()}
    assert manifest["images"] == {"train": 16, "test": 16}
    assert not any(row["held_out"] for row in rows["train"])
    for row in rows["test"]:
        assert row["held_out"]
        assert all(set(pair) <= set(row["factors"].values()) for pair in row["held_out"])
    for split, listed in rows.items():
        names = {row["file_name"] for row in listed}
        assert names == {path.name for path in (folder / split).glob("*.png")}
    assert "green-square-horns-one-eye-sad.png" in {row["file_name"] for row in rows["train"]}
    with Image.open(folder / "train" / "green-square-horns-one-eye-sad.png") as image:
        assert image.size == (16, 16)


def test_write_monsters_twice_changes_nothing(tmp_path, few):
    folder = monsters.write_monsters(tmp_path / "a", size=16)
    before = (folder / "emoji.json").stat().st_mtime_ns
    monsters.write_monsters(folder, size=16)
    assert (folder / "emoji.json").stat().st_mtime_ns == before
    again = monsters.write_monsters(tmp_path / "b", size=16)
    for path in folder.rglob("*.*"):
        assert (again / path.relative_to(folder)).read_bytes() == path.read_bytes()


def test_write_monsters_refuses_sizes_and_missing_packages(tmp_path, monkeypatch):
    with pytest.raises(EmojiError, match="got 7"):
        monsters.write_monsters(tmp_path / "set", size=7)
    monkeypatch.setattr(monsters, "SOURCES", ("no-such-artist",))
    with pytest.raises(EmojiError, match=r"no-such-artist.*direct-jump\[emoji\]"):
        monsters.write_monsters(tmp_path / "set")
    assert not (tmp_path / "set").exists()
