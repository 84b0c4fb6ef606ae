"""Captions and images of a folder, and every kind of listing that is wrong."""

import pytest
from datasets_on_disk import reasons, save_image, write_listing
from PIL import Image

from pipeline.data.sources.rows import DataError


def test_open_image_folder_keeps_captions_with_their_images(load, tmp_path):
    folder = tmp_path / "set"
    save_image(folder / "a.png", "red")
    save_image(folder / "sub" / "b.png", "blue")
    write_listing(
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


def test_open_image_folder_reads_text_files_or_file_names(load, tmp_path):
    folder = tmp_path / "set"
    save_image(folder / "red_heart.png")
    save_image(folder / "b.jpg")
    assert load().captions == ["b", "red heart"]
    (folder / "b.txt").write_text("a blue\n  whale\n", encoding="utf-8")
    images = load()
    assert images.captions == ["a blue whale", ""]
    assert "1 images have no .txt or .caption beside them" in str(images.report)
    assert "1 images have an empty caption" in str(images.report)
    (folder / "red_heart.caption").write_bytes("\ufeffa heart".encode())
    assert load().captions == ["a blue whale", "a heart"]


def test_unlisted_rows_note_captions_from_file_names(load, tmp_path):
    save_image(tmp_path / "set" / "red_heart.png")
    assert "file names, e.g. 'red heart'" in str(load().report)
    (tmp_path / "set" / "red_heart.txt").write_text("a heart")
    images = load()
    assert images.captions == ["a heart"]
    assert "file names" not in str(images.report)


def test_split_folder_is_a_folder_of_that_name(load, tmp_path):
    save_image(tmp_path / "set" / "train" / "a.png")
    save_image(tmp_path / "set" / "test" / "b.png")
    assert load().captions == ["a"]
    assert load(split="test").captions == ["b"]
    with pytest.raises(DataError, match="'validation', only test, train"):
        load(split="validation")


def test_split_folder_does_not_train_beside_a_test_folder(load, tmp_path):
    """The images of the folder would include those of the test split."""
    save_image(tmp_path / "set" / "a.png")
    save_image(tmp_path / "set" / "test" / "b.png")
    with pytest.raises(DataError, match="'train', only test"):
        load()


def test_split_folder_does_not_train_on_a_held_out_folder(load, tmp_path):
    for name in ("a.png", "val/b.png"):
        save_image(tmp_path / "set" / name)
    with pytest.raises(DataError, match=r"'train', only val.*--data.held_out null"):
        load(held_out="val")
    assert load(held_out=None).captions == ["a", "b"]


def test_find_columns_reads_the_chosen_caption_column(load, tmp_path):
    save_image(tmp_path / "set" / "a.png")
    write_listing(tmp_path / "set", {"file_name": "a.png", "caption": "one", "title": "two"})
    assert load().captions == ["one"]
    assert load(caption_column="title").captions == ["two"]
    with pytest.raises(DataError, match=r"'name'.*: caption, file_name, title"):
        load(caption_column="name")


def test_listed_row_reports_missing_and_unlisted_files(load, tmp_path):
    folder = tmp_path / "set"
    for name in ("a.png", "unlisted.png", "../outside.png"):
        save_image(folder / name)
    write_listing(
        folder,
        {"file_name": "a.png", "caption": "a"},
        {"file_name": "gone.png", "caption": "b"},
        {"caption": "no file"},
        {"file_name": "../outside.png", "caption": "c"},
    )
    with (folder / "metadata.jsonl").open("a") as file:
        file.write('{"file_name": \n[1]\n')
    images = load()
    assert images.captions == ["a"]
    assert "1 images have no row" in str(images.report)
    assert "unlisted.png" in str(images.report)
    broken = reasons(images)
    assert broken["gone.png"] == "its file does not exist"
    assert broken["../outside.png"] == "its file is outside the folder"
    assert "got None" in broken["metadata.jsonl:3"]
    assert "Expecting value" in broken["metadata.jsonl:5"]
    assert "got [1]" in broken["metadata.jsonl:6"]


@pytest.mark.parametrize("listing", ["metadata.jsonl", "train/more/metadata.csv"])
def test_open_image_folder_refuses_a_misplaced_listing(load, tmp_path, listing):
    save_image(tmp_path / "set" / "train" / "more" / "a.png")
    (tmp_path / "set" / listing).write_text("file_name,caption\na.png,a\n")
    with pytest.raises(DataError, match=listing):
        load()


@pytest.mark.parametrize("suffix", [".avif", ".jfif", ".jpe"])
def test_image_files_include_unusual_suffixes(suffix, load, tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "set" / f"a{suffix}")
    assert load().captions == ["a"]


def test_read_csv_reads_a_listing_and_rejects_wide_rows(load, tmp_path):
    folder = tmp_path / "set"
    for name in ("a.png", "b.png", "c.png", "IMG_1.png"):
        save_image(folder / name)
    listing = (
        "\ufefffile_name,text,licence\n"
        'a.png,"a ""red"", round cat",CC0\n'
        "b.png,,\n"
        "c.png,a dog, a cat,CC0\n"
    )
    (folder / "metadata.csv").write_text(listing, encoding="utf-8")
    images = load()
    assert images.captions == ['a "red", round cat', ""]
    assert images.metadata[0] == {"file_name": "a.png", "licence": "CC0"}
    assert reasons(images).keys() == {"metadata.csv:3"}
    assert "more cells than the header" in reasons(images)["metadata.csv:3"]
    assert "2 images have no row" in str(images.report)
    (folder / "metadata.csv").write_bytes(b"file_name,text\na.png,\xff\n")
    with pytest.raises(DataError, match=r"metadata.csv.*0xff"):
        load()


def test_open_image_folder_refuses_a_folder_without_images(load, tmp_path):
    with pytest.raises(DataError, match="'train', only no folders"):
        load()
    (tmp_path / "set" / "train").mkdir()
    with pytest.raises(DataError, match=r"no images.*\.avif, \.bmp"):
        load()
    with pytest.raises(DataError, match="elsewhere"):
        load(tmp_path / "elsewhere")
    (tmp_path / "set" / "train" / "bad.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"skipped bad\.png"):
        load()


def test_as_row_reports_a_file_name_that_is_not_utf8(load, tmp_path):
    save_image(tmp_path / "set" / "a.png")
    (tmp_path / "set" / "a.png").rename(tmp_path / "set" / "bad\udcff.png")
    save_image(tmp_path / "set" / "b.png")
    images = load()
    assert images.captions == ["b"]
    assert reasons(images) == {r"bad\udcff.png": "its file name is not valid UTF-8"}
