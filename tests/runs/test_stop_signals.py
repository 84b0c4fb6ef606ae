"""Requests to stop: signals, terminals and launchers."""

import os
import signal
import subprocess
import sys
import time

import pytest

from pipeline.runs.stop_signals import Stopped, StopSignals


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 143), (signal.SIGHUP, 143)],
)
def test_stop_signals_record_and_restore_handlers(number, code):

    def own(*_):
        pass

    before = signal.signal(number, own)
    try:
        with StopSignals() as stop:
            assert not stop
            os.kill(os.getpid(), number)
            assert stop and stop.exit_code == code and stop.reason == number.name
        assert signal.getsignal(number) is own
    finally:
        signal.signal(number, before)


def test_stop_signals_survive_a_closed_terminal():
    """What is printed after it finds no terminal."""
    code = "\n".join(
        [
            "import sys, time",
            "from pipeline.runs.stop_signals import StopSignals",
            "with StopSignals() as stop:",
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


def test_stop_signals_ignore_sighup_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_stop_signals_name_the_signal_after_the_shell_exits(monkeypatch):
    monkeypatch.setattr(StopSignals, "LAUNCHERS", ("NO_SUCH_LAUNCHER_",))
    with StopSignals() as stop:
        stop.parent = -1
        os.kill(os.getpid(), signal.SIGTERM)
        assert (stop.reason, stop.exit_code) == ("SIGTERM", 143)


def test_raise_on_stop_ends_work_at_once():
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


def test_stop_signals_exit_on_a_second_interrupt():
    code = "\n".join(
        [
            "import time",
            "from pipeline.runs.stop_signals import StopSignals",
            "with StopSignals() as stop:",
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
def test_stop_signals_notice_a_dead_launcher(launched):
    child = "\n".join(
        [
            "import time",
            "from pipeline.runs.stop_signals import StopSignals",
            "end = time.time() + 2.5",
            "with StopSignals() as stop:",
            " print('up', flush=True)",
            " while not stop and time.time() < end: time.sleep(0.05)",
            " print(stop.reason, stop.exit_code, flush=True)",
        ]
    )
    launcher = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}]); "
    launcher += "sys.stdin.readline()"
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
