"""Atomic writes: a file or folder is complete or absent, also after a crash."""

import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path


def sync_to_disk(path: Path) -> None:
    """Flush a file, or a folder's entries, to disk."""
    # Windows can open no folder, and flushes their entries by itself.
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_if_possible(path: Path) -> None:
    """Delete a file or folder that is no longer needed; a failure is only a warning."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        warnings.warn(f"{path} is no longer needed but cannot be deleted: {error}", stacklevel=2)


def replace_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    new = path.with_name(f".{path.name}.tmp")
    new.write_text(text, encoding="utf-8")
    sync_to_disk(new)
    new.replace(path)


def replace_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Replace a folder by what `write(folder)` creates, once that is complete."""
    new = target.with_name(f".new-{target.name}")
    old = target.with_name(f".old-{target.name}")
    for stale in (new, old):
        shutil.rmtree(stale, ignore_errors=True)
    write(new)
    for path in (*new.rglob("*"), new):
        sync_to_disk(path)
    if target.exists():
        target.rename(old)
    new.rename(target)
    sync_to_disk(target.parent)
    shutil.rmtree(old, ignore_errors=True)
