"""`Dataset.map` results, cached in Arrow files that are always complete."""

import contextlib
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets import config as datasets_config
from torch import Tensor

from pipeline.data.sources.rows import one_line

SCRATCH_PREFIX = ".making-"
# Seconds without a write after which a scratch folder belongs to a process that was killed.
SCRATCH_MAX_AGE = 3600


def cached_map(
    path: Path,
    table: datasets.Dataset,
    function: Callable[..., dict],
    is_outdated: Callable[[datasets.Dataset], bool] | None = None,
    **options: Any,
) -> datasets.Dataset:
    """Return `table.map(function, batched=True, **options)`, cached in the file `path`.

    A cached table is used unless it is corrupt or `is_outdated`. A new one is written in a scratch
    folder and moved to `path` once it is on disk, so a failure leaves nothing behind.
    """
    cached = load_cached_table(path, len(table))
    if cached is not None and not (is_outdated and is_outdated(cached)):
        return cached
    remove_old_scratch_folders(path.parent)
    with tempfile.TemporaryDirectory(prefix=SCRATCH_PREFIX, dir=path.parent) as scratch:
        new = Path(scratch) / path.name
        table.map(function, batched=True, cache_file_name=str(new), **options)
        with open(new, "rb") as file:
            os.fsync(file.fileno())
        new.replace(path)
    return datasets.Dataset.from_file(str(path))


def remove_old_scratch_folders(folder: Path) -> None:
    """Remove what killed processes have left in a cache folder."""
    for scratch in folder.glob(f"{SCRATCH_PREFIX}*"):
        # Another process may just be finishing it, or it is another user's.
        with contextlib.suppress(OSError):
            last_write = max(path.stat().st_mtime for path in (scratch, *scratch.iterdir()))
            if time.time() - last_write > SCRATCH_MAX_AGE:
                shutil.rmtree(scratch)


def load_cached_table(path: Path, rows: int) -> datasets.Dataset | None:
    """Return a cached table of n rows, None if there is none; warn about a corrupt one."""
    if not path.is_file():
        return None
    try:
        table = datasets.Dataset.from_file(str(path))
        problem = "" if len(table) == rows else f"it has {len(table)} rows instead of {rows}"
    except (OSError, ValueError) as error:
        # pyarrow's errors about truncated files have no errno; the system's errors do.
        if getattr(error, "errno", None):
            raise
        problem = one_line(error)
    if not problem:
        return table
    warnings.warn(f"{path} is corrupt ({problem}) and is prepared again.", stacklevel=2)
    return None


def read_arrays(
    table: datasets.Dataset, column: str, rows: Sequence[int], dtype: type, shape: Sequence[int]
) -> Tensor:
    """Return raw bytes of an Arrow-formatted table by row, as a tensor (len(rows), *shape)."""
    content = b"".join(table[list(rows)][column].to_pylist()) if len(rows) else b""
    array = np.frombuffer(bytearray(content), dtype)
    return torch.from_numpy(array.reshape(len(rows), *shape))


def cache_file(cache_dir: str | Path | None, kind: str, key: str) -> Path:
    """Return the path of a cached table."""
    return cache_folder(cache_dir) / f"{kind}-{key}.arrow"


def cache_folder(cache_dir: str | Path | None = None) -> Path:
    """Return the folder of cached files; without `cache_dir`, beside the cached Hub datasets."""
    folder = Path(cache_dir or datasets_config.HF_DATASETS_CACHE) / "direct-jump"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
