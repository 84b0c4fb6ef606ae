"""Settings in PNG files, and uploads that are no images."""

import json
import math
import struct
import zlib

import numpy as np
import pytest
import torch
from serving_data import SEARCH, last, pixels, png_bytes, png_text

from pipeline.diffusion.guidance import InputError
from pipeline.serving.png_metadata import read_png, same_model
from pipeline.serving.requests import Request
from pipeline.serving.session import load_uploaded_image

MODEL = {"denoiser": "network", "model": "emoji"}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "upload.png"


def test_read_png_returns_what_reproduces_an_image(session, path):
    options = {"w": 1.5, "steps": 4, "eta": 0.0, "images": 2, "seed": 2**40}
    request = Request('a "red" heart ❤', "cat", low=0.2, high=0.7, **options)
    images = last(session.create(request)).images
    for i, image in enumerate(images):
        image.save(path, pnginfo=png_text(image.info))
        assert read_png(path, T=1000) == (request, "network", session.identity)
        assert json.loads(image.info["parameters"])["image"] == i
    again = last(session.create(read_png(path, T=1000)[0])).images
    assert np.array_equal(pixels(images), pixels(again))


def test_read_png_reproduces_searched_and_discarded_images(session, path):
    frame = last(session.create(SEARCH))
    for i, image in enumerate([*frame.images, *frame.discarded]):
        is_best = i == 0
        image.save(path, pnginfo=png_text(image.info))
        request, *_ = read_png(path, T=1000)
        assert (request == SEARCH) == is_best
        assert request.think == (6 if is_best else 1)
        again = last(session.create(request)).images
        # A discarded image was rounded in a batch of four.
        assert np.abs(pixels(again) - pixels([image])).max() <= (0 if is_best else 1)


def test_read_png_accepts_images_from_before_search(path):
    old = {name: value for name, value in vars(Request("cat", steps=9)).items() if name != "think"}
    parameters = json.dumps(old | {"denoiser": "exact", "model": "emoji"})
    path.write_bytes(png_bytes(pnginfo=png_text({"parameters": parameters})))
    assert read_png(path, T=1000) == (Request("cat", steps=9), "exact", "emoji")


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        (None, "no settings"),
        ("a cat, steps: 5", "no settings"),
        ("[1, 2]", "no settings"),
        ("10", "no settings"),
        (json.dumps({"prompt": "cat"}), "no settings"),
        (json.dumps(vars(Request("cat"))), "no settings"),
        (json.dumps({**vars(Request("cat")), **MODEL, "denoiser": "cat"}), "no settings"),
        (json.dumps({**vars(Request("cat")), **MODEL, "model": ["cat"]}), "no settings"),
        (json.dumps({**vars(Request("cat")), **MODEL, "steps": 10**9}), "1000000000"),
        (json.dumps({**vars(Request("cat")), **MODEL, "w": math.nan}), "nan"),
    ],
)
def test_read_png_checks_settings_from_other_programs(path, parameters, words):
    info = {} if parameters is None else {"parameters": parameters}
    path.write_bytes(png_bytes(pnginfo=png_text(info)))
    with pytest.raises(InputError, match=words):
        read_png(path, T=1000)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("x (abcdef12)", "x (abcdef12)", True),
        ("x at step 560 (abcdef12)", "y (1) (abcdef12)", True),
        ("x (abcdef12)", "x (abcdef13)", False),
        ("x", "x", True),
        ("x", "y", False),
    ],
)
def test_same_model_compares_digits_or_else_names(one, other, same):
    assert same_model(one, other) == same_model(other, one) == same


# ---- uploads


def bomb(width, height):
    """Return a PNG that claims a size, with next to nothing behind it."""

    def chunk(body):
        checksum = struct.pack(">I", zlib.crc32(body))
        return struct.pack(">I", len(body) - 4) + body + checksum

    header = chunk(b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT" + zlib.compress(b"\0" * 1000))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "PNG or JPEG"),
        (b"<svg/>", "PNG or JPEG"),
        (png_bytes(kind="GIF"), "PNG or JPEG"),
        (bomb(2001, 2000), "2001 x 2000"),
        (bomb(60000, 60000), "PNG or JPEG"),  # Pillow refuses to open it
        (png_bytes((300, 300))[:-40], "damaged"),
        (b"\0" * 2_000_001, "2.0 MB"),
    ],
    ids=["empty", "svg", "gif", "large", "bomb", "truncated", "heavy"],
)
def test_load_uploaded_image_refuses_what_is_no_image(path, content, words):
    path.write_bytes(content)
    with pytest.raises(InputError, match=words):
        load_uploaded_image(path, 8)


@pytest.mark.parametrize("read", [load_uploaded_image, read_png])
def test_read_upload_reports_an_expired_file(path, read):
    with pytest.raises(InputError, match="expired"):
        read(path, 8)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_load_uploaded_image_has_the_datasets_size(path, kind):
    path.write_bytes(png_bytes((40, 20), kind))
    x_0 = load_uploaded_image(path, 8)
    assert x_0.shape == (1, 3, 8, 8)
    colour = (x_0[0].mean((1, 2)) + 1) * 127.5
    assert torch.allclose(colour, torch.tensor([10.0, 200.0, 30.0]), atol=3)
