"""Names of files and folders carry captions where they are words."""

import pytest
from datasets_on_disk import save_image

from pipeline.data.sources.names import class_captions, name_caption
from pipeline.data.sources.rows import DataError

NAMELESS = [
    *("IMG_0001", "DSC01234", "DSCN0042", "img_003", "image1", "00017", "P1010023", "photo (2)"),
    *("d41d8cd98f00b204e9800998ecf8427e", "f47ac10b-58cc-4372-a567-0abc02b2c3d4", "deadbeef01"),
    *("PXL_20230102_030405", "WhatsApp Image 2023-01-02 at 12.00.00", "Screenshot 2023-01-02", "_"),
]
CAPTIONS = {
    "red_heart": "red heart",
    "a": "a",
    "a photo of two cats": "a photo of two cats",
    "heart2": "heart2",
    "red_heart_2": "red heart 2",
    "café au lait": "café au lait",
    "猫": "猫",
    "IMG_0001 our dog": "IMG 0001 our dog",
}


def write(folder, *names):
    """Write an image under each name, all different."""
    for i, name in enumerate(names):
        save_image(folder / name, (i, 0, 0))


@pytest.mark.parametrize("name", NAMELESS)
def test_name_caption_is_empty_for_what_no_person_wrote(name):
    assert name_caption(name) == ""


@pytest.mark.parametrize("name", CAPTIONS)
def test_name_caption_is_a_name_in_words(name):
    assert name_caption(name) == CAPTIONS[name]


@pytest.mark.parametrize("name", ["IMG_0001.jpg", "photos/IMG_0001.jpg", "0001/2.jpg"])
def test_named_rows_refuses_names_that_carry_no_caption(name, load, tmp_path):
    write(tmp_path / "set" / "train", name, "red heart.png")
    with pytest.raises(DataError, match=r"1 of 2 .*captions\.json.*\.txt.*folders") as error:
        load()
    assert name.rpartition("/")[2] in str(error.value)


@pytest.mark.parametrize("place", ["set", "set/train"])
def test_class_folders_give_the_captions(place, load, tmp_path):
    write(tmp_path / place, "red_circle/img_003.jpg", "square/deep/a/4.jpg", "square/fine.png")
    with pytest.raises(DataError, match="'test', only"):
        load(split="test")
    images = load()
    assert images.captions == ["red circle", "a", "square"]
    assert "folder names, e.g. 'red circle'" in str(images.report)


def test_class_captions_of_one_folder_need_nameless_files():
    assert class_captions(["cat/IMG_1.jpg", "cat/fluffy.jpg"])["cat/fluffy.jpg"] == "cat"
    assert class_captions(["pets/a cat.jpg", "pets/a dog.jpg"]) == {}
    assert class_captions(["cat/1.jpg", "2.jpg"]) == {}
    assert class_captions(["images/1.jpg", "cat/2.jpg"]) == {}


def test_class_folders_of_kohya_are_used_without_repeats(load, tmp_path):
    write(tmp_path / "set", "10_my_cat/fluffy.png", "10_my_cat/2.png", "3_dog/3.png")
    images = load()
    assert images.captions == ["my cat", "my cat", "dog"]
    assert "such as 10_my_cat ask for repeats" in str(images.report)
    (tmp_path / "set" / "3_dog" / "3.txt").write_text("a sleeping dog")
    images = load()
    assert images.captions == ["", "", "a sleeping dog"]
    assert "repeats" not in str(images.report)
