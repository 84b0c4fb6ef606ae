"""Tiny packages of emoji drawings and tags, as npm packs them."""

import hashlib
import io
import json
import tarfile
from pathlib import Path

from PIL import Image

from pipeline.data import map_cache
from pipeline.data.emoji import packages, style_set
from pipeline.data.emoji.styles import Package

FLAT = {"fox": "orange", "wolf": "grey", "banana": "yellow", "watermelon": "green"}
FLAT |= {"lemon": "gold", "green-heart": "lime", "red-heart": "red", "green-circle": "teal"}
CHARS = {"1f98a": "fox", "1f43a": "wolf", "1f34c": "banana", "1f349": "watermelon"}
CHARS |= {"1f34b": "lemon", "1f49a": "green-heart", "2764": "red-heart", "1f7e2": "green-circle"}
NOTO = {"1f98a": "#c00000", "1f349": "#00c000", "1f34b": "#0000c0", "1f43a": "#c0c0c0"}


def disc(color: str) -> str:
    """Return the body of an icon of 32 x 32: a disc."""
    return f'<circle cx="16" cy="16" r="12" fill="{color}"/>'


def pack(folder: Path, name: str, files: dict[str, bytes]) -> Package:
    """Write an archive with files below `package/`, and return its package."""
    archive = folder / f"{name.removeprefix('@').replace('/', '-')}-1.0.0.tgz"
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "w:gz") as tar:
        for path, content in files.items():
            member = tarfile.TarInfo(f"package/{path}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    return Package(name, "1.0.0", digest, "MIT", f"{name}, (c) nobody, MIT")


def pack_icons(
    folder: Path,
    name: str,
    icons: dict[str, str],
    chars: dict[str, str] | None = None,
    aliases: dict[str, dict] | None = None,
) -> Package:
    """Write an iconify package of icons {name: body}, {code point: name} and aliases."""
    bodies = {icon: {"body": body} for icon, body in icons.items()}
    icon_set = {"icons": bodies, "aliases": aliases or {}, "width": 32, "height": 32}
    files = {"icons.json": icon_set, "chars.json": chars or {}}
    encoded = {path: json.dumps(content).encode() for path, content in files.items()}
    return pack(folder, f"@iconify-json/{name}", encoded)


def pack_images(folder: Path, name: str, colors: dict[str, str]) -> Package:
    """Write a package of WebP squares, {file name without its end: colour}."""
    files = {}
    for stem, color in colors.items():
        buffer = io.BytesIO()
        Image.new("RGBA", (16, 16), color).save(buffer, "WEBP", lossless=True)
        files[f"assets/{stem}.webp"] = buffer.getvalue()
    return pack(folder, name, files)


def pack_tags(folder: Path, tags: dict[str, list[str]]) -> Package:
    """Write a package of English tags, {emoji: tags}."""
    rows = [{"emoji": emoji, "tags": words} for emoji, words in tags.items()]
    return pack(folder, "emojibase-data", {"en/data.json": json.dumps(rows).encode()})


def use_tiny_styles(folder: Path, monkeypatch) -> tuple[str, ...]:
    """Put three tiny packages in place of all styles', and return their names.

    Held out are the wolf in all styles, the green heart, and in flat the watermelon and the lemon.
    """
    monkeypatch.setattr(map_cache.datasets_config, "HF_DATASETS_CACHE", folder)
    cache = map_cache.cache_folder() / "packages"
    drawn = {name: disc(color) for name, color in FLAT.items()}
    black = {name: disc("currentColor") for name in ("fox", "lemon")}
    tiny = {
        "flat": pack_icons(cache, "flat", drawn, CHARS),
        "noto": pack_images(cache, "noto", NOTO),
        "ink": pack_icons(cache, "ink", black),
    }
    tags = pack_tags(cache, {"🍋": ["food", "fruit"]})
    monkeypatch.setattr(style_set, "STYLES", tiny)
    monkeypatch.setattr(style_set, "DEFAULT_STYLES", tuple(tiny))
    monkeypatch.setattr(style_set, "TAGS", tags)
    monkeypatch.setattr(packages, "TAGS", tags)
    return tuple(tiny)
