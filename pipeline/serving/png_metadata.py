"""Generation parameters stored in PNG files."""

import dataclasses
import io
import json
import re
from pathlib import Path

import PIL.Image

from pipeline.diffusion.guidance import InputError
from pipeline.serving.requests import DENOISERS, Request

MAX_UPLOAD_BYTES, MAX_UPLOAD_PIXELS = 2_000_000, 4_000_000  # bytes and pixels of a file


# ---- what a PNG carries


def model_identity(name: str, digest: str) -> str:
    """A model's name with digits of its weights: what draws a picture again."""
    return f"{name} ({digest[:8]})"


def same_model(one: str, other: str) -> bool:
    """Whether two identities are of the same weights, whatever the folders are called; without digits, of one name."""
    digits = [
        found and found[1] for found in (re.search(r" \((\w{8})\)$", text) for text in (one, other))
    ]
    return digits[0] == digits[1] if all(digits) else one == other


def png_parameters(request: Request, denoiser: str, model: str, image: int = 0) -> dict:
    """What a PNG carries as `parameters`, in JSON: the request, who drew it, and which of its images this is."""
    return dataclasses.asdict(request) | {"image": image, "denoiser": denoiser, "model": model}


def read_upload(path: str | Path, kinds: tuple[str, ...]) -> bytes:
    """The bytes of a picture file of one of some kinds (Pillow's names), once its header promises a reasonable size."""
    try:
        size = Path(path).stat().st_size
        if size > MAX_UPLOAD_BYTES:
            raise InputError(
                f"the file has {size / 1e6:.1f} MB, expected {MAX_UPLOAD_BYTES / 1e6:g} at most: save it smaller"
            )
        content = Path(path).read_bytes()
    except FileNotFoundError as error:
        raise InputError(
            "the file is no longer here, expected one dropped within the hour: drop it again"
        ) from error
    try:
        with PIL.Image.open(io.BytesIO(content), formats=kinds) as picture:
            width, height = picture.size
    except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
        raise InputError(
            f"the file cannot be read, expected a picture ({' or '.join(kinds)})"
        ) from error
    if width * height > MAX_UPLOAD_PIXELS:
        raise InputError(
            f"the picture is {width} x {height}, expected {MAX_UPLOAD_PIXELS / 1e6:g} megapixels at most: "
            "save it smaller"
        )
    return content


def read_png(path: str | Path, T: int) -> tuple[Request, str, str]:
    """What a PNG of this page was drawn by: the request, the denoiser, the model's identity; InputError where it carries none."""
    with PIL.Image.open(io.BytesIO(read_upload(path, ("PNG",)))) as picture:
        try:
            picture.load()
            raw = {"think": 1} | json.loads(
                picture.info["parameters"]
            )  # which pictures of before do not name
            own = {f.name: raw[f.name] for f in dataclasses.fields(Request)}
            denoiser, model = raw["denoiser"], raw["model"]
            if denoiser not in DENOISERS or not isinstance(model, str):
                raise ValueError(f"{denoiser!r} of {model!r}")
        except (OSError, SyntaxError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                "the picture carries no settings, expected a PNG that this page drew"
            ) from error
    return Request.read(own, T), denoiser, model
