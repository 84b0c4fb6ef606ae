"""The demo's temporary files: its own folder, cleaned regularly."""

import logging
import os
import threading
import time
from pathlib import Path

import pytest

from pipeline.serving import temp_files


@pytest.fixture
def old(tmp_path):
    """A folder with an old image in a folder of its own; (folder, image, a later time)."""
    image = tmp_path / "files" / "hash" / "image.png"
    image.parent.mkdir(parents=True)
    image.write_bytes(b"1")
    time.sleep(0.05)
    return tmp_path / "files", image, time.time()


def test_delete_older_files_leaves_newer_ones(old):
    folder, image, later = old
    temp_files.delete_older_files(str(folder), later - 60)
    assert image.exists()


def test_delete_older_files_also_deletes_empty_folders(old):
    folder, image, later = old
    time.sleep(0.05)
    # A new empty folder may still be waiting for its file.
    (folder / "empty").mkdir()
    (folder / "new").mkdir()
    (folder / "new" / "image.png").write_bytes(b"1")
    temp_files.delete_older_files(str(folder), later)
    assert not image.parent.exists()
    assert {path.name for path in folder.rglob("*")} == {"empty", "new", "image.png"}
    temp_files.delete_older_files(str(folder), time.time() + 1)
    assert folder.is_dir()
    assert not list(folder.iterdir())


def test_clean_regularly_continues_after_an_error(old, monkeypatch, caplog):
    folder, image, _later = old
    real = temp_files.delete_older_files
    rounds = []
    closed = threading.Event()

    def failing(path, before):
        rounds.append(before)
        if len(rounds) == 1:
            raise OSError("the disk is away")
        real(path, before)
        closed.set()

    monkeypatch.setattr(temp_files, "delete_older_files", failing)
    monkeypatch.setattr(temp_files, "CLEANUP_EVERY", 0.01)
    monkeypatch.setattr(temp_files, "CACHE_MAX_AGE", -1)
    with caplog.at_level(logging.ERROR):
        temp_files.clean_regularly(str(folder), closed)
    assert len(rounds) == 2
    assert not image.exists()
    assert "the disk is away" in caplog.text


def test_temporary_cache_only_touches_its_own_folder(tmp_path, monkeypatch):
    shared = tmp_path / "shared"
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(shared))
    monkeypatch.setattr(temp_files, "CLEANUP_EVERY", 0.01)
    monkeypatch.setattr(temp_files, "CACHE_MAX_AGE", -1)
    with temp_files.temporary_cache() as folder:
        theirs = shared / "theirs.png"
        ours = Path(folder) / "ours.png"
        theirs.write_text("")
        ours.write_text("")
        deadline = time.monotonic() + 20
        while ours.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not ours.exists()
        assert os.environ["GRADIO_TEMP_DIR"] == folder
        assert Path(folder).parent == shared
    assert list(shared.iterdir()) == [theirs]
    assert os.environ["GRADIO_TEMP_DIR"] == str(shared)
