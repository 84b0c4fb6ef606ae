"""Cached tables are complete or absent."""

import os
import time

import pyarrow
import pytest
from datasets_on_disk import save_image

from pipeline.data import map_cache

resource = pytest.importorskip("resource")


@pytest.fixture
def full_disk():
    """Fail writes of more than 4 KB to one file, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_cached_map_leaves_nothing_on_a_full_disk(load, tmp_path, full_disk):
    save_image(tmp_path / "set" / "a.png", size=(64, 64))
    with pytest.raises(OSError, match="[Tt]oo large"):
        load(resolution=64)
    assert not list((tmp_path / "cache" / "direct-jump").iterdir())


def test_cached_map_removes_what_a_killed_process_left(load, tmp_path):
    """A folder that was written to recently belongs to a process that still runs."""
    save_image(tmp_path / "set" / "a.png")
    cache = tmp_path / "cache" / "direct-jump"
    for name, age in (("old", 2 * map_cache.SCRATCH_MAX_AGE), ("new", 1)):
        scratch = cache / f"{map_cache.SCRATCH_PREFIX}{name}"
        scratch.mkdir(parents=True)
        (scratch / "tmp").touch()
        for path in (scratch / "tmp", scratch):
            os.utime(path, (time.time() - age,) * 2)
    assert len(load()) == 1
    assert sorted(path.name.partition("-")[0] for path in cache.iterdir()) == [".making", "images"]
    assert (cache / f"{map_cache.SCRATCH_PREFIX}new" / "tmp").exists()


@pytest.mark.parametrize("damage", ["empty", "truncated", "fewer rows"])
def test_load_cached_table_replaces_a_corrupt_file(load, tmp_path, damage):
    """A power failure or an interrupted copy may end a file between two of its rows."""
    for i in range(3):
        save_image(tmp_path / "set" / f"square {i}.png", (i, 0, 0))
    fingerprint = load().fingerprint
    (path,) = (tmp_path / "cache" / "direct-jump").glob("images-*.arrow")
    if damage == "fewer rows":
        with open(path, "rb") as file:
            table = pyarrow.ipc.open_stream(file).read_all()
        with pyarrow.ipc.new_stream(str(path), table.schema) as file:
            file.write_table(table.slice(0, 2))
    else:
        path.write_bytes(path.read_bytes()[: 0 if damage == "empty" else -path.stat().st_size // 2])
    with pytest.warns(UserWarning, match=path.name):
        assert load().fingerprint == fingerprint
    assert load().fingerprint == fingerprint
