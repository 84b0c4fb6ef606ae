"""The script's command line: bad input, the dry run, and how it sets up the machine."""

import os
import platform
import re
import subprocess
from types import SimpleNamespace

import pytest
import torch
from training_runs import arguments, check_refused, command, page_faults, train

import train_text2img
from pipeline.config import ConfigError
from pipeline.training import distributed
from pipeline.training.dry_run import describe_run


@pytest.mark.parametrize(
    ("more", "values"),
    [
        (["--train.lrr", "1"], ["'train.lrr'", "'train.lr'"]),
        (["--data.source", "nowhere"], ["nowhere"]),
        (["--train.lr", "-1", "--train.steps", "0"], ["train.steps", "train.lr", "got 0"]),
        (["--report_to", "tensorbord"], ["'tensorbord'", "tensorboard"]),
        (["--report_to", "all"], ["'all'", "tensorboard"]),
        (["--report_to", "wandb"], ["pip install wandb"]),
        (["--name", ".."], ["'..'"]),
        (
            ["--data.caption_length", "17", "--data.source", "nowhere"],
            ["data.caption_length must be at most 16", "17"],
        ),
        (
            ["--model.text_encoder", "nowhere/at-all", "--data.source", "nowhere"],
            ["nowhere/at-all"],
        ),
        (["--train.precision", "fp16"], ["train.precision", "fp16"]),
    ],
)
def test_main_reports_bad_input_with_exit_code_2(config, tmp_path, more, values):
    check_refused(train(config, tmp_path / "bad", *more, check=False), *values)


@pytest.mark.slow
def test_script_exits_with_2_on_bad_input(config, tmp_path):
    argv = command(config, tmp_path, "--train.lrr", "1")
    done = subprocess.run(argv, capture_output=True, text=True)
    check_refused(done, "'train.lrr'")
    assert done.stderr.count("\n") == 1


def test_dry_run_prints_the_plan_and_saves_nothing(config, tmp_path):
    """With the embedded text encoder, as `make train` uses it."""
    more = ("--dry_run", "--model.text_encoder", "minilm")
    done = train(config, tmp_path / "dry", *more)
    assert "weights to train" in done.stdout
    pattern = r"6 steps of 4 images, [\d.]+ s each: about ([\d.]+) minutes \(([\d.]+) to ([\d.]+)"
    (found,) = re.findall(pattern, done.stdout)
    about, low, high = map(float, found)
    assert low <= about <= high
    assert not (tmp_path / "dry").exists()


def test_describe_run_gives_the_spread_of_the_steps():
    """A step of 1 s among steps of 3 s, in 60 steps."""
    train = SimpleNamespace(steps=60, batch_size=4)
    config = SimpleNamespace(train=train, to_yaml=str)
    task = SimpleNamespace(images=SimpleNamespace(report="60 images"))
    trainer = SimpleNamespace(config=config, task=task, weights=[])
    text = describe_run(trainer, [3.0, 1.0, 3.0])
    assert "about 3.0 minutes (1.0 to 3.0" in text


def test_set_threads_uses_every_core(config, tmp_path, monkeypatch):
    """`accelerate launch` exports OMP_NUM_THREADS=1 on a CPU; the script undoes that."""
    used = []

    def print_plan(*_):
        used.append(torch.get_num_threads())
        return 0

    monkeypatch.setattr(train_text2img, "print_plan", print_plan)
    torch.set_num_threads(1)
    done = train(config, tmp_path, "--dry_run", "--train.threads", "null")
    assert used == [len(os.sched_getaffinity(0))]
    assert f"{used[0]} CPU threads each" in done.stdout


@pytest.mark.parametrize("flag", ["true", "false"])
def test_start_accelerator_uses_the_cpu_on_request(flag, config, tmp_path, monkeypatch):
    def state(cpu, timeout):
        raise ConfigError(f"cpu {cpu}")

    monkeypatch.setenv("ACCELERATE_USE_CPU", flag)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(distributed, "PartialState", state)
    check_refused(train(config, tmp_path, check=False), f"cpu {flag == 'true'}")


@pytest.mark.parametrize(("launcher", "reported"), [("fp16", True), ("bf16", False), ("no", False)])
def test_start_accelerator_reports_an_ignored_precision(
    launcher, reported, config, tmp_path, monkeypatch
):
    """`accelerate launch` exports its --mixed_precision; train.precision decides."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launcher)
    done = train(config, tmp_path, "--train.precision", "bf16", "--dry_run")
    assert "mixed precision: bf16" in done.stdout
    assert ("--mixed_precision fp16" in done.stdout) == reported


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc's malloc")
def test_keep_freed_memory_avoids_page_faults(config, started, tmp_path):
    counts = []
    for argv in (arguments(config, tmp_path, "--dry_run"), None):
        process, output = started(page_faults, argv)
        process.join(60)
        counts.append(int(output.read_text()))
    assert counts[0] < 1000 < counts[1]
