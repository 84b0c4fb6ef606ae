"""Emoji datasets as image folders: complete, reproducible, replaced when they change."""

from collections import defaultdict

import datasets
import numpy as np
import pytest
from datasets_on_disk import read_rows
from PIL import Image

from pipeline.data.emoji import writer
from pipeline.data.emoji.catalogue import EmojiError


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return writer.write_emoji(tmp_path_factory.mktemp("emoji") / "small", "emoji-small", size=64)


def test_write_emoji_lists_every_image_it_writes(small):
    for split, at_least in [("train", 400), ("test", 40)]:
        listed = read_rows(small, split)
        names = [row["file_name"] for row in listed]
        assert len(listed) >= at_least
        assert len(set(names)) == len(names)
        assert set(names) == {p.name for p in (small / split).glob("*.png")}
    row = next(row for row in read_rows(small, "test") if row["caption"] == "green heart")
    assert row == {
        "file_name": "1f49a.png",
        "caption": "green heart",
        "emoji": "💚",
        "category": "Smileys & Emotion",
        "grid": "hearts",
        "factors": {"shape": "heart", "color": "green"},
        "variation": None,
        "duplicate_of": None,
    }


def test_write_emoji_flattens_on_white(small):
    with Image.open(small / "train" / "2764.png") as image:
        pixels = np.asarray(image)
    assert pixels.shape == (64, 64, 3)
    assert (pixels[0, 0] == 255).all() and (pixels[-1, -1] == 255).all()
    # Twemoji's red is #DD2E44.
    assert np.abs(pixels[32, 32].astype(int) - (221, 46, 68)).max() <= 2


def test_write_emoji_is_an_imagefolder_of_datasets(small, tmp_path):
    loaded = datasets.load_dataset("imagefolder", data_dir=str(small), cache_dir=str(tmp_path))
    assert loaded.keys() == {"train", "test"}
    for split in loaded:
        assert len(loaded[split]) == len(read_rows(small, split))
    assert loaded["test"][0]["caption"] == read_rows(small, "test")[0]["caption"]
    assert loaded["train"][0]["image"].size == (64, 64)


def test_write_splits_records_duplicate_images(tmp_path):
    """Twemoji has one image for several families; all but the first name the first."""
    people = ("People & Body",)
    folder = writer.write_emoji(tmp_path / "people", "emoji", size=16, categories=people)
    images = defaultdict(list)
    for row in read_rows(folder, "train"):
        with Image.open(folder / "train" / row["file_name"]) as image:
            images[image.tobytes()].append(row)
    groups = [group for group in images.values() if len(group) > 1]
    assert len(groups) >= 4
    assert all(row["caption"].startswith("family") for group in groups for row in group)
    for first, *others in images.values():
        assert first["duplicate_of"] is None
        assert all(row["duplicate_of"] == first["emoji"] for row in others)


def test_write_emoji_twice_changes_nothing(tmp_path):
    folder = writer.write_emoji(tmp_path / "a", "shapes", size=16)
    files = [path for path in folder.rglob("*") if path.is_file()]
    before = [(path.stat().st_mtime_ns, path.read_bytes()) for path in files]
    writer.write_emoji(folder, "shapes", size=16)
    assert [path for path in folder.rglob("*") if path.is_file()] == files
    assert [(path.stat().st_mtime_ns, path.read_bytes()) for path in files] == before
    again = writer.write_emoji(tmp_path / "b", "shapes", size=16)
    for path in files:
        assert (again / path.relative_to(folder)).read_bytes() == path.read_bytes()


def test_write_emoji_replaces_another_selection(tmp_path):
    folder = writer.write_emoji(tmp_path / "a", "emoji-small", size=8, categories=("Symbols",))
    writer.write_emoji(folder, "shapes", size=16)
    assert len(list((folder / "train").glob("*.png"))) == 22
    with Image.open(folder / "train" / "2764.png") as image:
        assert image.size == (16, 16)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_write_emoji_leaves_nothing_after_a_failure(tmp_path, monkeypatch):
    def full(image, *args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="No space"):
        writer.write_emoji(tmp_path / "a", "shapes")
    assert not list(tmp_path.iterdir())


def test_write_emoji_refuses_a_folder_with_other_files(tmp_path):
    (tmp_path / "photo.txt").write_text("mine")
    with pytest.raises(EmojiError, match="not an emoji dataset"):
        writer.write_emoji(tmp_path, "shapes")
    assert (tmp_path / "photo.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "emojis"}, "'emojis'.* emoji; emoji-varied; emoji-small; shapes"),
        ({"categories": ("Animal",)}, "'Animal'.*Animals & Nature"),
        ({"name": "shapes", "categories": ("Flags",)}, "'shapes'.*Flags"),
        ({"size": 0}, "8 to 1024, got 0"),
        ({"size": 64.0}, "8 to 1024, got 64.0"),
    ],
)
def test_write_emoji_refuses_invalid_requests(arguments, message, tmp_path):
    with pytest.raises(EmojiError, match=message):
        writer.write_emoji(tmp_path / "a", **arguments)
    assert not list(tmp_path.iterdir())
