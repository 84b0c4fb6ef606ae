"""Drawings and tags of emoji from npm packages, downloaded once and checked by their digest."""

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from pipeline.data.emoji.catalogue import SELECTOR, Emoji, EmojiError
from pipeline.data.emoji.styles import TAGS, Package

NAMESPACES = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'


def fetch_archive(package: Package, cache: Path) -> Path:
    """Return a package's archive in `cache`; `npm pack` downloads it on first use.

    Raises EmojiError where npm is missing, cannot download it, or the digest is another.
    """
    archive = archive_path(package, cache)
    if not archive.exists():
        download(package, archive)
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != package.sha256:
        raise EmojiError(
            f"{archive} is not {package}: its sha256 is {digest}, not {package.sha256}. "
            "Delete it and run the command again."
        )
    return archive


def archive_path(package: Package, cache: Path) -> Path:
    """Return where a package's archive is cached, under npm's name."""
    return cache / f"{package.name.removeprefix('@').replace('/', '-')}-{package.version}.tgz"


def download(package: Package, archive: Path) -> None:
    """Let `npm pack` write a package's archive, complete or not at all."""
    npm = shutil.which("npm")
    if npm is None:
        raise EmojiError(
            f"npm is missing, which downloads {package}. Install Node.js, or copy {archive.name} "
            f"to {archive.parent}."
        )
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=archive.parent) as folder:
        command = [npm, "pack", "--silent", "--pack-destination", folder, str(package)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
        packed = Path(folder) / archive.name
        if done.returncode or not packed.exists():
            reason = (done.stderr or done.stdout).strip().splitlines() or ["no reason given"]
            raise EmojiError(
                f"npm could not download {package}: {reason[-1]}. Connect to a network and run "
                f"the command again, or copy {archive.name} to {archive.parent}."
            )
        os.replace(packed, archive)


def file_key(emoji: str) -> str:
    """Return the name of an emoji in packages: four digits or more a code point, no selectors."""
    return "-".join(f"{ord(c):04x}" for c in emoji if c != SELECTOR)


def icon_name(name: str) -> str:
    """Return iconify's name of an emoji: "woman's boot" is `womans-boot`."""
    return re.sub("[^a-z0-9]+", "-", name.lower().replace("'", "")).strip("-")


class ImageFiles:
    """A package of images whose file names are code points."""

    def __init__(self, archive: Path) -> None:
        self.images: dict[str, bytes] = {}
        with tarfile.open(archive) as tar:
            for member in tar:
                if member.name.endswith(".webp"):
                    key = Path(member.name).stem.replace("-fe0f", "")
                    self.images[key] = tar.extractfile(member).read()  # type: ignore[union-attr]

    def keys_of(self, entries: Iterable[Emoji]) -> dict[str, str]:
        """Return the key of each emoji that the package draws."""
        keys = {entry.emoji: file_key(entry.emoji) for entry in entries}
        return {emoji: key for emoji, key in keys.items() if key in self.images}

    def draw(self, key: str, size: int) -> Image.Image:
        """Return an image as RGBA, size x size."""
        with Image.open(io.BytesIO(self.images[key])) as image:
            return image.convert("RGBA").resize((size, size), Image.Resampling.LANCZOS)


class IconSet:
    """An iconify package: vector drawings by name, in most of them also by code point."""

    def __init__(self, archive: Path) -> None:
        with tarfile.open(archive) as tar:
            self.set = read_json(tar, "icons.json")
            self.names = read_json(tar, "chars.json")
        self.icons = self.set["icons"]
        self.aliases = self.set.get("aliases", {})

    def keys_of(self, entries: Iterable[Emoji]) -> dict[str, str]:
        """Return the icon's name for each emoji that the package draws.

        A set that has no code points is searched for the caption, then for other names. Where two
        emoji would get the same icon, the better match has it: "cricket game", not "cricket".
        """
        if self.names:
            keys = {entry.emoji: self.names.get(file_key(entry.emoji)) for entry in entries}
            return {emoji: name for emoji, name in keys.items() if name}
        claims: dict[str, list[tuple[int, str, str]]] = defaultdict(list)
        for entry in entries:
            for rank, name in enumerate(map(icon_name, entry.all_names)):
                alias = self.aliases.get(name)
                if alias or name in self.icons:
                    icon = alias["parent"] if alias else name
                    claims[icon].append((2 * min(rank, 1) + bool(alias), entry.emoji, name))
                    break
        best = {}
        for claimed in claims.values():
            first, *others = sorted(claimed)
            if all(first[0] < other[0] for other in others):
                best[first[1]] = first[2]
        return best

    def draw(self, name: str, size: int) -> Image.Image:
        """Return an icon as RGBA, size x size."""
        import resvg_py

        alias = self.aliases.get(name, {})
        icon = self.icons[alias.get("parent", name)]
        width = icon.get("width", self.set["width"])
        height = icon.get("height", self.set["height"])
        body = icon["body"]
        if alias.get("hFlip"):
            body = f'<g transform="translate({width} 0) scale(-1 1)">{body}</g>'
        svg = (
            f'<svg {NAMESPACES} width="{size}" height="{size}" '
            f'viewBox="0 0 {width} {height}">{body}</svg>'
        )
        png = resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True)
        with Image.open(io.BytesIO(png)) as image:
            return image.convert("RGBA")


def read_json(tar: tarfile.TarFile, name: str) -> dict:
    """Return a JSON file of a package."""
    return json.load(tar.extractfile(f"package/{name}"))  # type: ignore[arg-type]


def load_drawings(package: Package, cache: Path) -> ImageFiles | IconSet:
    """Return the drawings of a style's package."""
    archive = fetch_archive(package, cache)
    return IconSet(archive) if package.name.startswith("@iconify-json/") else ImageFiles(archive)


def load_tags(cache: Path) -> dict[str, list[str]]:
    """Return emojibase's English tags by `file_key`."""
    with tarfile.open(fetch_archive(TAGS, cache)) as tar:
        rows = read_json(tar, "en/data.json")
    return {file_key(row["emoji"]): row.get("tags", []) for row in rows}
