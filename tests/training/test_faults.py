"""Nothing is lost to kills, corrupt files, full disks or losses that are not finite."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from tqdm.auto import tqdm
from training_runs import (
    UNET_FILE,
    Broken,
    arguments,
    check_refused,
    log,
    run_script,
    same,
    train,
    wait_for,
    weights,
)

from pipeline import randomness
from pipeline.config import load_file
from pipeline.data import dataset, sampler
from pipeline.hub import figures
from pipeline.runs import checkpoints
from pipeline.runs.folder import RunFolder
from pipeline.runs.state_files import load_state
from pipeline.training.task import TrainingTask
from pipeline.training.trainer import Trainer

KILLS = int(os.environ.get("KILLS", "3"))  # 25 for the whole loop
# A run that is nearly always in a save.
SAVING = (
    *("--train.save_every", "1", "--train.validate_every", "6", "--sample.every", "12"),
    *("--train.keep", "2", "--train.steps", "36" if KILLS > 3 else "12"),
)


@pytest.mark.slow
def test_killed_runs_end_in_the_same_bytes(config, started, tmp_path):
    """Case 1: SIGKILL at random moments, during saves too; the same command resumes each time."""
    train(config, tmp_path / "alone", *SAVING)
    moments, kills, out = random.Random(0), 0, tmp_path / "killed"
    run, alone = out / "tiny", tmp_path / "alone" / "tiny"
    metrics = run / "metrics.jsonl"

    def logged_lines():
        return metrics.read_text().count("\n") if metrics.exists() else 0

    while kills < KILLS:
        lines = logged_lines()
        process, output = started(run_script, arguments(config, out, *SAVING))
        wait_for(lambda: not process.is_alive() or logged_lines() > lines)
        time.sleep(moments.random() * 0.1)
        process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            kills += 1
            continue
        # It had finished: start again, so that every kill hits a run at work.
        assert process.exitcode == 0, output.read_text()
        assert same(weights(run), weights(alone))
        shutil.rmtree(out)
    train(config, out, *SAVING)
    assert same(weights(run), weights(alone))
    assert log(run) == log(alone)
    assert not list((run / "checkpoints").glob(".tmp-*"))


def test_newest_skips_a_checkpoint_corrupt_in_any_file(finished, tmp_path):
    """Cases 10 and 11: each file truncated, emptied and deleted in turn."""
    run = tmp_path / "tiny"
    shutil.copytree(finished[0], run)
    files = [path for path in sorted((run / "checkpoints" / "6").rglob("*")) if path.is_file()]
    expected = {"manifest.json", "trainer.safetensors", "trainer.json", "config.json"}
    assert expected <= {path.name for path in files}
    for file in files:
        content = file.read_bytes()
        for damaged in (content[: len(content) // 2], b"", None):
            if damaged is None:
                file.unlink()
            else:
                file.write_bytes(damaged)
            with pytest.warns(UserWarning, match="checkpoints/6"):
                assert RunFolder(run).newest().name == "4", file
            file.write_bytes(content)
    assert RunFolder(run).newest().name == "6"


def test_resume_skips_a_corrupt_checkpoint(finished, tmp_path):
    run = tmp_path / "tiny"
    shutil.copytree(finished[0], run)
    shutil.rmtree(run / "pipeline")
    (run / "checkpoints" / "6" / "trainer.safetensors").write_bytes(b"corrupt")
    with pytest.warns(UserWarning, match="checkpoints/6"):
        done = train(run / "config.yaml", tmp_path)
    assert "resuming from step 4" in done.stdout
    assert same(weights(run), weights(finished[0]))


def test_finish_repeats_after_a_kill(finished, tmp_path):
    """The card is written last: without it a run is not finished, whatever else is there."""
    run = tmp_path / "tiny"
    shutil.copytree(finished[0], run)
    (run / "README.md").unlink()
    (run / "pipeline" / UNET_FILE).write_bytes(b"corrupt")
    train(run / "config.yaml", tmp_path)
    assert (run / "README.md").exists()
    assert same(weights(run), weights(finished[0]))


# ---- losses that are not finite


def test_report_skipped_step_names_its_examples(config, tmp_path, monkeypatch):
    """Case 16: the log counts them; the other steps are taken."""
    bad = [1, 3]
    Broken(monkeypatch, lambda step, slot: step == 2 and slot in bad)
    done = train(config, tmp_path, "--train.lr_schedule", "constant")
    images, _ = dataset.load_splits(load_file(config).data)
    rows = sampler.batch_indices(0, 2, 4, len(images)).tolist()
    t = randomness.timesteps(0, 2, torch.arange(4), 4, 100).tolist()
    names = [images.metadata[rows[slot]]["file_name"] for slot in bad]
    named = "; ".join(f"{name} at t = {t[slot]}" for name, slot in zip(names, bad, strict=True))
    reports = [line for line in done.stdout.splitlines() if "is skipped" in line]
    assert len(reports) == 1
    assert "step 3" in reports[0]
    assert reports[0].endswith(named)
    run = tmp_path / "tiny"
    losses = [line["loss"] for line in log(run) if "loss" in line]
    assert [loss is None for loss in losses] == [False, False, True, False, False, False]
    assert all(value.isfinite().all() for value in weights(run).values())
    files = [run / "checkpoints" / step / UNET_FILE for step in ("2", "4")]
    assert files[0].read_bytes() != files[1].read_bytes()
    lines = (run / "metrics.jsonl").read_text().splitlines()
    last = [line for line in lines if '"skipped"' in line][-1]
    assert json.loads(last)["skipped"] == 1
    assert "NaN" not in last


def test_skipped_step_changes_no_state(config, tmp_path, monkeypatch):
    """Neither weights nor their average nor the optimizer's moments."""
    Broken(monkeypatch, lambda step, slot: step >= 2)
    done = train(config, tmp_path, "--train.max_skipped", "99")
    assert done.stdout.count("is skipped") == 4
    saved = [tmp_path / "tiny" / "checkpoints" / step for step in ("2", "4", "6")]
    assert len({(folder / UNET_FILE).read_bytes() for folder in saved}) == 1
    first, *later = [load_state(folder, "trainer") for folder in saved]

    def tensors(state):
        moments = state["optimizer"]["state"].values()
        return state["ema"]["shadow_params"] + [v for each in moments for v in each.values()]

    assert len(tensors(first)) > len(first["ema"]["shadow_params"])
    for state in later:
        pairs = zip(tensors(first), tensors(state), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_too_many_skipped_steps_end_the_run(config, tmp_path, monkeypatch):
    Broken(monkeypatch, lambda step, slot: step >= 3)
    done = train(config, tmp_path, "--train.max_skipped", "2", check=False)
    check_refused(done, "2 steps in a row", "step 5", "train.lr (now 0.001)", code=1)
    assert RunFolder(tmp_path / "tiny").newest().name == "4"


def test_validation_of_nan_replaces_no_result(config, tmp_path, monkeypatch):
    """The same command again ends in the same way."""
    train(config, tmp_path, "--train.steps", "2")
    run = RunFolder(tmp_path / "tiny")
    before, real = weights(run.folder), Trainer.optimizer_step

    def step(trainer):
        trainer.ema.shadow_params[0].fill_(torch.nan)
        return real(trainer)

    monkeypatch.setattr(Trainer, "optimizer_step", step)
    for _ in range(2):
        done = train(config, tmp_path, check=False)
        check_refused(done, "step 6", "train.lr (now 0.001)", code=1)
        assert same(weights(run.folder), before)
        assert not run.finished
    assert "NaN" not in run.metrics.read_text()


def test_exploded_run_of_a_few_steps_ends_as_diverged(config, tmp_path):
    """Fewer bad steps than train.max_skipped, whose weights are finite."""
    more = ("--train.lr", "1e30", "--train.lr_schedule", "constant", "--train.steps", "5")
    done = train(config, tmp_path, *more, check=False)
    check_refused(done, "step 5", "train.lr (now 1e+30)", code=1)
    assert not RunFolder(tmp_path / "tiny").has_model


def test_finish_survives_a_figure_that_fails(config, tmp_path, monkeypatch):
    messages = []

    def fail(*_args, **_more):
        raise ValueError("Axis limits cannot be NaN or Inf")

    monkeypatch.setattr(figures, "irreducible_loss", fail)
    monkeypatch.setattr(tqdm, "write", messages.append)
    train(config, tmp_path, "--train.steps", "1")
    (message,) = messages
    assert "training.png" in message
    assert "Axis limits" in message
    assert RunFolder(tmp_path / "tiny").finished


# ---- memory and disks


def test_train_out_of_memory_is_resumable(config, tmp_path, monkeypatch):
    real = TrainingTask.loss

    def full(task, prediction, batch, eps, t):
        if batch.step == 3 and task.config.train.accumulation == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")
        return real(task, prediction, batch, eps, t)

    monkeypatch.setattr(TrainingTask, "loss", full)
    done = train(config, tmp_path, check=False)
    check_refused(done, "train.accumulation", "9 GiB", code=1)
    assert len([line for line in done.stderr.splitlines() if line.startswith("error: ")]) == 1
    train(config, tmp_path, "--train.accumulation", "2")
    assert RunFolder(tmp_path / "tiny").finished


def test_save_on_a_full_disk_is_resumable(config, tmp_path, monkeypatch):
    """Case 14, by a save that the system refuses."""
    real = checkpoints.sync_to_disk

    def sync(path):
        if path.name == "trainer.safetensors" and ".tmp-4" in str(path):
            raise OSError(28, "No space left on device")
        real(path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "sync_to_disk", sync)
        done = train(config, tmp_path, check=False)
    check_refused(done, "No space left on device", "[2]", code=1)
    assert "resuming from step 2" in train(config, tmp_path).stdout


@pytest.mark.parametrize("line", ["loss", "train_loss"])
def test_main_reports_a_full_disk(line, config, tmp_path, monkeypatch):
    """A truncated line of the log is the last one: the run must not continue after it."""
    real = RunFolder.log

    def full(self, **record):
        if line in record:
            raise OSError(28, "No space left on device", str(self.metrics))
        real(self, **record)

    monkeypatch.setattr(RunFolder, "log", full)
    done = train(config, tmp_path, check=False)
    metrics = tmp_path / "tiny" / "metrics.jsonl"
    check_refused(done, metrics, "No space left on device", code=1)


def test_main_raises_other_file_errors(config, tmp_path, monkeypatch):
    """A missing file is a bug, whose traceback is needed."""
    missing = Path("/no/such/file")
    monkeypatch.setattr(RunFolder, "log", lambda *_args, **_record: missing.read_text())
    with pytest.raises(FileNotFoundError):
        train(config, tmp_path, check=False)
