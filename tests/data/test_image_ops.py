"""Image files of every mode, size and orientation as pixels."""

import contextlib
import dataclasses

import numpy as np
import pytest
from datasets_on_disk import encode_image, reasons, reds, save_image, wide_png, write_parquet
from PIL import Image

from pipeline.config import DataConfig
from pipeline.data import dataset, image_ops
from pipeline.data.sources.rows import BrokenRow
from pipeline.data.streaming import Stream


def pixel(image, kind="PNG", **options):
    """Return the colour inside an image after a round trip through a file."""
    return image_ops.decode(encode_image(image, kind, **options), 4)[:, 1, 1].tolist()


def test_load_rgb_skips_a_decompression_bomb(load, tmp_path):
    """A file of some kilobytes that claims 65 megapixels."""
    bomb = encode_image(Image.new("1", (8125, 8000)))
    assert len(bomb) < 20_000
    (tmp_path / "set" / "bomb.png").write_bytes(bomb)
    save_image(tmp_path / "set" / "fine.png")
    images = load()
    assert images.captions == ["fine"]
    assert "8125 x 8000" in reasons(images)["bomb.png"]


def test_flatten_on_white_shows_white_behind_transparency():
    """Hidden pixels keep a colour that convert("RGB") would reveal."""
    assert pixel(Image.new("RGBA", (4, 4), (255, 0, 0, 0))) == [255, 255, 255]
    half = pixel(Image.new("RGBA", (4, 4), (255, 0, 0, 128)))
    assert half == pytest.approx([255, 127, 127], abs=1)
    assert pixel(Image.new("LA", (4, 4), (0, 0))) == [255, 255, 255]
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 9, 99, 199])
    assert pixel(palette) == [9, 99, 199]
    assert pixel(palette, transparency=1) == [255, 255, 255]


def test_flatten_on_white_converts_grey_cmyk_and_16_bits():
    assert pixel(Image.new("L", (4, 4), 77)) == [77, 77, 77]
    assert pixel(Image.new("1", (4, 4), 1)) == [255, 255, 255]
    deep = Image.fromarray(np.full((4, 4), 40000, np.uint16))
    assert pixel(deep) == [round(40000 / 257)] * 3
    assert pixel(deep, "TIFF") == [round(40000 / 257)] * 3
    assert pixel(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "TIFF") == [255, 0, 0]
    with pytest.raises(BrokenRow, match="floating-point"):
        pixel(Image.new("F", (4, 4), 0.5), "TIFF")


def test_load_rgb_rotates_by_exif_orientation():
    """Orientation 6: the stored left column is shown on top."""
    stored = Image.new("RGB", (8, 8), "white")
    stored.paste("black", (0, 0, 4, 8))
    exif = Image.Exif()
    exif[0x0112] = 6
    shown = image_ops.decode(encode_image(stored, exif=exif), 8)
    assert (shown[:, :4] == 0).all()
    assert (shown[:, 4:] == 255).all()


def test_load_rgb_reads_the_first_frame_of_an_animation():
    first, second = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    assert pixel(first, "GIF", save_all=True, append_images=[second]) == [255, 0, 0]


@pytest.mark.parametrize("size", [(1, 1), (4000, 1), (1, 4000), (3, 5), (8, 8), (9, 8)])
def test_crop_square_takes_the_centre_of_any_shape(size):
    image = Image.new("RGB", size, "blue")
    side = min(size)
    left = (size[0] - side) // 2
    top = (size[1] - side) // 2
    image.paste("red", (left, top, left + side, top + side))
    shown = image_ops.decode(encode_image(image), 8)
    assert shown.shape == (3, 8, 8)
    assert (shown == np.array([255, 0, 0])[:, None, None]).all()


def test_crop_offset_is_random_but_fixed_per_image(tmp_path):
    """Red is the column of a wide image; the held-out split shows the centre."""
    for split, count in [("train", 40), ("test", 2)]:
        rows = [{"image": wide_png(i), "text": str(i)} for i in range(count)]
        write_parquet(tmp_path / "set" / f"{split}.parquet", rows)
    cache = str(tmp_path / "cache")
    config = DataConfig(str(tmp_path / "set"), resolution=8, crop="random", cache=cache)
    train, held_out = dataset.load_splits(config)
    left = reds(train)
    assert min(left) < 40
    assert max(left) > 150
    assert len(set(left)) > 20
    assert reds(held_out) == [96, 96]
    again, _ = dataset.load_splits(dataclasses.replace(config, cache=str(tmp_path / "other")))
    assert again.images[:].equal(train.images[:])
    streaming = dataclasses.replace(config, streaming=True)
    with contextlib.closing(Stream(streaming, seed=0)) as stream:
        streamed = stream.take(40).images
    assert sorted(streamed[:, 0, 0, 0].tolist()) == sorted(left)
    centred, _ = dataset.load_splits(dataclasses.replace(config, crop="center"))
    assert reds(centred) == [96] * 40, "another crop has its own cache"
