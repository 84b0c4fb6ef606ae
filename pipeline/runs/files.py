"""Atomic writes to disk."""

import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path


def sync_to_disk(path: Path) -> None:
    """Have the system write a file or a folder's entries to the disk now."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_if_possible(path: Path) -> None:
    """Delete what is no longer needed, a folder or a file; what cannot be deleted is told, and in nobody's way."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        warnings.warn(f"{path} is no longer needed and cannot be deleted: {error}", stacklevel=2)


def replace_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    new = path.with_name(f".{path.name}.tmp")
    new.write_text(text, encoding="utf-8")
    sync_to_disk(new)
    new.replace(path)


def replace_folder(target: Path, write: Callable[[Path], None]) -> None:
    """A result's folder, by `write(folder)` beside it: the one before stays until the new one is whole."""
    new, old = (target.with_name(f".{kind}-{target.name}") for kind in ("new", "old"))
    for rest in (new, old):
        shutil.rmtree(rest, ignore_errors=True)
    write(new)
    for path in (*new.rglob("*"), new):
        sync_to_disk(path)
    if target.exists():
        target.rename(old)
    new.rename(target)
    sync_to_disk(target.parent)
    shutil.rmtree(old, ignore_errors=True)
