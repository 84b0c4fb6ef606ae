"""Image files as pixels: decode, rotate, crop, flatten on white, scale."""

import concurrent.futures
import functools
import hashlib
import io
import math

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from torch import Tensor

from pipeline.data.sources.rows import BrokenRow, printable, read_image_bytes

DECODE_VERSION = (
    2  # of the prepared pixels: raise it when `decode` changes, so that caches are not reused
)
MAX_PIXELS = 64_000_000  # a 48 KB file can claim 400 megapixels
DECODER_THREADS = 8  # that prepare pictures, at most


def decoder_pool(threads: int) -> concurrent.futures.ThreadPoolExecutor:
    """Threads that decode pictures. Pillow's list of formats is filled before: threads that fill it together may miss one."""
    PIL.Image.init()
    return concurrent.futures.ThreadPoolExecutor(threads, "decode")


def prepare_rows(
    examples: dict[str, list], numbers: list[int], pool: concurrent.futures.Executor, **how
) -> dict[str, list]:
    """`prepare_row` of some rows, several at a time: Pillow decodes and resizes beside Python's lock."""
    singles = [
        dict(zip(examples, values, strict=True)) for values in zip(*examples.values(), strict=True)
    ]
    rows = list(pool.map(functools.partial(prepare_row, **how), singles, numbers))
    return {name: [row[name] for row in rows] for name in rows[0]}


def prepare_row(example: dict, number: int, read, resolution: int, crop: str = "center") -> dict:
    """One row with its image as raw RGB bytes, (3, resolution, resolution), or with the problem that keeps it out.

    `side` is the shorter side of the picture as it was. Where a random crop lies is a function of the file's content, the same
    at every start, in every order and in a stream.
    """
    row, pixels, side = read(example, number), b"", 0
    image, problem = row.pop("image"), row.pop("problem")
    if not problem:
        try:
            content = read_image_bytes(image)
            picture, place = load_rgb(content), 0.5 if crop == "center" else crop_offset(content)
            side, pixels = min(picture.size), crop_square(picture, resolution, place).tobytes()
        except BrokenRow as error:
            problem = str(error)
        except (
            Exception
        ) as error:  # broken files make Pillow's decoders raise every kind; all are reported
            problem = f"{type(error).__name__}: {error}".replace("\n", " ")
    seen = hashlib.blake2b(pixels, digest_size=8).hexdigest()
    return row | {"pixels": pixels, "problem": printable(problem), "side": side, "hash": seen}


def crop_offset(content: bytes) -> float:
    """A number in [0, 1), uniform over contents."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=4).digest()) / 2**32


def decode(content: bytes, resolution: int) -> np.ndarray:
    """An image file as uint8 (3, resolution, resolution): upright, on white, its central square resized."""
    return crop_square(load_rgb(content), resolution)


def load_rgb(content: bytes) -> PIL.Image.Image:
    """An image file as RGB, turned as its EXIF data says, on white."""
    try:
        opened = PIL.Image.open(io.BytesIO(content))
    except PIL.UnidentifiedImageError as error:  # which names an address in memory
        raise BrokenRow(
            f"cannot identify it as a picture: {len(content)} bytes in no format that Pillow reads"
        ) from error
    with opened as picture:
        if math.prod(picture.size) > MAX_PIXELS:
            raise BrokenRow(
                f"too large: {picture.width} x {picture.height} pixels are more than the limit of {MAX_PIXELS:,}"
            )
        picture.load()
        return flatten_on_white(PIL.ImageOps.exif_transpose(picture))


def crop_square(picture: PIL.Image.Image, resolution: int, place: float = 0.5) -> np.ndarray:
    """A square of a picture as uint8 (3, resolution, resolution), from the left or upper end (place 0) to the other."""
    side = min(picture.size)
    left, top = int((picture.width - side) * place), int((picture.height - side) * place)
    cut = picture.crop(
        (left, top, left + side, top + side)
    )  # resize(box=...) would read beyond the box
    return np.asarray(cut.resize((resolution, resolution), PIL.Image.Resampling.LANCZOS)).transpose(
        2, 0, 1
    )


def flatten_on_white(picture: PIL.Image.Image) -> PIL.Image.Image:
    """Any picture as 8-bit RGB: what is transparent becomes white, 16-bit greys are scaled."""
    if picture.mode.startswith("I"):  # convert() would clip at 255
        grey = np.asarray(picture).astype(np.float64).clip(0, 65535) / 257
        return PIL.Image.fromarray(np.rint(grey).astype(np.uint8)).convert("RGB")
    if picture.mode == "F":
        raise BrokenRow(
            "floating-point pixels have no agreed range: save the picture with 8 or 16 bits"
        )
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        return PIL.Image.alpha_composite(
            PIL.Image.new("RGBA", picture.size, "white"), picture
        ).convert("RGB")
    return picture.convert("RGB")


def as_float(images: Tensor) -> Tensor:
    """Images as floats in [-1, 1]: uint8 are scaled, floats are clipped."""
    return (
        images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images.float().clamp(-1, 1)
    )


def as_uint8(images: Tensor) -> Tensor:
    """Images in [0, 1] as uint8, rounded."""
    return (images * 255).round().to(torch.uint8)
