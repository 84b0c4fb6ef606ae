"""Captioned image folders with everything that goes wrong in them, and the stateless randomness of a step."""

import contextlib
import dataclasses
import io
import itertools
import json
import math
import os
import resource
import time
import unicodedata
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_sources import write
from transformers import BertConfig, BertModel, BertTokenizerFast, CLIPTextConfig, CLIPTextModel

from pipeline import randomness
from pipeline.config import DataConfig
from pipeline.data import caption_cache, dataset, image_ops, map_cache, sampler
from pipeline.data.emoji import writer
from pipeline.data.sources import rows as rows_module
from pipeline.data.sources.rows import BrokenRow, DataError, as_row, fetch_image_bytes
from pipeline.data.streaming import Stream
from pipeline.diffusion import text_to_image
from pipeline.diffusion.captions import normalize


@pytest.fixture
def load(tmp_path):
    """load_images on tmp_path/set with a cache of the test's own and no limit on broken rows, unless given."""

    def call(folder=None, **options):
        options = {"resolution": 8, "cache_dir": tmp_path / "cache", "max_broken": 1.0} | options
        return dataset.load_images(folder or tmp_path / "set", **options)

    (tmp_path / "set").mkdir()
    return call


def save(path, color="red", size=(8, 8), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path)


def listing(folder, *rows):
    (folder / "metadata.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    )


def encoded(picture, kind="PNG", **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def reasons(images):
    return dict(images.report.broken)


# ---- where captions come from


def test_captions_from_metadata_stay_with_their_pictures(load, tmp_path):
    folder = tmp_path / "set"
    save(folder / "a.png", "red")
    save(folder / "sub" / "b.png", "blue")
    listing(
        folder,
        {"file_name": "sub/b.png", "caption": "blue", "kind": 7},
        {"file_name": "a.png", "caption": "red", "kind": None},
    )
    images = load()
    assert images.captions == ["blue", "red"]
    assert images.metadata == [
        {"file_name": "sub/b.png", "kind": 7},
        {"file_name": "a.png", "kind": None},
    ]
    assert images.images[[0, 1]][:, :, 0, 0].tolist() == [[0, 0, 255], [255, 0, 0]]


def test_captions_from_text_files_and_from_file_names(load, tmp_path):
    folder = tmp_path / "set"
    save(folder / "red_heart.png")
    save(folder / "b.jpg")
    assert load().captions == ["b", "red heart"]
    (folder / "b.txt").write_text("a blue\n  whale\n", encoding="utf-8")
    images = load()
    assert images.captions == ["a blue whale", ""]
    report = str(images.report)
    assert (
        "1 images have no .txt or .caption beside them" in report
        and "1 images have an empty caption" in report
    )
    (folder / "red_heart.caption").write_bytes("\ufeffa heart".encode())
    assert load().captions == ["a blue whale", "a heart"]


def test_splits_are_folders(load, tmp_path):
    save(tmp_path / "set" / "train" / "a.png")
    save(tmp_path / "set" / "test" / "b.png")
    assert (load().captions, load(split="test").captions) == (["a"], ["b"])
    with pytest.raises(DataError, match="no split 'validation': it has test, train"):
        load(split="validation")


def test_pictures_beside_a_test_folder_are_not_taken_for_the_training_split(load, tmp_path):
    """They would bring the test pictures with them."""
    save(tmp_path / "set" / "a.png")
    save(tmp_path / "set" / "test" / "b.png")
    with pytest.raises(DataError, match="no split 'train': it has test"):
        load()


def test_the_emoji_folder_loads(tmp_path):
    folder = writer.write_emoji(tmp_path / "shapes", "shapes", size=16)
    images = dataset.load_images(folder, "test", 16, cache_dir=tmp_path)
    assert (
        len(images) == 6
        and images.captions[0] == "green heart"
        and images.metadata[0]["factors"]["color"] == "green"
    )
    with Image.open(folder / "test" / images.metadata[3]["file_name"]) as picture:
        assert (images.images[3].permute(1, 2, 0).numpy() == np.asarray(picture)).all()


def test_a_caption_column_can_be_chosen(load, tmp_path):
    save(tmp_path / "set" / "a.png")
    listing(tmp_path / "set", {"file_name": "a.png", "caption": "one", "title": "two"})
    assert load().captions == ["one"]
    assert load(caption_column="title").captions == ["two"]
    with pytest.raises(
        DataError, match="no caption column 'name': it has caption, file_name, title"
    ):
        load(caption_column="name")


@pytest.mark.parametrize(
    ("value", "caption"),
    [
        (None, ""),
        ("", ""),
        (" \t\n ", ""),
        (" a  b ", "a b"),
        ("Cafe\u0301", "Café"),
        ("a\x00b", "ab"),
        ("x\ud800y", "xy"),
        ("\u200fשלום 👩‍🍳", "\u200fשלום 👩‍🍳"),
        (["only"], "only"),
    ],
)
def test_captions_are_cleaned_and_none_is_the_empty_one(value, caption, load, tmp_path):
    save(tmp_path / "set" / "a.png")
    listing(tmp_path / "set", {"file_name": "a.png", "caption": value})
    assert load().captions == [caption]


@pytest.mark.parametrize("value", [math.nan, 3.5, 7, True, {"en": "a"}, [], ["a", None]])
def test_what_is_no_caption_is_named(value, load, tmp_path):
    save(tmp_path / "set" / "a.png")
    save(tmp_path / "set" / "b.png")
    listing(
        tmp_path / "set",
        {"file_name": "a.png", "caption": value},
        {"file_name": "b.png", "caption": "b"},
    )
    images = load()
    assert images.captions == ["b"]
    assert reasons(images)["a.png"] == f"its caption must be text or a list of texts, got {value!r}"


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters()))
def test_normalizing_is_nfc_and_happens_once(text):
    clean = normalize(text)
    assert clean == normalize(clean) == unicodedata.normalize("NFC", clean) == clean.strip()
    assert clean == normalize(unicodedata.normalize("NFD", text))
    clean.encode()


# ---- broken rows


def test_broken_files_are_skipped_counted_and_named(load, tmp_path):
    """A text, an empty file, cut PNG and JPEG files, one of which ends a plain iteration; the good ones stay."""
    folder = tmp_path / "set"
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    for name, content in [
        ("text.png", b"not a picture"),
        ("empty.png", b""),
        ("cut.png", encoded(noise)[:3000]),
        ("cut.jpg", encoded(noise, "JPEG")[:2000]),
    ]:
        (folder / name).write_bytes(content)
    save(folder / "good.png")
    images = load()
    assert images.captions == ["good"] and len(images.images) == 1
    assert reasons(images).keys() == {"text.png", "empty.png", "cut.png", "cut.jpg"}
    assert (
        "cannot identify" in reasons(images)["text.png"]
        and "truncated" in reasons(images)["cut.jpg"]
    )
    assert "1 of 5 images usable" in str(images.report) and "skipped cut.png: " in str(
        images.report
    )


def test_too_many_broken_rows_end_it_by_name(load, tmp_path):
    folder = tmp_path / "set"
    for i in range(19):
        save(folder / f"{i}.png")
    (folder / "bad.png").write_bytes(b"")
    assert len(load(max_broken=0.05)) == 19
    (folder / "worse.png").write_bytes(b"")
    with pytest.raises(
        DataError, match=r"skipped bad.png: (.|\n)*2 of 21 rows are broken, at most 5% may be"
    ):
        load(max_broken=0.05)


def test_a_report_names_five_rows_and_counts_all_by_their_reason():
    reasons = ["cut: at 7", "cut: at 9", "no text, got 3", "cut: at 1", "gone", "gone", "cut: at 2"]
    report = dataset.DatasetReport(
        "x", 9, tuple((f"{i}.png", reason) for i, reason in enumerate(reasons))
    )
    assert str(report).count("skipped") == 6 and str(report).endswith("skipped 2 more")
    assert "7 broken rows: 4 x cut, 2 x gone, 1 x no text\n" in str(report)


def test_a_report_says_what_sizes_there_are_and_which_pictures_come_again(load, tmp_path):
    for name, color, size in [
        ("a", "red", (8, 20)),
        ("b", "red", (50, 40)),
        ("c", "blue", (6, 9)),
        ("d", "blue", (8, 8)),
        ("e", "green", (100, 30)),
    ]:
        save(tmp_path / "set" / f"{name}.png", color, size)
    report = str(load().report)
    assert "shorter sides of 6 to 40 (median 8) pixels; 1 are below 8 and are enlarged\n" in report
    assert report.endswith("2 pictures are the same as an earlier one, e.g. b.png as a.png")
    save(tmp_path / "one" / "a.png")
    (tmp_path / "one" / "a.txt").write_text("a")
    assert str(load(tmp_path / "one").report).endswith(
        "1 of 1 images usable\nshorter sides of 8 pixels"
    )


def test_a_report_says_how_long_captions_are_by_the_tokenizer(load, tmp_path, tokenizer):
    """[CLS] and [SEP] count, as they do in what the encoder reads."""
    for name in ("cat", "red_heart", "green_cat_face", "red"):
        save(tmp_path / "set" / f"{name}.png")
    images = load()
    assert "captions of 3 to 5 (median 4) tokens" in str(images.with_caption_lengths(tokenizer, 5).report)
    cut = str(images.with_caption_lengths(tokenizer, 4).report)
    assert "captions of 3 to 5 (median 4) tokens; 1 of 4 are cut at 4, e.g. 'green cat face'" in cut
    assert "tokens" not in str(images.report)


def test_listed_files_that_are_missing_and_files_that_are_not_listed_are_reported(load, tmp_path):
    folder = tmp_path / "set"
    for name in ("a.png", "unlisted.png", "../outside.png"):
        save(folder / name)
    listing(
        folder,
        {"file_name": "a.png", "caption": "a"},
        {"file_name": "gone.png", "caption": "b"},
        {"caption": "no file"},
        {"file_name": "../outside.png", "caption": "c"},
    )
    with (folder / "metadata.jsonl").open("a") as file:
        file.write('{"file_name": \n[1]\n')
    images = load()
    found = reasons(images)
    assert images.captions == ["a"] and "1 images have no row in" in str(images.report)
    assert (
        found["gone.png"] == "its file does not exist"
        and found["../outside.png"] == "its file is outside the folder"
    )
    assert "file_name must be text, got None" in found["metadata.jsonl:3"]
    assert (
        "Expecting value" in found["metadata.jsonl:5"]
        and "expected an object" in found["metadata.jsonl:6"]
    )


def test_that_captions_are_file_names_is_said(load, tmp_path):
    save(tmp_path / "set" / "red_heart.png")
    assert "captions are the file names, e.g. 'red heart'" in str(load().report)
    (tmp_path / "set" / "red_heart.txt").write_text("a heart")
    assert load().captions == ["a heart"] and "file names" not in str(load().report)


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("metadata.jsonl", r"metadata.jsonl is not beside the images of .*train: move it there"),
        (
            "train/more/metadata.csv",
            r"metadata.csv is below .*train, where no listing is looked for",
        ),
    ],
)
def test_a_listing_that_would_not_be_read_is_refused(load, tmp_path, place, says):
    save(tmp_path / "mine" / "train" / "more" / "a.png")
    (tmp_path / "mine" / place).write_text("file_name,caption\na.png,a\n")
    with pytest.raises(DataError, match=says):
        load(tmp_path / "mine")


@pytest.mark.parametrize("suffix", [".avif", ".jfif", ".jpe"])
def test_less_usual_endings_are_pictures_too(suffix, load, tmp_path):
    (tmp_path / "set").mkdir(exist_ok=True)
    Image.new("RGB", (8, 8), "red").save(tmp_path / "set" / f"a{suffix}")
    assert load().captions == ["a"]


def test_a_run_that_goes_on_keeps_the_pictures_that_it_began_with(tmp_path, monkeypatch):
    """One that can be read again would be other data."""
    for name in ("a.png", "b.png"):
        save(tmp_path / "set" / "train" / name)
    config = DataConfig(
        str(tmp_path / "set"),
        held_out=None,
        resolution=8,
        cache=str(tmp_path / "cache"),
        max_broken=0.9,
    )
    real = fetch_image_bytes

    def stale(image):
        if image["path"].endswith("b.png"):
            raise OSError(116, "Stale file handle")
        return real(image)

    with monkeypatch.context() as broken:
        broken.setattr(rows_module, "fetch_image_bytes", stale)
        begun = dataset.load_splits(config, again=True)[0]
    assert (
        begun.captions == ["a"] and dataset.load_splits(config)[0].fingerprint == begun.fingerprint
    )
    assert dataset.load_splits(config, again=True)[0].captions == ["a", "b"]


def test_a_file_that_could_not_be_read_is_read_again_at_the_next_start(load, tmp_path):
    for name in ("a.png", "b.png"):
        save(tmp_path / "set" / name)
    (tmp_path / "set" / "b.png").rename(tmp_path / "away.png")
    (tmp_path / "set" / "b.png").symlink_to(tmp_path / "away.png")
    (tmp_path / "away.png").rename(tmp_path / "unmounted.png")
    images = load()
    assert (
        images.captions == ["a"]
        and "its file cannot be read: [Errno 2] No such file" in reasons(images)["b.png"]
    )
    (tmp_path / "unmounted.png").rename(tmp_path / "away.png")
    assert load().captions == ["a", "b"]


@pytest.mark.parametrize("struct", [False, True])
def test_the_pictures_that_a_table_names_by_path_are_read_as_they_are_now(load, tmp_path, struct):
    for name in ("a.png", "b.png"):
        save(tmp_path / "pictures" / name)
    paths = [str(tmp_path / "pictures" / name) for name in ("a.png", "b.png")]
    column = [{"bytes": None, "path": path} for path in paths] if struct else paths
    table = tmp_path / "some.parquet"
    datasets.Dataset.from_dict({"image": column, "text": ["a", "b"]}).to_parquet(table)
    gone = Path(paths[1]).rename(tmp_path / "gone.png")
    more = {"image_column": "image", "max_broken": 0.5}
    assert load(table, **more).captions == ["a"]
    gone.rename(paths[1])
    whole = load(table, **more)
    assert whole.captions == ["a", "b"]
    if not struct:
        Image.new("RGB", (8, 8), "blue").save(paths[1])
        assert load(table, **more).fingerprint != whole.fingerprint


def test_a_held_out_folder_in_a_flat_one_is_not_trained_on(load, tmp_path):
    for name in ("a.png", "val/b.png"):
        save(tmp_path / "mine" / name)
    with pytest.raises(DataError, match="has no split 'train': it has val. Name the splits"):
        load(tmp_path / "mine", held_out="val")
    assert load(tmp_path / "mine", held_out=None).captions == ["a", "b"]


def test_a_csv_listing_is_read_as_image_folders_have_it(load, tmp_path):
    folder = tmp_path / "set"
    for name in ("a.png", "b.png", "c.png", "IMG_1.png"):
        save(folder / name)
    rows = '\ufefffile_name,text,licence\na.png,"a ""red"", round cat",CC0\nb.png,,\nc.png,a dog, a cat,CC0\n'
    (folder / "metadata.csv").write_text(rows, encoding="utf-8")
    images = load()
    assert images.captions == ['a "red", round cat', ""]
    assert images.metadata[0] == {"file_name": "a.png", "licence": "CC0"}
    assert reasons(images) == {
        "metadata.csv:3": "it has more cells than the header: quote a caption with commas in it"
    }
    assert "2 images have no row in" in str(images.report)
    (folder / "metadata.csv").write_bytes(b"file_name,text\na.png,\xff\n")
    with pytest.raises(DataError, match="metadata.csv cannot be read .* save it as UTF-8 CSV"):
        load()


def test_a_decompression_bomb_is_skipped(load, tmp_path):
    """A file of some kilobytes that claims 65 megapixels; below the limit the same picture is read."""
    bomb = encoded(Image.new("1", (8125, 8000)))
    assert len(bomb) < 20_000
    (tmp_path / "set" / "bomb.png").write_bytes(bomb)
    save(tmp_path / "set" / "fine.png")
    images = load()
    assert images.captions == ["fine"]
    assert "8125 x 8000 pixels are more than the limit of 64,000,000" in reasons(images)["bomb.png"]


def test_nothing_usable_is_an_error(load, tmp_path):
    with pytest.raises(
        DataError,
        match="has no split 'train': it has no folders. Name .* --data.held_out null trains without",
    ):
        load()
    (tmp_path / "set" / "train").mkdir()
    with pytest.raises(DataError, match="holds no images: expected files ending in"):
        load()
    with pytest.raises(DataError, match="no image folder at"):
        load(tmp_path / "elsewhere")
    (tmp_path / "set" / "train" / "bad.png").write_bytes(b"")
    with pytest.raises(DataError, match="1 of 1 rows are broken"):
        load()


# ---- pixels


def pixel(content):
    return image_ops.decode(content, 4)[:, 1, 1].tolist()


def test_transparency_shows_white():
    """What is hidden keeps a colour that convert("RGB") would reveal."""
    assert pixel(encoded(Image.new("RGBA", (4, 4), (255, 0, 0, 0)))) == [255, 255, 255]
    assert pixel(encoded(Image.new("RGBA", (4, 4), (255, 0, 0, 128)))) == pytest.approx(
        [255, 127, 127], abs=1
    )
    assert pixel(encoded(Image.new("LA", (4, 4), (0, 0)))) == [255, 255, 255]
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 9, 99, 199])
    assert pixel(encoded(palette)) == [9, 99, 199]
    assert pixel(encoded(palette, transparency=1)) == [255, 255, 255]


def test_grey_cmyk_and_sixteen_bits():
    assert pixel(encoded(Image.new("L", (4, 4), 77))) == [77, 77, 77]
    assert pixel(encoded(Image.new("1", (4, 4), 1))) == [255, 255, 255]
    deep = Image.fromarray(np.full((4, 4), 40000, np.uint16))
    assert pixel(encoded(deep)) == [round(40000 / 257)] * 3
    assert pixel(encoded(deep, "TIFF")) == [round(40000 / 257)] * 3
    assert pixel(encoded(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "TIFF")) == [255, 0, 0]
    with pytest.raises(BrokenRow, match="floating-point"):
        pixel(encoded(Image.new("F", (4, 4), 0.5), "TIFF"))


def test_exif_turns_the_picture_upright():
    """Orientation 6: the stored left column is shown on top."""
    stored = Image.new("RGB", (8, 8), "white")
    stored.paste("black", (0, 0, 4, 8))
    exif = Image.Exif()
    exif[0x0112] = 6
    shown = image_ops.decode(encoded(stored, exif=exif), 8)
    assert (shown[:, :4] == 0).all() and (shown[:, 4:] == 255).all()


def test_the_first_frame_of_an_animation():
    frames = [Image.new("RGB", (4, 4), c) for c in ("red", "blue")]
    assert pixel(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])) == [255, 0, 0]


@pytest.mark.parametrize("size", [(1, 1), (4000, 1), (1, 4000), (3, 5), (8, 8), (9, 8)])
def test_any_shape_becomes_its_central_square(size):
    picture = Image.new("RGB", size, "blue")
    side = min(size)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    picture.paste("red", (left, top, left + side, top + side))
    shown = image_ops.decode(encoded(picture), 8)
    assert shown.shape == (3, 8, 8) and (shown == np.array([255, 0, 0])[:, None, None]).all()


def test_a_random_crop_is_anywhere_and_the_same_at_every_start_and_in_a_stream(tmp_path):
    """Wide pictures whose red tells the column; those of the held-out split show their middle."""

    def wide(i):
        columns = np.zeros((8, 200, 3), np.uint8)
        columns[..., 0], columns[..., 1] = np.arange(200), i
        return encoded(Image.fromarray(columns))

    for split, count in [("train", 40), ("test", 2)]:
        write(
            tmp_path / "set" / f"{split}.parquet",
            [{"image": wide(i), "text": str(i)} for i in range(count)],
        )
    settings = DataConfig(
        str(tmp_path / "set"), resolution=8, crop="random", cache=str(tmp_path / "cache")
    )
    train, held_out = dataset.load_splits(settings)
    left = train.images[:][:, 0, 0, 0].tolist()
    assert min(left) < 40 and max(left) > 150 and len(set(left)) > 20
    assert held_out.images[:][:, 0, 0, 0].tolist() == [96, 96]
    again, _ = dataset.load_splits(dataclasses.replace(settings, cache=str(tmp_path / "other")))
    assert again.images[:].equal(train.images[:])
    with contextlib.closing(
        Stream(dataclasses.replace(settings, streaming=True), seed=0)
    ) as stream:
        streamed = stream.take(40).images
    assert sorted(streamed[:, 0, 0, 0].tolist()) == sorted(left)
    centred, _ = dataset.load_splits(dataclasses.replace(settings, crop="center"))
    assert centred.images[:][:, 0, 0, 0].tolist() == [96] * 40, "another crop has its own cache"


# ---- reading and caching


def test_rows_are_read_in_any_order_and_by_any_index(load, tmp_path):
    for i in range(5):
        save(tmp_path / "set" / f"{i}.png", (i, 0, 0))
    images = load().images
    assert images.shape == (5, 3, 8, 8) and len(images) == 5 and images[2].dtype == torch.uint8
    first = lambda batch: batch[:, 0, 0, 0].tolist()
    assert first(images[torch.tensor([4, 0, 4])]) == [4, 0, 4] == first(images[[4, 0, 4]])
    assert first(images[1:4]) == [1, 2, 3] and first(images[-2:]) == [3, 4]
    assert images[3].shape == (3, 8, 8) and int(images[3][0, 0, 0]) == 3 == int(
        images[torch.tensor(3)][0, 0, 0]
    )
    with pytest.raises(IndexError):
        images[5]


def test_preparing_happens_once_and_again_when_a_file_changes(load, tmp_path, monkeypatch):
    calls, upright = [], image_ops.load_rgb
    monkeypatch.setattr(image_ops, "load_rgb", lambda *a: calls.append(1) or upright(*a))
    save(tmp_path / "set" / "a.png", "red")
    save(tmp_path / "set" / "b.png", "red")
    first, again = load(), load()
    assert len(calls) == 2 and first.fingerprint == again.fingerprint
    assert load(resolution=4).fingerprint != first.fingerprint and len(calls) == 4
    save(tmp_path / "set" / "a.png", "green")
    changed = load()
    assert (
        len(calls) == 6
        and changed.fingerprint != first.fingerprint
        and int(changed.images[0][0, 0, 0]) == 0
    )


def test_pictures_prepared_by_many_threads_keep_their_order(load, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "cores", lambda: 5)
    for i in range(150):
        save(tmp_path / "set" / f"{i:03d}.png", (i, 0, 0), size=(8, 8 + 40 * (i % 3)))
    found = load()
    assert found.images[:][:, 0, 0, 0].tolist() == [*range(150)] and found.captions == [
        f"{i:03d}" for i in range(150)
    ]


def test_of_a_preparation_that_fails_nothing_is_left(load, tmp_path):
    """A disk that is full; and what a kill has left is cleared away by the next, but for what is being made."""
    save(tmp_path / "set" / "a.png", size=(64, 64))
    cache, before = tmp_path / "cache" / "direct-jump", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError, match="[Tt]oo large"):
            load(resolution=64)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(cache.iterdir())
    for name, age in (("old", 2 * map_cache.SCRATCH_MAX_AGE), ("new", 1)):
        (cache / f"{map_cache.SCRATCH_PREFIX}{name}").mkdir()
        (cache / f"{map_cache.SCRATCH_PREFIX}{name}" / "tmp").touch()
        for path in (
            cache / f"{map_cache.SCRATCH_PREFIX}{name}" / "tmp",
            cache / f"{map_cache.SCRATCH_PREFIX}{name}",
        ):
            os.utime(path, (time.time() - age,) * 2)
    assert len(load(resolution=64)) == 1
    assert sorted(path.name.partition("-")[0] for path in cache.iterdir()) == [".making", "images"]
    assert (cache / f"{map_cache.SCRATCH_PREFIX}new" / "tmp").exists()


@pytest.mark.parametrize("damage", ["empty", "torn", "fewer rows"])
def test_a_prepared_file_that_is_damaged_is_made_again(load, tmp_path, damage):
    """A machine that lost its power, or a copy that was interrupted, between two of its rows perhaps."""
    for i in range(3):
        save(tmp_path / "set" / f"{i}.png", (i, 0, 0))
    fingerprint = load().fingerprint
    (path,) = (tmp_path / "cache" / "direct-jump").glob("images-*.arrow")
    if damage == "fewer rows":
        with open(path, "rb") as file:
            table = pyarrow.ipc.open_stream(file).read_all()
        with pyarrow.ipc.new_stream(str(path), table.schema) as file:
            file.write_table(table.slice(0, 2))
    else:
        path.write_bytes(path.read_bytes()[: 0 if damage == "empty" else -path.stat().st_size // 2])
    with pytest.warns(UserWarning, match=r"images-\w+.arrow is damaged \(.+\) and is made again"):
        assert load().fingerprint == fingerprint
    assert load().fingerprint == fingerprint


def test_the_fingerprint_is_of_pixels_and_captions_not_of_paths(load, tmp_path):
    """So that a run may go on where its data lies elsewhere."""
    save(tmp_path / "set" / "a.png")
    save(tmp_path / "copy" / "a.png")
    save(tmp_path / "other" / "b.png")
    fingerprints = [load(tmp_path / name).fingerprint for name in ("set", "copy", "other")]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


def test_a_file_name_that_is_not_utf8_is_reported(load, tmp_path):
    save(tmp_path / "set" / "a.png")
    (tmp_path / "set" / "a.png").rename(tmp_path / "set" / "bad\udcff.png")
    save(tmp_path / "set" / "b.png")
    images = load()
    assert images.captions == ["b"] and list(reasons(images).values()) == [
        "its file name is not valid UTF-8"
    ]


# ---- caption states


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "heart", "cat", "green", "face"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("words") / "vocab.txt"
    path.write_text("\n".join(WORDS))
    return BertTokenizerFast(vocab_file=str(path))


def bert(seed=0):
    torch.manual_seed(seed)
    return BertModel(
        BertConfig(
            vocab_size=len(WORDS),
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=16,
        )
    ).eval()


def test_states_are_the_encoders_own_and_zero_where_padded(tokenizer, tmp_path):
    """The encoder run on the caption alone, without any padding, is the oracle."""
    encoder, captions = bert(), ["red heart", "", "cat", "red heart"]
    states = caption_cache.encode_captions(captions, tokenizer, encoder, 6, tmp_path)
    assert (
        states.shape == (4, 6, 16)
        and states.dtype == torch.float32
        and torch.equal(states[0], states[3])
    )
    for row, tokens in zip(states, [4, 2, 3, 4], strict=True):
        assert (row[tokens:] == 0).all()
    for caption, row in zip(captions, states, strict=True):
        with torch.no_grad():
            alone = encoder(**tokenizer(caption, return_tensors="pt")).last_hidden_state[0]
        assert torch.allclose(row[: len(alone)], alone, atol=1e-6)


def test_states_are_what_the_pipeline_encodes(tokenizer, tmp_path):
    """Otherwise the network would see other captions in sampling than in training; the dropped one is the empty prompt."""
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(WORDS),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=8,
        )
    ).eval()
    captions = ["green cat", "", "red  heart", "face\u0301"]
    for encoder in (bert(), clip):
        pipe = text_to_image.TextToImagePipeline(
            unet=None, scheduler=None, text_encoder=encoder, tokenizer=tokenizer, caption_length=8
        )
        states = caption_cache.encode_captions(captions, tokenizer, encoder, 8, tmp_path)
        asked, empty = (
            pipe._caption_states(captions, torch.device("cpu")),
            pipe._caption_states([""], torch.device("cpu")),
        )
        assert torch.allclose(states, asked, atol=1e-6) and torch.allclose(
            states[1], empty[0], atol=1e-6
        )


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters()))
def test_any_text_is_a_caption_that_can_be_tokenized(tokenizer, text):
    """Lone surrogates, which Python's JSON lets through, would be a TypeError in the tokenizer."""
    row = as_row("a.png", {"path": "a.png", "bytes": None}, [text])
    assert row["problem"] == "" and row["captions"] == (
        [normalize(text)] if normalize(text) else []
    )
    tokenizer(row["captions"] or [""])


def test_states_are_cached_by_encoder_and_caption(tokenizer, tmp_path, monkeypatch):
    calls, encode = [], caption_cache.encode_batch
    monkeypatch.setattr(
        caption_cache,
        "encode_batch",
        lambda captions, *a: calls.append(captions) or encode(captions, *a),
    )
    monkeypatch.setattr(caption_cache, "COPY_BATCH", 2)  # of three captions
    first = caption_cache.encode_captions(["cat", "red"], tokenizer, bert(), 5, tmp_path)
    again = caption_cache.encode_captions(["red", "cat", "cat"], tokenizer, bert(), 5, tmp_path)
    assert (
        calls == [["cat", "red"]]
        and torch.equal(again[0], first[1])
        and torch.equal(again[2], first[0])
    )
    other = caption_cache.encode_captions(["cat", "red"], tokenizer, bert(seed=1), 5, tmp_path)
    assert len(calls) == 2 and not torch.allclose(other, first)
    assert (
        caption_cache.encode_captions(["cat", "red"], tokenizer, bert(), 6, tmp_path).shape
        == (2, 6, 16)
        and len(calls) == 3
    )


def test_states_asked_for_one_by_one_are_those_of_all_at_once(tokenizer, tmp_path, monkeypatch):
    """Bit for bit whatever is asked for beside them, so that a resumed stream repeats; and what is kept has a bound."""
    encoder, captions = (
        bert(),
        [" ".join(words) for words in itertools.permutations(WORDS[5:], 2)],
    )  # 20
    whole = caption_cache.encode_captions(captions, tokenizer, encoder, 6, tmp_path)
    states = caption_cache.CaptionCache(tokenizer, encoder, 6)
    assert torch.allclose(states(captions), whole, atol=1e-6)
    first = states(captions)
    for some in (captions[3:4], captions[9:2:-1], captions[5:6] * 3):
        fresh = caption_cache.CaptionCache(tokenizer, encoder, 6)(some)
        assert torch.equal(
            fresh, first[[captions.index(caption) for caption in some]]
        ) and torch.equal(states(some), fresh)
    calls, encode = [], caption_cache.encode_batch
    monkeypatch.setattr(
        caption_cache,
        "encode_batch",
        lambda captions, *a: calls.append(captions) or encode(captions, *a),
    )
    monkeypatch.setattr(caption_cache, "CACHED_BYTES", 3 * 6 * 16 * 4)
    few = caption_cache.CaptionCache(tokenizer, encoder, 6)
    for caption, misses in zip("abcbad", [1, 2, 3, 3, 3, 4], strict=True):
        few([caption])
        assert len(calls) == misses and len(few.kept) <= 3
    few(["c"])
    assert len(calls) == 5, "the one that was not asked for the longest is forgotten"
    caption_cache.CaptionCache(tokenizer, encoder, 6)(captions)
    assert {len(asked) for asked in calls} == {caption_cache.ENCODER_BATCH}, (
        "one shape, whose rounding is one"
    )


# ---- randomness


BATCHES = st.tuples(st.integers(0, 2**63 - 1), st.integers(0, 10**6), st.integers(1, 24))


@settings(max_examples=30, deadline=None)
@given(BATCHES, st.data())
def test_randomness_does_not_depend_on_how_a_batch_is_split(batch, draw):
    """Ranks, micro-steps and order do not matter: every slot gets its own."""
    seed, step, size = batch
    slots = torch.tensor(draw.draw(st.permutations(range(size))))
    cut = draw.draw(st.integers(0, size - 1))
    for f in (
        lambda s: randomness.noise(seed, step, s, (2, 3)),
        lambda s: randomness.timesteps(seed, step, s, size, 1000),
        lambda s: randomness.keep_caption(seed, step, s, 0.5),
        lambda s: randomness.caption_choice(seed, step, s, [5] * len(s)),
        lambda s: randomness.flips(seed, step, s),
        lambda s: sampler.batch_indices(seed, step, size, 7, slots=s),
    ):
        whole = f(torch.arange(size))
        torch.manual_seed(draw.draw(st.integers(0, 9)))
        parts = [f(part) for part in (slots[:cut], slots[cut:]) if len(part)]
        assert torch.equal(torch.cat(parts), whole[slots])


def test_the_global_generator_is_not_touched():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    randomness.noise(0, 0, range(4), (2,)), randomness.timesteps(0, 0, range(4), 4, 10)
    randomness.keep_caption(0, 0, range(4), 0.5), randomness.caption_choice(0, 0, range(4), [2] * 4)
    sampler.batch_indices(0, 0, 4, 9), randomness.flips(0, 0, range(4))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("other", [{"seed": 1}, {"step": 1}, {"slot": 1}, {"what": "t"}])
def test_seed_step_slot_and_purpose_each_give_another_stream(other):
    draw = lambda seed=0, step=0, slot=0, what="noise": torch.randn(
        8, generator=randomness.generator(seed, step, slot, what)
    )
    assert torch.equal(draw(), draw()) and not torch.equal(draw(), draw(**other))


def test_noise_is_standard_normal_and_uncorrelated_between_slots():
    eps = torch.cat(
        [randomness.noise(0, step, range(16), (64,)) for step in range(50)]
    ).double()  # (800, 64)
    n = eps.numel()
    assert abs(eps.mean()) < 4 / math.sqrt(n) and abs(eps.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs((eps[1:] * eps[:-1]).mean()) < 4 / math.sqrt(n)


@settings(max_examples=50, deadline=None)
@given(
    st.integers(0, 2**63 - 1),
    st.integers(0, 10**6),
    st.integers(1, 64),
    st.sampled_from([1, 7, 100, 1000]),
)
def test_timesteps_have_one_in_each_stratum(seed, step, batch, T):
    t = randomness.timesteps(seed, step, torch.arange(batch), batch, T)
    assert t.dtype == torch.long and t.min() >= 0 and t.max() <= T - 1
    low = torch.arange(batch).double() / batch * T
    assert (t.sort().values >= low.floor()).all() and (t.sort().values < low + T / batch).all()


def test_each_slots_timestep_is_uniform():
    """Chi-square over 10 cells of T = 10, for a slot alone: no slot is tied to a part of the range."""
    draws = torch.stack(
        [randomness.timesteps(5, step, torch.arange(4), 4, 10) for step in range(2000)]
    )
    for slot in range(4):
        counts = draws[:, slot].bincount(minlength=10).double()
        assert ((counts - 200) ** 2 / 200).sum() < 33.7  # 9 degrees of freedom, p = 1e-4


def test_dropout_is_exactly_p():
    slots = range(64)
    assert all(randomness.keep_caption(0, step, slots, 0.0).all() for step in range(20))
    assert not any(randomness.keep_caption(0, step, slots, 1.0).any() for step in range(20))
    dropped = sum(int((~randomness.keep_caption(0, step, slots, 0.1)).sum()) for step in range(150))
    n = 64 * 150
    assert abs(dropped - 0.1 * n) < 4 * math.sqrt(n * 0.1 * 0.9)
    assert not torch.equal(
        randomness.keep_caption(0, 0, slots, 0.5), randomness.keep_caption(0, 1, slots, 0.5)
    )


def test_each_of_a_rows_captions_is_drawn_as_often_as_the_others_and_anew_every_step():
    counts = torch.tensor([1, 2, 3, 3])
    drawn = torch.stack(
        [randomness.caption_choice(0, step, range(4), counts) for step in range(1200)]
    )  # (1200, 4)
    assert (drawn >= 0).all() and (drawn < counts).all() and (drawn[:, 0] == 0).all()
    for slot, n in ((1, 2), (2, 3), (3, 3)):
        expected = 1200 / n
        assert (drawn[:, slot].bincount(minlength=n) - expected).abs().max() < 4 * math.sqrt(
            expected * (1 - 1 / n)
        )
    assert not torch.equal(drawn[:, 2], drawn[:, 3]) and len(drawn[:9, 2].unique()) > 1


def test_the_caption_of_an_example_is_one_of_its_rows(load, tmp_path):
    several = {"a.png": ["one"], "b.png": ["two", "three"], "c.png": ["four", "five", "six"]}
    for name in several:
        save(tmp_path / "set" / name)
    listing(
        tmp_path / "set",
        *({"file_name": name, "caption": captions} for name, captions in several.items()),
    )
    images = load()
    rows, seen = torch.tensor([2, 0, 1, 2, 1]), [set() for _ in range(5)]
    for step in range(40):
        chosen = images.chosen(0, step, range(5), rows)
        for slot, caption in enumerate(chosen.tolist()):
            seen[slot].add(images.all_captions[caption])
    assert seen == [set(several["abc"[row] + ".png"]) for row in rows.tolist()]


def test_half_of_the_examples_are_mirrored():
    shown = torch.stack([randomness.flips(0, step, range(8)) for step in range(300)])
    assert abs(shown.double().mean() - 0.5) < 4 * math.sqrt(0.25 / 2400) and not torch.equal(
        shown[0], shown[1]
    )


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**63 - 1), st.integers(1, 40), st.integers(1, 40))
def test_every_epoch_has_every_row_once(seed, n, batch):
    """Also where the batch is larger than the data and epochs end inside batches."""
    steps = math.ceil(3 * n / batch)
    rows = torch.cat([sampler.batch_indices(seed, step, batch, n) for step in range(steps)])
    for epoch in range(3):
        assert sorted(rows[epoch * n : (epoch + 1) * n].tolist()) == list(range(n))


def test_epochs_and_seeds_differ_in_order():
    orders = [
        sampler.batch_indices(seed, epoch, 50, 50).tolist() for seed in (0, 1) for epoch in (0, 1)
    ]
    assert len({tuple(order) for order in orders}) == 4


def test_slots_start_where_asked():
    assert torch.equal(
        sampler.batch_indices(0, 3, 10, 17, slots=range(6, 10)),
        sampler.batch_indices(0, 3, 10, 17)[6:],
    )
    with pytest.raises(DataError, match="at least one image, got 0"):
        sampler.batch_indices(0, 0, 4, 0)
