"""Image files as pixels: decode, rotate, flatten on white, crop, resize."""

import concurrent.futures
import functools
import hashlib
import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from torch import Tensor

from pipeline.data.sources.rows import BrokenRow, printable, read_image_bytes

# Part of the key of prepared pixels: raise it when `decode` changes.
DECODE_VERSION = 2
# A file of 48 KB can claim 400 megapixels.
MAX_PIXELS = 64_000_000
DECODER_THREADS = 8


def decoder_pool(threads: int) -> concurrent.futures.ThreadPoolExecutor:
    """Return threads that decode images."""
    # Pillow fills its list of formats on first use; threads that do so together may miss one.
    PIL.Image.init()
    return concurrent.futures.ThreadPoolExecutor(threads, "decode")


def prepare_rows(
    examples: dict[str, list], numbers: list[int], pool: concurrent.futures.Executor, **options: Any
) -> dict[str, list]:
    """Apply `prepare_row` to a batch of `Dataset.map`, in threads: Pillow releases the GIL."""
    columns = zip(*examples.values(), strict=True)
    singles = [dict(zip(examples, values, strict=True)) for values in columns]
    rows = list(pool.map(functools.partial(prepare_row, **options), singles, numbers))
    return {name: [row[name] for row in rows] for name in rows[0]}


def prepare_row(
    example: dict,
    number: int,
    read: Callable[[dict, int], dict],
    resolution: int,
    crop: str = "center",
) -> dict:
    """Return one row with its RGB bytes (3, resolution, resolution), or with its problem.

    `side` is the shorter side of the original. A random crop is a function of the file's content,
    so it is the same at every start, in every order and in a stream.
    """
    row = read(example, number)
    image = row.pop("image")
    problem = row.pop("problem")
    pixels = b""
    side = 0
    if not problem:
        try:
            content = read_image_bytes(image)
            rgb = load_rgb(content)
            offset = 0.5 if crop == "center" else crop_offset(content)
            pixels = as_array(crop_square(rgb, resolution, offset)).tobytes()
            side = min(rgb.size)
        except BrokenRow as error:
            problem = str(error)
        # Pillow's decoders raise errors of every kind for broken files; all are reported.
        except Exception as error:
            problem = f"{type(error).__name__}: {error}".replace("\n", " ")
    content_hash = hashlib.blake2b(pixels, digest_size=8).hexdigest()
    return row | {
        "pixels": pixels,
        "problem": printable(problem),
        "side": side,
        "hash": content_hash,
    }


def crop_offset(content: bytes) -> float:
    """Return a number in [0, 1) that is uniform over file contents."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=4).digest()) / 2**32


def decode(content: bytes, resolution: int) -> np.ndarray:
    """Return the central square of an image file as uint8 (3, resolution, resolution)."""
    return as_array(crop_square(load_rgb(content), resolution))


def load_rgb(content: bytes) -> PIL.Image.Image:
    """Return an image file as RGB on white, rotated as its EXIF data says."""
    try:
        opened = PIL.Image.open(io.BytesIO(content))
    except PIL.UnidentifiedImageError as error:
        # Pillow's own message contains an address in memory.
        raise BrokenRow(
            f"cannot identify it as an image: {len(content)} bytes in no format that Pillow reads"
        ) from error
    with opened as image:
        if math.prod(image.size) > MAX_PIXELS:
            size = f"{image.width} x {image.height}"
            raise BrokenRow(f"too large: {size} pixels exceed the limit of {MAX_PIXELS:,}")
        image.load()
        return flatten_on_white(PIL.ImageOps.exif_transpose(image))


def flatten_on_white(image: PIL.Image.Image) -> PIL.Image.Image:
    """Return any image as 8-bit RGB: transparency becomes white, 16-bit greys are scaled."""
    if image.mode.startswith("I"):
        # convert() would clip at 255.
        grey = np.asarray(image).astype(np.float64).clip(0, 65535) / 257
        return PIL.Image.fromarray(np.rint(grey).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise BrokenRow("floating-point pixels have no agreed range: save it with 8 or 16 bits")
    if image.has_transparency_data:
        white = PIL.Image.new("RGBA", image.size, "white")
        image = PIL.Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def crop_square(image: PIL.Image.Image, size: int, offset: float = 0.5) -> PIL.Image.Image:
    """Return a square of an image, resized to size x size; offset 0 is its left or upper end."""
    side = min(image.size)
    left = int((image.width - side) * offset)
    top = int((image.height - side) * offset)
    # resize(box=...) would read beyond the box.
    square = image.crop((left, top, left + side, top + side))
    return square.resize((size, size), PIL.Image.Resampling.LANCZOS)


def as_array(image: PIL.Image.Image) -> np.ndarray:
    """Return an RGB image as uint8 (3, H, W)."""
    return np.asarray(image).transpose(2, 0, 1)


def as_float(images: Tensor) -> Tensor:
    """Return images as floats in [-1, 1]: uint8 are scaled, floats are clipped."""
    if images.dtype == torch.uint8:
        return images.float() / 127.5 - 1
    return images.float().clamp(-1, 1)


def as_uint8(images: Tensor) -> Tensor:
    """Return images in [0, 1] as uint8, rounded."""
    return (images * 255).round().to(torch.uint8)
