"""What the tests of the demo share: images and PNG files, and the last frame of a request."""

import io
import json

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from pipeline.serving.requests import Request

COLOURS = {
    "red heart": (250, 20, 20),
    "green heart": (20, 250, 20),
    "blue circle": (20, 20, 250),
    "yellow square": (250, 250, 20),
}
# 240 calls: four candidates of 40, each scored by 18.
SEARCH = Request("red heart", w=1.0, steps=20, seed=7, think=6)


def last(frames):
    """Return the last of a request's frames, which has its images."""
    *_, frame = frames
    assert frame.last
    return frame


def pixels(images):
    """Return the pixels of images as (N, H, W, 3) integers."""
    return np.stack([np.asarray(image).astype(int) for image in images])


def png_text(info):
    """Return text chunks for a PNG."""
    chunks = PngInfo()
    for key, value in info.items():
        chunks.add_text(key, value)
    return chunks


def png_bytes(size=(8, 8), kind="PNG", **options):
    """Return the bytes of a plain image file."""
    content = io.BytesIO()
    Image.new("RGB", size, (10, 200, 30)).save(content, kind, **options)
    return content.getvalue()


def png_with(parameters):
    """Return the bytes of a PNG with generation parameters."""
    return png_bytes(pnginfo=png_text({"parameters": json.dumps(parameters)}))
