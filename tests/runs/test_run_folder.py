"""A run's folder: a checkpoint is whole or it is not there."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from pipeline.runs import folder as folder_module
from pipeline.runs.checkpoints import CHECKPOINT_MANIFEST, verify_checkpoint
from pipeline.runs.files import replace_folder
from pipeline.runs.folder import RunError, RunFolder, SaveError
from pipeline.runs.state_files import load_state, save_state
from pipeline.runs.stop_signals import Stopped, StopSignals


@pytest.fixture
def run(tmp_path):
    made = RunFolder(tmp_path / "run")
    made.create()
    return made


def write(text="weights"):
    return lambda folder: ((folder / "unet").mkdir(), (folder / "unet" / "w.bin").write_text(text))


def test_a_saved_checkpoint_verifies_and_is_the_newest(run):
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
def test_a_damaged_checkpoint_is_skipped_with_a_warning(run, damage):
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
    with pytest.warns(UserWarning, match="checkpoint .*2 is skipped"):
        assert run.newest().name == "1"


def test_when_all_are_damaged_nothing_is_deleted_and_nobody_starts_anew(run):
    for step in (1, 2):
        (run.save(step, write(), keep=3) / CHECKPOINT_MANIFEST).unlink()
    with pytest.warns(UserWarning), pytest.raises(RunError, match="2 of 2"):
        run.newest()
    assert run.steps() == [1, 2]


def test_a_failed_save_leaves_the_old_checkpoint_and_the_next_start_clears_the_rest(run):
    run.save(1, write(), keep=1)

    def fail(folder):
        (folder / "half").write_text("x")
        raise OSError("disk full")

    with pytest.raises(
        SaveError,
        match=r"checkpoint of step 2 could not be saved .*disk full.* steps \[1\] are whole",
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
        with pytest.raises(RunError, match="is in use by process"), run.lock():
            pass
        assert half.exists()


def test_a_disk_without_room_is_told_before_anything_is_written(run, monkeypatch):
    folder = run.save(1, write("x" * 1000), keep=1)
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    usage = type(shutil.disk_usage(run.folder))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, int(1.2 * size) - 1))
    with pytest.raises(
        SaveError, match=rf"bytes free, expected {1.2 * size:,.0f} for a checkpoint"
    ):
        run.save(2, lambda _: pytest.fail("it wrote"), keep=1)
    assert run.newest().name == "1"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, int(1.2 * size) + 1))
    assert run.save(2, write(), keep=1).name == "2"


def test_a_file_that_the_system_refuses_is_a_save_error(run):
    """Past RLIMIT_FSIZE a write fails as on a full disk, safetensors' own with its own error."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    run.save(1, write(), keep=1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(SaveError, match="step 2 could not be saved"):
            run.save(
                2, lambda folder: save_state(folder, "trainer", {"w": torch.zeros(10_000)}), keep=1
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert run.newest().name == "1" and not list(run.checkpoints.glob(".tmp-*"))


def test_a_published_folder_is_replaced_whole(run):
    replace_folder(run.pipeline, lambda folder: (folder.mkdir(), (folder / "a").write_text("1")))
    with pytest.raises(ZeroDivisionError):
        replace_folder(run.pipeline, lambda folder: (folder.mkdir(), 1 / 0))
    assert (run.pipeline / "a").read_text() == "1"
    replace_folder(run.pipeline, lambda folder: (folder.mkdir(), (folder / "b").write_text("2")))
    assert [p.name for p in run.pipeline.iterdir()] == ["b"] and not list(
        run.folder.glob(".*-pipeline")
    )


def test_only_the_last_few_are_kept_and_foreign_names_are_left_alone(run):
    for name in ("checkpoint-old", "7.bak", "0500"):
        (run.checkpoints / name).mkdir()
    (run.checkpoints / "9").write_text("a file")
    for step in (1, 2, 3):
        run.save(step, write(), keep=2)
    assert run.steps() == [2, 3]
    assert {"checkpoint-old", "7.bak", "0500", "9"} < {p.name for p in run.checkpoints.iterdir()}


def test_what_cannot_be_deleted_is_told_and_a_saved_checkpoint_stays_saved(
    run, tmp_path, monkeypatch
):
    """Another program reads an old checkpoint; or somebody has moved it to a larger disk, and linked it."""
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
    with pytest.warns(
        UserWarning, match="2 is no longer needed and cannot be deleted: .*Directory not empty"
    ):
        run.save(4, write(), keep=2)
    assert run.newest().name == "4"


def test_a_torn_checkpoint_is_none_of_those_that_are_kept(run):
    for step in (2, 4, 6):
        run.save(step, write(), keep=3)
    (run.checkpoints / "6" / CHECKPOINT_MANIFEST).unlink()
    with pytest.warns(UserWarning, match="6 is skipped"):
        assert run.newest().name == "4"
    run.save(5, write(), keep=2)
    assert run.steps() == [4, 5, 6]
    run.save(10, write(), keep=2)
    assert run.steps() == [5, 10]


def test_a_torn_checkpoint_that_is_saved_anew_is_one_again(run):
    for step in (2, 4):
        run.save(step, write(), keep=3)
    (run.checkpoints / "4" / CHECKPOINT_MANIFEST).unlink()
    with pytest.warns(UserWarning, match="4 is skipped"):
        assert run.newest().name == "2"
    run.save(4, write(), keep=1)
    assert run.steps() == [4] and run.newest().name == "4"


def test_a_torn_checkpoint_further_on_is_no_reason_to_delete_a_whole_one(run):
    run.save(8, write(), keep=1)
    (run.checkpoints / "10").mkdir()
    run.save(9, write(), keep=1)
    assert run.steps() == [9, 10]
    with pytest.warns(UserWarning, match="10 is skipped"):
        assert run.newest().name == "9"


def test_state_survives_with_its_types_and_bits(tmp_path):
    tree = {
        "state": {0: {"step": torch.tensor(3.0), "m": torch.randn(4, 5).to(torch.bfloat16)}},
        "groups": [{"lr": 1e-3, "betas": [0.9, 0.999], "name": None, "fused": True}],
        "n": 7,
    }
    save_state(tmp_path, "trainer", tree)
    back = load_state(tmp_path, "trainer")
    assert (
        torch.equal(back["state"][0]["m"], tree["state"][0]["m"])
        and back["state"][0]["m"].dtype == torch.bfloat16
    )
    assert torch.equal(back["state"][0]["step"], tree["state"][0]["step"])
    assert back["groups"] == tree["groups"] and back["n"] == 7


def test_the_log_rewinds_and_forgives_a_line_cut_short(run):
    for step in (1, 2, 3):
        run.log(step=step, loss=step / 2)
    with open(run.metrics, "a") as file:
        file.write('{"step": 4, "lo')
    for name in ("000002.png", "000003.png", "mine.png"):
        (run.samples / name).touch()
    run.rewind(2)
    assert run.history() == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 1.0}]
    assert sorted(path.name for path in run.samples.iterdir()) == ["000002.png", "mine.png"]


def test_what_was_drawn_is_told_by_step_the_newest_last(run):
    for name in ("999500.png", "1000000.png", "mine.png", "000002.png"):
        (run.samples / name).touch()
    assert [(step, path.name) for step, path in run.sample_files()] == [
        (2, "000002.png"),
        (999500, "999500.png"),
        (1000000, "1000000.png"),
    ]


def test_a_second_process_is_refused_while_the_run_is_held(run):
    code = f"from pipeline.run import Run\nwith Run({str(run.folder)!r}).lock(): pass"
    with run.lock():
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0 and f"is in use by process {os.getpid()}" in done.stderr
    subprocess.run([sys.executable, "-c", code], check=True)  # and free again afterwards


def test_a_file_in_the_way_is_one_clear_error(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(RunError, match="cannot make the run folder"):
        RunFolder(tmp_path / "runs" / "a").create()
    (tmp_path / "b" / ".lock").mkdir(parents=True)
    with (
        pytest.raises(RunError, match="cannot write in the run folder"),
        RunFolder(tmp_path / "b").lock(),
    ):
        pytest.fail("it was locked")


def test_a_file_system_without_locks_is_told_and_used(run, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(folder_module.fcntl, "flock", no_locks)
    with (
        pytest.warns(
            UserWarning, match=r"cannot be locked \(No locks available\): start no second run in it"
        ),
        run.lock(),
    ):
        held = (run.folder / ".lock").read_text()
    assert held == str(os.getpid())


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 143), (signal.SIGHUP, 143)],
)
def test_a_signal_is_a_request_and_the_handlers_are_put_back(number, code):
    own = lambda *_: None
    before = signal.signal(number, own)
    try:
        with StopSignals() as stop:
            assert not stop
            os.kill(os.getpid(), number)
            assert stop and stop.exit_code == code and stop.reason == number.name
        assert signal.getsignal(number) is own
    finally:
        signal.signal(number, before)


def test_a_closed_terminal_is_a_request_to_stop_that_ends_as_one():
    """What is printed after it finds no terminal."""
    code = "\n".join(
        [
            "import sys, time",
            "from pipeline.run import StopRequest",
            "with StopRequest() as stop:",
            " print('up', flush=True)",
            " while not stop: time.sleep(0.01)",
            " print('Stopped', flush=True)",
            " print('said', file=sys.stderr, flush=True)",
            "sys.exit(stop.exit_code)",
        ]
    )
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    assert os.read(ours, 2) == b"up"
    os.close(ours)
    process.send_signal(signal.SIGHUP)
    assert process.wait(20) == 143


def test_what_nohup_has_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_is_told_by_its_name_also_where_the_shell_is_gone(monkeypatch):
    monkeypatch.setattr(StopSignals, "LAUNCHERS", ("NO_SUCH_LAUNCHER_",))
    with StopSignals() as stop:
        stop.parent = -1
        os.kill(os.getpid(), signal.SIGTERM)
        assert (stop.reason, stop.exit_code) == ("SIGTERM", 143)


def test_before_there_is_anything_to_save_a_signal_ends_the_work_at_once():
    with StopSignals() as stop:
        with (
            pytest.raises(Stopped, match=r"^Stopped \(SIGTERM\) before the first step$"),
            stop.raise_on_stop("before the first step"),
        ):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
            pytest.fail("it went on")
        with pytest.raises(Stopped), stop.raise_on_stop("now"):
            pytest.fail("it had been asked before")
        assert stop.exit_code == 143


def test_a_second_ctrl_c_leaves_at_once():
    code = "\n".join(
        [
            "import time",
            "from pipeline.run import StopRequest",
            "with StopRequest() as stop:",
            " print('up', flush=True)",
            " while not stop: time.sleep(0.01)",
            " print(stop.reason, flush=True)",
            " time.sleep(5)",
        ]
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
    ) as process:
        for said in ("up\n", "SIGINT\n"):
            assert process.stdout.readline() == said
            process.send_signal(signal.SIGINT)
        assert process.wait() == 130


@pytest.mark.parametrize("launched", [True, False])
def test_a_vanished_launcher_is_a_request_to_stop_and_a_vanished_shell_is_none(launched):
    child = "\n".join(
        [
            "import time",
            "from pipeline.run import StopRequest",
            "end = time.time() + 2.5",
            "with StopRequest() as stop:",
            " print('up', flush=True)",
            " while not stop and time.time() < end: time.sleep(0.05)",
            " print(stop.reason, stop.exit_code, flush=True)",
        ]
    )
    launcher = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}]); sys.stdin.readline()"
    env = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(StopSignals.LAUNCHERS)
    }
    env |= {"ACCELERATE_MIXED_PRECISION": "no"} if launched else {}
    process = subprocess.Popen(
        [sys.executable, "-c", launcher],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=env,
    )
    assert process.stdout.readline() == "up\n"
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline() == ("the launcher is gone 143\n" if launched else " 0\n")


def test_verify_says_which_file(run):
    folder = run.save(1, write(), keep=1)
    assert verify_checkpoint(folder) == ""
    (folder / "unet" / "w.bin").write_text("other!!")
    assert verify_checkpoint(folder) == "unet/w.bin is not what was written"
