"""A run's folder: a checkpoint is complete or absent."""

import errno
import fcntl
import json
import os
import resource
import shutil
import subprocess
import sys

import pytest
import torch

from pipeline.runs.checkpoints import CHECKPOINT_MANIFEST, verify_checkpoint
from pipeline.runs.files import replace_folder
from pipeline.runs.folder import RunError, RunFolder, SaveError
from pipeline.runs.state_files import save_state


@pytest.fixture
def run(tmp_path):
    made = RunFolder(tmp_path / "run")
    made.create()
    return made


def write(text="weights"):
    return lambda folder: ((folder / "unet").mkdir(), (folder / "unet" / "w.bin").write_text(text))


def test_save_writes_the_newest_checkpoint(run):
    run.save(2, write(), keep=3)
    run.save(10, write(), keep=3, processes=1)
    assert run.newest().name == "10"
    manifest = json.loads((run.checkpoints / "10" / CHECKPOINT_MANIFEST).read_text())
    assert (manifest["step"], manifest["processes"], list(manifest["files"])) == (
        10,
        1,
        ["unet/w.bin"],
    )


@pytest.mark.parametrize(
    "damage", ["truncate", "empty", "flip", "remove", "no manifest", "half a manifest"]
)
def test_newest_skips_corrupt_checkpoints(run, damage):
    run.save(1, write(), keep=3)
    folder = run.save(2, write(), keep=3)
    file, manifest = folder / "unet" / "w.bin", folder / CHECKPOINT_MANIFEST
    {
        "truncate": lambda: file.write_text("wei"),
        "empty": lambda: file.write_text(""),
        "flip": lambda: file.write_text("weighty"),
        "remove": file.unlink,
        "no manifest": manifest.unlink,
        "half a manifest": lambda: manifest.write_text(manifest.read_text()[:20]),
    }[damage]()
    with pytest.warns(UserWarning, match=r"checkpoints/2\b"):
        assert run.newest().name == "1"


def test_newest_refuses_when_all_checkpoints_are_corrupt(run):
    for step in (1, 2):
        (run.save(step, write(), keep=3) / CHECKPOINT_MANIFEST).unlink()
    with pytest.warns(UserWarning), pytest.raises(RunError, match="all 2"):
        run.newest()
    assert run.steps() == [1, 2]


def test_save_failure_retains_the_previous_checkpoint(run):
    run.save(1, write(), keep=1)

    def fail(folder):
        (folder / "half").write_text("x")
        raise OSError("disk full")

    with pytest.raises(
        SaveError,
        match=r"step 2 .*disk full.*\[1\]",
    ):
        run.save(2, fail, keep=1)
    assert run.newest().name == "1"
    assert not (run.checkpoints / ".tmp-2").exists()
    half = run.checkpoints / ".tmp-3"
    half.mkdir()  # of a process that was killed
    with run.lock():
        assert not half.exists()
        half.mkdir()  # of this one, which is saving
        run.create()
        with pytest.raises(RunError, match=str(os.getpid())), run.lock():
            pass
        assert half.exists()


def test_save_checks_disk_space_before_writing(run, monkeypatch):
    folder = run.save(1, write("x" * 1000), keep=1)
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    usage = type(shutil.disk_usage(run.folder))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, int(1.2 * size) - 1))
    with pytest.raises(SaveError, match=f"{1.2 * size:,.0f}"):
        run.save(2, lambda _: pytest.fail("it wrote"), keep=1)
    assert run.newest().name == "1"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, int(1.2 * size) + 1))
    assert run.save(2, write(), keep=1).name == "2"


def test_save_reports_a_write_that_the_system_refuses(run):
    """Past RLIMIT_FSIZE a write fails as on a full disk, safetensors' own with its own error."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    run.save(1, write(), keep=1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(SaveError, match="step 2"):
            run.save(
                2, lambda folder: save_state(folder, "trainer", {"w": torch.zeros(10_000)}), keep=1
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert run.newest().name == "1" and not list(run.checkpoints.glob(".tmp-*"))


def test_replace_folder_is_atomic(run):
    replace_folder(run.pipeline, lambda folder: (folder.mkdir(), (folder / "a").write_text("1")))
    with pytest.raises(ZeroDivisionError):
        replace_folder(run.pipeline, lambda folder: (folder.mkdir(), 1 / 0))
    assert (run.pipeline / "a").read_text() == "1"
    replace_folder(run.pipeline, lambda folder: (folder.mkdir(), (folder / "b").write_text("2")))
    assert [p.name for p in run.pipeline.iterdir()] == ["b"] and not list(
        run.folder.glob(".*-pipeline")
    )


def test_save_deletes_old_steps_but_no_other_entries(run):
    for name in ("checkpoint-old", "7.bak", "0500"):
        (run.checkpoints / name).mkdir()
    (run.checkpoints / "9").write_text("a file")
    for step in (1, 2, 3):
        run.save(step, write(), keep=2)
    assert run.steps() == [2, 3]
    assert {"checkpoint-old", "7.bak", "0500", "9"} < {p.name for p in run.checkpoints.iterdir()}


def test_save_survives_undeletable_checkpoints(run, tmp_path, monkeypatch):
    """One is in use by another program; one was moved to a larger disk and linked."""
    for step in (1, 2):
        run.save(step, write(), keep=2)
    (run.checkpoints / "1").rename(tmp_path / "moved")
    (run.checkpoints / "1").symlink_to(tmp_path / "moved")
    (run.checkpoints / ".tmp-7").write_text("a file")
    with run.lock():
        run.save(3, write(), keep=2)
    assert (
        run.steps() == [2, 3]
        and (tmp_path / "moved").is_dir()
        and not (run.checkpoints / ".tmp-7").exists()
    )

    def busy(path):
        raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))

    monkeypatch.setattr(
        shutil, "rmtree", lambda path, ignore_errors=False: ignore_errors or busy(path)
    )
    with pytest.warns(UserWarning, match=r"checkpoints/2 .*Directory not empty"):
        run.save(4, write(), keep=2)
    assert run.newest().name == "4"


def test_save_does_not_count_corrupt_checkpoints(run):
    for step in (2, 4, 6):
        run.save(step, write(), keep=3)
    (run.checkpoints / "6" / CHECKPOINT_MANIFEST).unlink()
    with pytest.warns(UserWarning, match="checkpoints/6"):
        assert run.newest().name == "4"
    run.save(5, write(), keep=2)
    assert run.steps() == [4, 5, 6]
    run.save(10, write(), keep=2)
    assert run.steps() == [5, 10]


def test_save_replaces_a_corrupt_checkpoint(run):
    for step in (2, 4):
        run.save(step, write(), keep=3)
    (run.checkpoints / "4" / CHECKPOINT_MANIFEST).unlink()
    with pytest.warns(UserWarning, match="checkpoints/4"):
        assert run.newest().name == "2"
    run.save(4, write(), keep=1)
    assert run.steps() == [4] and run.newest().name == "4"


def test_save_retains_steps_before_a_corrupt_later_one(run):
    run.save(8, write(), keep=1)
    (run.checkpoints / "10").mkdir()
    run.save(9, write(), keep=1)
    assert run.steps() == [9, 10]
    with pytest.warns(UserWarning, match="checkpoints/10"):
        assert run.newest().name == "9"


def test_rewind_drops_later_steps_and_incomplete_lines(run):
    for step in (1, 2, 3):
        run.log(step=step, loss=step / 2)
    with open(run.metrics, "a") as file:
        file.write('{"step": 4, "lo')
    for name in ("000002.png", "000003.png", "mine.png"):
        (run.samples / name).touch()
    run.rewind(2)
    assert run.history() == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 1.0}]
    assert sorted(path.name for path in run.samples.iterdir()) == ["000002.png", "mine.png"]


def test_log_writes_null_for_what_is_no_number(run):
    """Bare NaN is not JSON. An older log may have one."""
    run.metrics.write_text('{"step": 1, "train_loss": NaN}\n')
    run.log(step=2, loss=float("inf"), errors={6: float("nan")})
    expected = [
        {"step": 1, "train_loss": None},
        {"step": 2, "loss": None, "errors": {"6": None}},
    ]
    assert run.history() == expected
    run.rewind(2)
    assert "NaN" not in run.metrics.read_text()
    assert [json.loads(line) for line in run.metrics.read_text().splitlines()] == expected


def test_sample_files_are_sorted_by_step(run):
    for name in ("999500.png", "1000000.png", "mine.png", "000002.png"):
        (run.samples / name).touch()
    assert [(step, path.name) for step, path in run.sample_files()] == [
        (2, "000002.png"),
        (999500, "999500.png"),
        (1000000, "1000000.png"),
    ]


def test_lock_refuses_a_second_process(run):
    code = "from pipeline.runs.folder import RunFolder\n"
    code += f"with RunFolder({str(run.folder)!r}).lock(): pass"
    with run.lock():
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0 and str(os.getpid()) in done.stderr
    subprocess.run([sys.executable, "-c", code], check=True)  # and free again afterwards


def test_create_and_lock_report_a_file_in_the_way(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(RunError, match="runs/a"):
        RunFolder(tmp_path / "runs" / "a").create()
    (tmp_path / "b" / ".lock").mkdir(parents=True)
    with (
        pytest.raises(RunError, match="b"),
        RunFolder(tmp_path / "b").lock(),
    ):
        pytest.fail("it was locked")


def test_lock_warns_about_a_file_system_without_locks(run, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with (
        pytest.warns(UserWarning, match="has no locks"),
        run.lock(),
    ):
        held = (run.folder / ".pid").read_text()
    assert held == str(os.getpid())


def test_verify_checkpoint_names_the_file(run):
    folder = run.save(1, write(), keep=1)
    assert verify_checkpoint(folder) == ""
    (folder / "unet" / "w.bin").write_text("other!!")
    assert verify_checkpoint(folder).startswith("unet/w.bin")
