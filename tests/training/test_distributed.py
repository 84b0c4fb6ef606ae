"""Several ranks learn what one learns, agree on everything, and end together."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from PIL import Image
from training_runs import (
    ROOT,
    Broken,
    alike,
    arguments,
    command,
    is_unlucky,
    killed_after,
    log,
    run_ranks,
    run_unlucky_rank,
    same,
    train,
    wait_for,
    weights,
    write_config,
)

from pipeline.runs.folder import RunFolder

ENDLESS = (
    *("--train.steps", "100000", "--train.validate_every", "100000", "--sample.every", "100000"),
)
QUIET = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


@pytest.mark.slow
def test_killed_launcher_leaves_no_orphan(config, tmp_path):
    """Case 4: no signal reaches the training process; it notices, saves and ends within 10 s."""
    script = command(config, tmp_path, *ENDLESS, "--train.save_every", "100000")[1:]
    accelerate = str(Path(sys.executable).with_name("accelerate"))
    launcher = subprocess.Popen([accelerate, "launch", "--cpu", *script], cwd=ROOT, **QUIET)
    metrics = tmp_path / "tiny" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text())
    children = psutil.Process(launcher.pid).children(recursive=True)
    assert children
    launcher.kill()
    launcher.wait()
    gone, alive = psutil.wait_procs(children, timeout=10)
    assert gone
    assert not alive
    assert RunFolder(tmp_path / "tiny").newest() is not None


@pytest.mark.slow
def test_dead_rank_ends_the_other(config, tmp_path):
    """Case 21."""
    script = command(config, tmp_path, *ENDLESS, "--train.save_every", "5")[1:]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher = subprocess.Popen(
        [*torchrun, "--nproc_per_node", "2", *script],
        cwd=ROOT,
        env={**os.environ, "ACCELERATE_USE_CPU": "true"},
        **QUIET,
    )
    metrics = tmp_path / "tiny" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") > 7)
    children = psutil.Process(launcher.pid).children(recursive=True)
    ranks = [child for child in children if "train_text2img.py" in " ".join(child.cmdline())]
    assert len(ranks) == 2
    ranks[1].kill()
    assert launcher.wait(timeout=60) != 0
    for rank in ranks:
        assert not rank.is_running() or rank.status() == psutil.STATUS_ZOMBIE
    assert RunFolder(tmp_path / "tiny").newest() is not None


@pytest.mark.slow
def test_two_ranks_resume_in_the_same_bytes(config, started, tmp_path):
    """Each with its own losses since the last log line, of one step where the run is killed."""
    more = ("--train.precision", "no", "--train.log_every", "3")
    whole, resumed = tmp_path / "whole" / "tiny", tmp_path / "tiny"
    for run in (whole, resumed):
        if run == resumed:
            killed_after(4, whole, tmp_path)
        done = run_ranks(started, *[(ROOT, arguments(config, run.parent, *more))] * 2)
        assert [code for code, _ in done] == [0, 0], done
    assert "resuming from step 4" in done[0][1]
    assert "now there are" not in done[0][1]
    assert same(weights(whole), weights(resumed))
    assert log(whole) == log(resumed)


def test_check_data_refuses_ranks_with_other_images(config, images, started, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(images, other)
    Image.new("RGB", (16, 16), "white").save(other / "train" / "red.png")
    elsewhere = ("--data.source", str(other), "--data.cache", str(tmp_path / "other cache"))
    jobs = [(ROOT, arguments(config, tmp_path, *more)) for more in ((), elsewhere)]
    for (code, output), source in zip(run_ranks(started, *jobs), (images, other), strict=True):
        assert code == 2
        assert f"error: The processes read different images or captions in {source}" in output
        assert "Traceback" not in output
    assert not list((tmp_path / "tiny" / "checkpoints").iterdir())


def test_find_start_refuses_a_rank_without_the_run_folder(finished, started, tmp_path):
    """Two machines without a shared disk: the second one's `output` has no checkpoint."""
    second = tmp_path / "second"
    second.mkdir()
    killed_after(4, finished[0], tmp_path)
    argv = arguments(finished[0] / "config.yaml", ".")
    code, output = run_ranks(started, (tmp_path, argv), (second, argv))[1]
    assert code == 2
    assert "error: Process 1 does not see tiny/checkpoints/4" in output
    assert "Traceback" not in output


@pytest.fixture(scope="module")
def two_and_one(images, encoder, started, tmp_path_factory):
    """Eight unlucky steps on two ranks and on one: the output of the ranks, and both logs."""
    folder = tmp_path_factory.mktemp("ranks")
    more = ("--train.precision", "no", "--train.steps", "8")
    config = write_config(folder, images, encoder)
    jobs = [(ROOT, arguments(config, folder, *more))] * 2
    done = run_ranks(started, *jobs, function=run_unlucky_rank)
    assert [code for code, _ in done] == [0, 0], done
    with pytest.MonkeyPatch.context() as patch:
        Broken(patch, is_unlucky)
        train(config, folder / "one", *more)
    output = "".join(output for _, output in done)
    return output, log(folder / "tiny"), log(folder / "one" / "tiny")


@pytest.mark.slow
def test_two_ranks_learn_what_one_learns(two_and_one):
    output, two, one = two_and_one
    assert "2 process(es)" in output
    before = [(a, b) for a, b in zip(two, one, strict=True) if a["step"] < 7]
    assert [a["step"] for a, _ in before] == [1, 2, 3, 3, 4, 5, 6, 6]
    assert all(alike(a, b) for a, b in before)


@pytest.mark.slow
def test_two_ranks_skip_the_same_step(two_and_one):
    """Case 16 on two ranks: slot 1 is the second's alone, its nan stops both."""
    output, two, one = two_and_one
    assert output.count("step 7 is skipped: ") == 1

    def line(lines, step):
        return next(line for line in lines if line["step"] == step and "loss" in line)

    for lines in (two, one):
        assert line(lines, 7)["grad_norm"] is None
    assert alike(line(two, 8), line(one, 8))
