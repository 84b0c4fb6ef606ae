"""Cached tables are complete or absent."""

import os
import resource
import time

import pyarrow
import pytest
from datasets_on_disk import save_image

from pipeline.data import map_cache


def test_cached_map_leaves_nothing_after_a_failure(load, tmp_path):
    """A disk that is full; and what a kill has left is cleared away by the next, but for what is being made."""
    save_image(tmp_path / "set" / "a.png", size=(64, 64))
    cache, before = tmp_path / "cache" / "direct-jump", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError, match="[Tt]oo large"):
            load(resolution=64)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(cache.iterdir())
    for name, age in (("old", 2 * map_cache.SCRATCH_MAX_AGE), ("new", 1)):
        (cache / f"{map_cache.SCRATCH_PREFIX}{name}").mkdir()
        (cache / f"{map_cache.SCRATCH_PREFIX}{name}" / "tmp").touch()
        for path in (
            cache / f"{map_cache.SCRATCH_PREFIX}{name}" / "tmp",
            cache / f"{map_cache.SCRATCH_PREFIX}{name}",
        ):
            os.utime(path, (time.time() - age,) * 2)
    assert len(load(resolution=64)) == 1
    assert sorted(path.name.partition("-")[0] for path in cache.iterdir()) == [".making", "images"]
    assert (cache / f"{map_cache.SCRATCH_PREFIX}new" / "tmp").exists()


@pytest.mark.parametrize("damage", ["empty", "torn", "fewer rows"])
def test_load_cached_table_replaces_a_corrupt_file(load, tmp_path, damage):
    """A machine that lost its power, or a copy that was interrupted, between two of its rows perhaps."""
    for i in range(3):
        save_image(tmp_path / "set" / f"{i}.png", (i, 0, 0))
    fingerprint = load().fingerprint
    (path,) = (tmp_path / "cache" / "direct-jump").glob("images-*.arrow")
    if damage == "fewer rows":
        with open(path, "rb") as file:
            table = pyarrow.ipc.open_stream(file).read_all()
        with pyarrow.ipc.new_stream(str(path), table.schema) as file:
            file.write_table(table.slice(0, 2))
    else:
        path.write_bytes(path.read_bytes()[: 0 if damage == "empty" else -path.stat().st_size // 2])
    with pytest.warns(UserWarning, match=r"images-\w+.arrow is damaged \(.+\) and is made again"):
        assert load().fingerprint == fingerprint
    assert load().fingerprint == fingerprint
