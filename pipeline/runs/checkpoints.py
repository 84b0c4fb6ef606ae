"""A checkpoint's manifest: the size and sha256 of each of its files."""

import hashlib
import json
from pathlib import Path

from pipeline.runs.files import sync_to_disk

CHECKPOINT_MANIFEST = "manifest.json"


def describe_file(path: Path) -> dict:
    """Return a file's size in bytes and its sha256."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": digest}


def write_manifest(folder: Path, facts: dict) -> None:
    """Write a folder's manifest after all its other files, and flush everything to disk."""
    paths = sorted(folder.rglob("*"))
    files = {str(p.relative_to(folder)): describe_file(p) for p in paths if p.is_file()}
    manifest = folder / CHECKPOINT_MANIFEST
    manifest.write_text(json.dumps({**facts, "files": files}, indent=1))
    for path in (*paths, manifest, folder):
        sync_to_disk(path)


def read_checkpoint_manifest(folder: Path) -> dict:
    """Return a checkpoint's step, the facts given to `RunFolder.save`, and its files."""
    return json.loads((folder / CHECKPOINT_MANIFEST).read_text())


def verify_checkpoint(folder: Path) -> str:
    """Return what is wrong with a checkpoint; "" if every file matches its manifest."""
    try:
        files = read_checkpoint_manifest(folder)["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its {CHECKPOINT_MANIFEST} cannot be read ({error})"
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if describe_file(path) != expected:
            return f"{name} has changed"
    return ""
