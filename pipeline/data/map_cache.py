"""`Dataset.map` results cached in complete Arrow files."""

import contextlib
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import datasets

from pipeline.data.sources.rows import one_line

SCRATCH_PREFIX, SCRATCH_MAX_AGE = (
    ".making-",
    3600,
)  # where a table is made; after so many seconds without a write nobody makes it any more


def cached_map(
    path: Path,
    table: datasets.Dataset,
    function: Callable,
    outdated: Callable[[datasets.Dataset], bool] = lambda known: False,
    **options,
) -> datasets.Dataset:
    """`table.map(function, batched=True, **options)`, kept in a file of the cache: read where it is there, whole and not
    `outdated`, else made.

    It is made in a folder beside it, of which nothing is left where that fails, and gets its name when it is on the disk.
    """
    if (found := load_cached_table(path, len(table))) is not None and not outdated(found):
        return found
    for old in path.parent.glob(f"{SCRATCH_PREFIX}*"):  # of a process that was killed
        with contextlib.suppress(OSError):  # it is just being finished, or another user's
            if (
                time.time() - max(file.stat().st_mtime for file in (old, *old.iterdir()))
                > SCRATCH_MAX_AGE
            ):
                shutil.rmtree(old)
    with tempfile.TemporaryDirectory(prefix=SCRATCH_PREFIX, dir=path.parent) as scratch:
        new = Path(scratch) / path.name
        table.map(function, batched=True, cache_file_name=str(new), **options)
        with open(new, "rb") as file:
            os.fsync(file.fileno())
        new.replace(path)
    return datasets.Dataset.from_file(str(path))


def load_cached_table(path: Path, rows: int) -> datasets.Dataset | None:
    """A kept table with so many rows; None where there is none, or a damaged one, which is told."""
    if not path.is_file():
        return None
    try:
        found = datasets.Dataset.from_file(str(path))
        damage = "" if len(found) == rows else f"it has {len(found)} rows, expected {rows}"
    except (OSError, ValueError) as error:  # of pyarrow: a file that breaks off
        if getattr(error, "errno", None):  # of the system
            raise
        damage = one_line(error)
    if not damage:
        return found
    warnings.warn(f"{path} is damaged ({damage}) and is made again", stacklevel=2)
    return None


def cache_file(cache_dir: str | Path | None, what: str, key: str) -> Path:
    """Where a prepared table is kept; `cache_dir` None means beside the Hub's data sets."""
    folder = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "direct-jump"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{what}-{key}.arrow"
