"""A checkpoint's manifest of hashes."""

import hashlib
import json
from pathlib import Path

CHECKPOINT_MANIFEST = "manifest.json"


def describe_file(path: Path) -> dict:
    """A file's size in bytes and sha256, as the manifest keeps them."""
    with open(path, "rb") as file:
        return {
            "size": path.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


def read_checkpoint_manifest(folder: Path) -> dict:
    """What a checkpoint's manifest says: its step, the facts given to `save`, and its files."""
    return json.loads((folder / CHECKPOINT_MANIFEST).read_text())


def verify_checkpoint(folder: Path) -> str:
    """What is wrong with a checkpoint, "" where every file is as its manifest says."""
    try:
        files = read_checkpoint_manifest(folder)["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its {CHECKPOINT_MANIFEST} cannot be read ({error})"
    for name, wanted in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if describe_file(path) != wanted:
            return f"{name} is not what was written"
    return ""
