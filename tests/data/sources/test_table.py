"""Tables on disk hold what a folder of the same images holds."""

import io
import tarfile
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
from datasets_on_disk import png, reasons, reds, save_image, squares, write_parquet
from huggingface_hub import constants
from PIL import Image

from pipeline.data import sources
from pipeline.data.sources.rows import DataError
from pipeline.data.sources.table import table_row


def test_open_table_reads_what_a_folder_of_images_holds(load, tmp_path):
    path = write_parquet(tmp_path / "squares.parquet", squares(0, 5))
    for i in range(5):
        (tmp_path / "set" / f"{i}.png").write_bytes(png(i))
        (tmp_path / "set" / f"{i}.txt").write_text(f"square {i}")
    table = load(path)
    folder = load()
    assert table.captions == folder.captions == [f"square {i}" for i in range(5)]
    assert reds(table) == reds(folder) == [*range(5)]
    assert table.fingerprint == folder.fingerprint
    assert "5 of 5 images usable" in str(table.report)
    assert table.metadata[3] == {"file_name": "row 3"}


def test_open_table_reads_splits_and_slices_of_shards(load, tmp_path):
    for i in range(2):
        shard = tmp_path / "set" / f"train-0000{i}-of-00002.parquet"
        write_parquet(shard, squares(3 * i, 3 * i + 3))
    write_parquet(tmp_path / "set" / "test-00000-of-00001.parquet", squares(6, 8))
    assert reds(load()) == [*range(6)]
    assert reds(load(split="test")) == [6, 7]
    assert reds(load(split="train[:50%]")) == [0, 1, 2]
    assert reds(load(split="train[4:]+test")) == [4, 5, 6, 7]
    with pytest.raises(DataError, match=r"train\[5:3\].* no rows"):
        load(split="train[5:3]")
    with pytest.raises(DataError, match=r"'validation', only t\w+, t\w+"):
        load(split="validation[:3]")


def test_open_table_reads_a_webdataset(load, tmp_path):
    with tarfile.open(tmp_path / "shard.tar", "w") as archive:
        for i in range(4):
            for name, content in ((f"{i}.png", png(i)), (f"{i}.txt", f"square {i}".encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    images = load(tmp_path / "shard.tar")
    assert images.captions == [f"square {i}" for i in range(4)]
    assert reds(images) == [*range(4)]


def labelled(first, last):
    """Return a dataset of squares with a column of labels; the first has none."""
    names = datasets.ClassLabel(names=["red_square", "dark"])
    features = datasets.Features({"image": datasets.Image(), "label": names})
    rows = [
        {"image": {"bytes": png(i), "path": None}, "label": i % 2 if i else -1}
        for i in range(first, last)
    ]
    return datasets.Dataset.from_list(rows, features=features)


def test_open_table_reads_class_names_as_captions(load, tmp_path):
    path = tmp_path / "set" / "train.parquet"
    labelled(0, 4).to_parquet(path)
    images = load()
    assert images.captions == ["", "dark", "red square", "dark"]
    assert "class names of the column 'label'" in str(images.report)
    assert load(caption_column="label").captions == images.captions


def test_load_saved_reads_what_save_to_disk_wrote(load, tmp_path):
    labelled(1, 9).save_to_disk(tmp_path / "one", num_shards=2)
    assert reds(load(tmp_path / "one")) == [*range(1, 9)]
    assert load(tmp_path / "one").captions[:2] == ["dark", "red square"]
    with pytest.raises(DataError, match="'test', only train"):
        load(tmp_path / "one", split="test")
    both = datasets.DatasetDict(train=labelled(1, 9), test=labelled(9, 11))
    both.save_to_disk(tmp_path / "two")
    assert reds(load(tmp_path / "two", split="test")) == [9, 10]
    assert reds(load(tmp_path / "two", split="train[6:]+test[:1]")) == [7, 8, 9]
    labelled(3, 6).save_to_disk(tmp_path / "one")
    assert reds(load(tmp_path / "one")) == [3, 4, 5]


def test_load_saved_can_be_streamed(stream, tmp_path):
    labelled(1, 9).save_to_disk(tmp_path / "one")
    batch = stream(tmp_path / "one").take(8)
    assert sorted(batch.images[:, 0, 0, 0].tolist()) == [*range(1, 9)]
    assert set(map(tuple, batch.alternatives)) == {("dark",), ("red square",)}


def test_open_table_reads_a_changed_file_again(load, tmp_path):
    path = tmp_path / "a.parquet"
    assert reds(load(write_parquet(path, squares(0, 3)))) == [0, 1, 2]
    assert reds(load(write_parquet(path, squares(5, 9)))) == [5, 6, 7, 8]


def test_find_image_column_accepts_columns_of_other_tools(load, tmp_path):
    """Bytes and path without the metadata of `datasets`."""

    def table(name, **columns):
        pa.parquet.write_table(pa.table(columns), tmp_path / name)
        return tmp_path / name

    image = pa.array([{"bytes": png(7), "path": "seven.png"}])
    images = load(table("plain.parquet", picture=image, caption=["seven"]))
    assert images.captions == ["seven"]
    assert reds(images) == [7]
    assert images.metadata == [{"file_name": "seven.png"}]
    raw = table("raw.parquet", raw=[png(9)], caption=["nine"])
    assert reds(load(raw, image_column="raw")) == [9]
    large = table(
        "large.parquet",
        raw=pa.array([png(3)], pa.large_binary()),
        caption=pa.array(["three"], pa.large_string()),
    )
    assert reds(load(large, image_column="raw")) == [3]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_open_table_reads_images_by_path(kind, load, tmp_path):
    (tmp_path / "four.png").write_bytes(png(4))
    named = pa.table({"file": pa.array([str(tmp_path / "four.png")], kind), "caption": ["four"]})
    pa.parquet.write_table(named, tmp_path / "named.parquet")
    assert reds(load(tmp_path / "named.parquet", image_column="file")) == [4]


@pytest.mark.parametrize("struct", [False, True])
def test_open_table_reads_the_current_file_of_a_path(load, tmp_path, struct):
    paths = [tmp_path / "images" / name for name in ("a.png", "b.png")]
    for path in paths:
        save_image(path)
    column = [{"bytes": None, "path": str(path)} if struct else str(path) for path in paths]
    table = tmp_path / "some.parquet"
    datasets.Dataset.from_dict({"image": column, "text": ["a", "b"]}).to_parquet(table)
    gone = paths[1].rename(tmp_path / "gone.png")
    options = {"image_column": "image", "max_broken": 0.5}
    assert load(table, **options).captions == ["a"]
    gone.rename(paths[1])
    complete = load(table, **options)
    assert complete.captions == ["a", "b"]
    if not struct:
        Image.new("RGB", (8, 8), "blue").save(paths[1])
        assert load(table, **options).fingerprint != complete.fingerprint


def test_is_table_is_false_for_a_folder_of_images(load, tmp_path):
    for i in range(3):
        save_image(tmp_path / "set" / "train" / f"square {i}.png", (i, 0, 0))
    write_parquet(tmp_path / "set" / "all.parquet", squares(5, 9))
    assert reds(load()) == [0, 1, 2]
    (tmp_path / "set" / "train" / "metadata.jsonl").write_text(
        '{"file_name": "square 1.png", "text": "one"}'
    )
    write_parquet(tmp_path / "set" / "train" / "train.parquet", squares(5, 9))
    assert reds(load()) == [1]


def test_is_table_is_true_for_a_table_beside_images(load, tmp_path):
    write_parquet(tmp_path / "set" / "data" / "train.parquet", squares(5, 9))
    for name in ("a.png", "assets/b.png", "assets/c.png"):
        save_image(tmp_path / "set" / name)
    assert reds(load()) == [5, 6, 7, 8]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"image_column": "mask", "caption_column": "title"},
            r"'title'.*: caption, height, image, mask",
        ),
        ({"image_column": "mask", "caption_column": ("caption", "title", "x")}, "'title' or 'x'"),
        ({}, r"2 image columns.*: image \(images\), mask \(images\), caption, height"),
        ({"image_column": "photo"}, r"'photo'.*: image \(images\), mask \(images\)"),
        ({"image_column": "height"}, "'height'"),
        ({"revision": "main"}, r"data\.revision"),
        ({"image_column": "image", "split": "test"}, "'test', only train"),
        ({"image_column": "image", "subset": "large"}, r"data\.subset"),
    ],
)
def test_open_table_lists_what_there_is_for_what_is_missing(settings, message, load, tmp_path):
    row = {"image": png(), "mask": None, "caption": "a", "height": 8}
    columns = {"mask": datasets.Image(), "height": datasets.Value("int64")}
    path = write_parquet(tmp_path / "two.parquet", [row], **columns)
    with pytest.raises(DataError, match=message) as error:
        load(path, **settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("path", "good"),
    [
        ("/etc/passwd", False),
        ("mine.png", False),
        ("http://10.0.0.1/x.png", False),
        ("hf://datasets/other/set@a1/x.png", False),
        ("hf://datasets/tester/set-of-mine/x.png", False),
        ("file:///etc/x.png::hf://datasets/other/x/a.zip", False),
        ("hf://datasets/tester/set@a1/x.png", True),
        ("zip://x.png::hf://datasets/tester/set@a1/a.zip", True),
        (f"{constants.HF_HUB_CACHE}/datasets--tester--set/snapshots/a1/x.png", True),
        (f"{constants.HF_HUB_CACHE}/../../../../../../../../etc/passwd", False),
    ],
)
def test_table_row_refuses_files_outside_a_hub_dataset(path, good):
    """Otherwise a foreign table could have private images trained on and pushed with the model."""
    example = {"image": {"bytes": None, "path": path}, "text": "a"}
    row = table_row(example, 0, "image", ("text",), hub_id="tester/set")
    assert row["problem"] == ("" if good else "its file is outside the dataset")
    assert (row["image"] is not None) == good
    assert table_row(example, 0, "image", ("text",))["problem"] == "", "its owner's own table"
    embedded = {"image": {"bytes": b"x", "path": path}, "text": "a"}
    assert table_row(embedded, 0, "image", ("text",), hub_id="tester/set")["problem"] == ""


def test_open_table_refuses_a_corrupt_file(load, tmp_path):
    path = write_parquet(tmp_path / "cut.parquet", squares(0, 9))
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(DataError, match=r"cut\.parquet") as error:
        load(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("place", "kind"), [("set", DataError), ("elsewhere", PermissionError)])
def test_open_rows_explains_missing_permissions(load, tmp_path, monkeypatch, place, kind):
    """Files elsewhere, such as the Hub's cache, have errors of their own."""

    def refuse(source, split):
        raise PermissionError(13, "Permission denied", str(tmp_path / place / "metadata.jsonl"))

    monkeypatch.setattr(sources, "is_table", refuse)
    with pytest.raises(kind, match=str(Path(place, r"metadata\.jsonl"))):
        load()


@pytest.mark.parametrize(
    "settings",
    [{"subset": "x"}, {"revision": "v1"}, {"image_column": "image"}, {"streaming": True}],
)
def test_open_rows_refuses_table_settings_for_a_folder(settings, load, tmp_path):
    save_image(tmp_path / "set" / "a.png")
    with pytest.raises(DataError, match=rf"data\.{next(iter(settings))}"):
        load(**settings)


def test_table_row_reports_broken_rows_and_keeps_others(load, tmp_path):
    rows = [
        *squares(0, 2),
        {"image": None, "text": "nothing"},
        {"image": b"not an image", "text": "text"},
        *squares(2, 3),
    ]
    images = load(write_parquet(tmp_path / "some.parquet", rows))
    assert reds(images) == [0, 1, 2]
    assert reasons(images)["row 2"] == "it has no image"
    assert "cannot identify" in reasons(images)["row 3"]
