"""Requests to stop end every phase of a run, and nothing is lost."""

import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from training_runs import (
    arguments,
    killed_after,
    log,
    run_script,
    same,
    train,
    wait_for,
    weights,
)

import train_text2img
from pipeline.runs.folder import RunFolder
from pipeline.runs.stop_signals import StopSignals
from pipeline.training import monitor
from pipeline.training.distributed import any_rank_stopped

RARELY = (
    *("--train.save_every", "5000", "--train.validate_every", "5000", "--sample.every", "5000"),
    *("--train.lr_schedule", "constant"),
)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_saves_a_checkpoint_that_resumes(finished, started, tmp_path, number, code):
    """Stopped somewhere in 2000 steps, then run two steps more: as if never stopped."""
    config, run = finished[0] / "config.yaml", tmp_path / "tiny"
    argv = arguments(config, tmp_path, *RARELY, "--train.steps", "2000")
    process, output = started(run_script, argv)
    metrics = run / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text(), seconds=120)
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == code, output.read_text()
    (step,) = (int(path.name) for path in (run / "checkpoints").iterdir())
    assert f"Stopped ({number.name}) after step {step} of 2000" in output.read_text()
    assert "Traceback" not in output.read_text()
    assert not (run / "pipeline").exists()
    longer = (*RARELY, "--train.steps", str(step + 2))
    assert f"resuming from step {step}" in train(config, tmp_path, *longer).stdout
    train(config, tmp_path / "through", *longer)
    assert same(weights(run), weights(tmp_path / "through" / "tiny"))


@pytest.mark.parametrize("validation", [1, 2])
def test_resume_repeats_interrupted_validation_and_samples(
    finished, tmp_path, monkeypatch, validation
):
    """After step 3, and after the last one, where nothing else is left to do."""
    real, calls = monitor.validate, []

    def validate(*arguments):
        calls.append(1)
        if len(calls) == validation:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    monkeypatch.setattr(monitor, "validate", validate)
    config, run = finished[0] / "config.yaml", tmp_path / "tiny"
    done = train(config, tmp_path, check=False)
    assert done.returncode == 143
    assert f"Stopped (SIGTERM) after step {3 * validation} of 6" in done.stdout
    train(config, tmp_path)
    assert log(run) == log(finished[0])
    assert same(weights(run), weights(finished[0]))
    samples = [
        {path.name: path.read_bytes() for path in (folder / "samples").iterdir()}
        for folder in (run, finished[0])
    ]
    assert samples[0] == samples[1]


@pytest.mark.parametrize(("other", "stops"), [(0, False), (143, True)])
def test_any_rank_stopped_is_the_same_on_every_rank(other, stops):
    """A signal during the exchange counts for all at the next step, or some would continue."""
    stop = StopSignals()

    def gather(mine):
        if not other:
            stop.handle(signal.SIGTERM, None)
        return torch.cat([mine, torch.tensor([other])])

    two = SimpleNamespace(num_processes=2, device="cpu", gather=gather)
    assert any_rank_stopped(stop, two) == stops
    assert stop.exit_code == 143
    assert any_rank_stopped(stop, SimpleNamespace(num_processes=1))


@pytest.mark.parametrize(
    ("function", "when"),
    [("plot_strips", "after the last step"), ("publish", "before the model was pushed")],
)
def test_stop_ends_finish_and_publish(finished, tmp_path, monkeypatch, function, when):
    def stopped(*_args, **_options):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    run = killed_after(6, finished[0], tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(train_text2img, function, stopped)
        done = train(finished[0] / "config.yaml", tmp_path, check=False)
    assert done.returncode == 143
    assert f"Stopped (SIGTERM) {when}" in done.stdout
    assert RunFolder(run).finished == (function == "publish")
    train(finished[0] / "config.yaml", tmp_path)
    assert RunFolder(run).finished
    assert same(weights(run), weights(finished[0]))
