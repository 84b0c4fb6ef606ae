"""Captions and images of a folder, and every kind of listing that is wrong."""

import json
import zipfile

import pytest
from datasets_on_disk import png, reasons, save_image, write_listing
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


@pytest.mark.parametrize(
    ("listing", "captions"),
    [
        ({"b.png": "blue", "a.png": ["red", "rosy"]}, [["blue"], ["red", "rosy"]]),
        ([{"file": "b.png", "text": "blue"}, {"image": "a.png", "text": ""}], [["blue"], [""]]),
    ],
)
def test_open_image_folder_reads_captions_json(listing, captions, load, tmp_path):
    for name in ("a.png", "b.png", "IMG_1.png"):
        save_image(tmp_path / "set" / name)
    (tmp_path / "set" / "captions.json").write_text(json.dumps(listing))
    images = load()
    assert images.alternatives == captions
    assert "1 images have no row" in str(images.report)


@pytest.mark.parametrize("content", ["{", '"a.png"', "[[1]]"])
def test_read_captions_json_refuses_other_json(content, load, tmp_path):
    save_image(tmp_path / "set" / "a.png")
    (tmp_path / "set" / "captions.json").write_text(content)
    with pytest.raises(DataError, match=r"captions\.json"):
        load()


def test_open_image_folder_counts_images_it_cannot_read(load, tmp_path):
    (tmp_path / "set" / "IMG_1.HEIC").write_bytes(b"x")
    with pytest.raises(DataError, match=r"no images.*1 images are.*JPEG.*IMG_1\.HEIC"):
        load()
    save_image(tmp_path / "set" / "a cat.png")
    images = load()
    assert images.captions == ["a cat"]
    assert "1 images are of kinds that cannot be read" in str(images.report)


@pytest.mark.parametrize("wrapper", ["", "pets/"])
def test_unzip_reads_what_the_folder_would_give(wrapper, load, tmp_path):
    archive = tmp_path / "pets.zip"
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr(f"{wrapper}train/cat/1.png", png(1))
        opened.writestr(f"{wrapper}train/dog/2.png", png(2))
        opened.writestr(f"{wrapper}test/metadata.csv", "file_name,text\n3.png,a bird\n")
        opened.writestr(f"{wrapper}test/3.png", png(3))
        opened.writestr("__MACOSX/._pets", b"x")
    assert load(archive).captions == ["cat", "dog"]
    assert load(archive, split="test").captions == ["a bird"]
    archive.write_bytes(b"PK")
    with pytest.raises(DataError, match=r"pets\.zip"):
        load(archive)


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
