"""Generation parameters stored in PNG files."""

import dataclasses
import io
import json
import re
from pathlib import Path

import PIL.Image

from pipeline.diffusion.guidance import InputError
from pipeline.serving.requests import DENOISERS, Request

MAX_UPLOAD_BYTES = 2_000_000
MAX_UPLOAD_PIXELS = 4_000_000


def model_identity(name: str, digest: str) -> str:
    """Return a model's name with the first digits of its weights' digest."""
    return f"{name} ({digest[:8]})"


def same_model(one: str, other: str) -> bool:
    """Return whether two identities have the same weights; without digits, the same name."""
    pattern = re.compile(r".* \((\w{8})\)")
    matches = pattern.fullmatch(one), pattern.fullmatch(other)
    if matches[0] and matches[1]:
        return matches[0][1] == matches[1][1]
    return one == other


def png_parameters(request: Request, denoiser: str, model: str, image: int = 0) -> dict:
    """Return what a PNG stores as `parameters`, in JSON; `image` is its position in the request."""
    return dataclasses.asdict(request) | {"image": image, "denoiser": denoiser, "model": model}


def read_upload(path: str | Path, formats: tuple[str, ...]) -> bytes:
    """Return the bytes of an image file of one of Pillow's `formats`, once its size is checked."""
    try:
        size = Path(path).stat().st_size
        if size > MAX_UPLOAD_BYTES:
            limit = f"{MAX_UPLOAD_BYTES / 1e6:g} MB"
            raise InputError(f"The file may have {limit}, got {size / 1e6:.1f} MB. Reduce it.")
        content = Path(path).read_bytes()
    except FileNotFoundError as error:
        raise InputError("The uploaded file has expired. Upload it again.") from error
    try:
        with PIL.Image.open(io.BytesIO(content), formats=formats) as image:
            width, height = image.size
    except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
        raise InputError(f"The file is not a readable {' or '.join(formats)} image.") from error
    if width * height > MAX_UPLOAD_PIXELS:
        limit = f"{MAX_UPLOAD_PIXELS / 1e6:g} megapixels"
        raise InputError(f"The image may have {limit}, got {width} x {height}. Reduce it.")
    return content


def read_png(path: str | Path, T: int) -> tuple[Request, str, str]:
    """Return the request, denoiser and model identity in a PNG; InputError if it has none."""
    with PIL.Image.open(io.BytesIO(read_upload(path, ("PNG",)))) as image:
        try:
            image.load()
            # Images from before search existed have no "think".
            raw = {"think": 1} | json.loads(image.info["parameters"])
            settings = {field.name: raw[field.name] for field in dataclasses.fields(Request)}
            denoiser, model = raw["denoiser"], raw["model"]
            if denoiser not in DENOISERS or not isinstance(model, str):
                raise ValueError(f"{denoiser!r} of {model!r}")
        except (OSError, SyntaxError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                "The image carries no settings. Use a PNG that Direct Jump saved."
            ) from error
    return Request.read(settings, T), denoiser, model
