"""Small captioned datasets on disk: image files, listings and parquet tables."""

import io
import json
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from pipeline.config import DataConfig
from pipeline.data.dataset import CaptionedImages, load_split
from pipeline.data.emoji.styles import load_rgba
from pipeline.data.image_ops import crop_square, flatten_on_white


def load_images(
    source, split="train", resolution=64, cache_dir=None, **settings
) -> CaptionedImages:
    """Return one split of a source; `settings` are DataConfig's others."""
    cache = str(cache_dir or datasets.config.HF_DATASETS_CACHE)
    config = DataConfig(str(source), resolution=resolution, cache=cache, **settings)
    return load_split(config, split)


def render_emoji(path: Path, size: int) -> Image.Image:
    """Return an emoji's file on white, RGB, size x size."""
    return crop_square(flatten_on_white(load_rgba(path)), size)


def save_image(path: Path, color="red", size=(8, 8), mode="RGB") -> None:
    """Write a plain image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path)


def write_listing(folder: Path, *rows: dict) -> None:
    """Write a folder's metadata.jsonl."""
    lines = [json.dumps(row) + "\n" for row in rows]
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")


def encode_image(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    """Return an image as the content of a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(red: int = 0, size=(8, 8)) -> bytes:
    """Return a plain PNG file."""
    return encode_image(Image.new("RGB", size, (red, 0, 0)))


def wide_png(green: int) -> bytes:
    """Return a PNG file of 200 x 8 pixels whose red is the column."""
    columns = np.zeros((8, 200, 3), np.uint8)
    columns[..., 0] = np.arange(200)
    columns[..., 1] = green
    return encode_image(Image.fromarray(columns))


def squares(start: int, stop: int) -> list[dict]:
    """Return rows of plain images whose red is the number in their caption."""
    return [{"image": png(i), "text": f"square {i}"} for i in range(start, stop)]


def write_parquet(path: Path, rows: list[dict], **columns) -> Path:
    """Write rows {"image": bytes or None, ...} as `datasets` does; other columns hold strings."""
    texts = {name: datasets.Value("string") for name in rows[0] if name != "image"}
    features = datasets.Features({"image": datasets.Image()} | texts | columns)
    packed = [
        row | {"image": row["image"] and {"bytes": row["image"], "path": None}} for row in rows
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(packed, features=features).to_parquet(path)
    return path


def reds(images: CaptionedImages) -> list[int]:
    """Return the red of each image's first pixel."""
    return images.images[:][:, 0, 0, 0].tolist()


def read_rows(folder: Path, split: str) -> list[dict]:
    """Return the entries of a split's metadata.jsonl."""
    lines = (folder / split / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def reasons(images: CaptionedImages) -> dict[str, str]:
    """Return why each broken row was skipped, by name."""
    return dict(images.report.broken)
