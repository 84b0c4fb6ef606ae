"""Tiny training runs: the script's main in this process or in others, and what it leaves."""

import contextlib
import io
import itertools
import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file
from tiny import tiny_text
from torch.distributed.elastic.utils.distributed import get_free_port

import train_text2img
from pipeline.training.dry_run import StepTimer
from pipeline.training.task import TrainingTask

ROOT = Path(__file__).parents[2]
UNET_FILE = Path("unet", "diffusion_pytorch_model.safetensors")
TINY = """
name: tiny
data: {source: SOURCE, held_out: HELD, resolution: 16, cache: CACHE}
model: {patch_size: 2, channels: [32, 32], attention: [false, true], heads: 4, whitening: 0.02,
        time_embedding_dim: 48, text_encoder: ENCODER}
diffusion: {prediction_type: sample, num_train_timesteps: 100, beta_end: 0.2}
train: {steps: 6, batch_size: 4, lr: 1e-3, lr_schedule: flat_then_linear, weighting: min_velocity,
        gamma: 5, log_every: 1, validate_every: 3, save_every: 2, keep: 9, threads: 1}
sample: {prompts: [red, blue], w: [0, 1], steps: 2, every: 4}
"""
COLOURS = [
    *("red", "green", "blue", "white", "black", "grey"),
    *("pink", "brown", "orange", "purple", "yellow", "cyan"),
]
MEASURED = ("loss", "grad_norm", "train_loss", "held_out_loss")


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    """A text encoder of random weights for the captions of these tests; MiniLM has 90 MB."""
    folder = tmp_path_factory.mktemp("encoder")
    for part in tiny_text(length=16, words=(*COLOURS, "square", *map(str, range(12))), width=64):
        part.save_pretrained(folder)
    return folder


def write_images(folder, colours, step, edge=0, held_out=()):
    """Write plain squares with an optional black left edge, captions as file names."""
    for i, colour in enumerate(colours):
        split = folder / ("test" if colour in held_out else "train")
        split.mkdir(exist_ok=True)
        pixels = np.full((16, 16, 3), (step * i, 255 - step * i, 128), np.uint8)
        pixels[:, :edge] = 0
        Image.fromarray(pixels).save(split / f"{colour}.png")
    return folder


def write_config(folder, images, encoder):
    """Write the settings of these tests to a folder, which holds their cache too."""
    values = {"SOURCE": images, "HELD": "test", "ENCODER": encoder, "CACHE": folder / "cache"}
    return write_template(folder / "tiny.yaml", TINY, values)


def write_template(path, text, values):
    """Write a text with values in the place of their names."""
    for name, value in values.items():
        text = text.replace(name, str(value))
    path.write_text(text)
    return path


# ---- running the script


def arguments(config, out, *more):
    return ["--config", str(config), "--output", str(out), *more]


def command(config, out, *more):
    return [sys.executable, str(ROOT / "train_text2img.py"), *arguments(config, out, *more)]


def train(config, out, *more, check=True):
    """Run the script's main in this process; return its exit code and output."""
    stdout, stderr, threads = io.StringIO(), io.StringIO(), torch.get_num_threads()
    try:
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            code = train_text2img.main(arguments(config, out, *more))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        torch.set_num_threads(threads)
    done = subprocess.CompletedProcess(more, code, stdout.getvalue(), stderr.getvalue())
    assert not check or code == 0, done.stdout + done.stderr
    return done


def check_refused(done, *values, code=2):
    """Check that a run ended in an error that names all values, without a traceback."""
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    for value in values:
        assert str(value) in done.stderr


def wait_for(condition, seconds=60, every=0.01):
    """Poll until `condition()` is true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(every)


def run_script(output, argv):
    """Run the script's main until this process exits, with its output in a file."""
    with (
        open(output, "w", encoding="utf-8") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        sys.exit(train_text2img.main(argv))


@pytest.fixture(scope="session")
def started(tmp_path_factory):
    """Start functions in processes forked from one that has imported this module, which takes 10 s.

    A function's first argument is the file for its output, which is returned beside the process.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training_runs"])
    folder, numbers = tmp_path_factory.mktemp("output"), itertools.count()

    def start(function, argv):
        output = folder / str(next(numbers))
        process = context.Process(target=function, args=(output, argv))
        process.start()
        return process, output

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests/support")]))
        yield start


def run_rank(output, job):
    """Run the script in a folder as one of several ranks, as a launcher starts them."""
    rank, world, port, folder, argv = job
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.chdir(folder)
    run_script(output, argv)


def run_ranks(started, *jobs, function=run_rank):
    """Return exit code and output of ranks, each (folder, argv).

    When one fails, the others have two seconds, as launchers give them.
    """
    port = get_free_port()
    ranks = [
        started(function, (rank, len(jobs), port, folder, argv))
        for rank, (folder, argv) in enumerate(jobs)
    ]
    processes = [process for process, _ in ranks]
    wait_for(lambda: any(p.exitcode for p in processes) or not any(p.is_alive() for p in processes))
    for process in processes:
        process.join(2)
        process.kill()
        process.join()
    return [(process.exitcode, output.read_text()) for process, output in ranks]


# ---- the loop without a run


class Recorder(StepTimer):
    """A monitor that remembers the result of each step."""

    def __init__(self):
        super().__init__()
        self.results = []

    def after_step(self, result):
        self.results.append(result)


def take_step(trainer):
    """Return the result of the trainer's next step."""
    recorder = Recorder()
    train_text2img.training_loop(trainer, recorder, trainer.global_step + 1)
    return recorder.results[0]


def first_losses(task):
    """Return the losses (B,) of the loop's first step, which changes no weight."""
    recorded = []
    trainer = SimpleNamespace(
        accelerator=Accelerator(cpu=True),
        task=task,
        network=task.unet,
        global_step=0,
        record=lambda batch, losses: recorded.append(losses.detach()),
        optimizer_step=lambda: None,
    )
    train_text2img.training_loop(trainer, StepTimer(), 1)
    return torch.cat(recorded)


class Broken:
    """Make the loss of chosen (step, slot) nan, as a corrupt image or an overflow does."""

    def __init__(self, monkeypatch, is_broken):
        real = TrainingTask.loss

        def loss(task, prediction, batch, eps, t):
            losses = real(task, prediction, batch, eps, t)
            bad = torch.tensor([is_broken(batch.step, int(slot)) for slot in batch.slots])
            return losses * torch.where(bad, torch.nan, 1.0)

        monkeypatch.setattr(TrainingTask, "loss", loss)


# Functions of other processes must be importable there.


def is_unlucky(step, slot):
    """Whose loss is nan: the second rank's first example of the seventh step."""
    return step == 6 and slot == 1


def run_unlucky_rank(output, job):
    """Run a rank, `is_unlucky`, in this process alone, which ends with it."""
    Broken(pytest.MonkeyPatch(), is_unlucky)
    run_rank(output, job)


def page_faults(output, argv):
    """Write how often freed memory is fetched again, after a dry run or without one."""
    assert argv is None or train_text2img.main(argv) == 0
    for tensors in (3, 5):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(tensors):
            torch.ones(2**24)
    output.write_text(str(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before))


# ---- what a run leaves


def weights(run):
    return load_file(run / "pipeline" / UNET_FILE)


def checkpoint_weights(run, step):
    return load_file(run / "checkpoints" / str(step) / UNET_FILE)


def same(a, b):
    return a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)


def log(run):
    keys = ("step", "lr", *MEASURED)
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{key: record[key] for key in keys if key in record} for record in lines]


def alike(a, b):
    """Return whether log lines are of one step and rate and measure the same up to rounding."""
    if a.keys() != b.keys() or (a["step"], a.get("lr")) != (b["step"], b.get("lr")):
        return False
    measured = [key for key in MEASURED if key in a]
    return all(a[key] == b[key] or a[key] == pytest.approx(b[key], rel=5e-3) for key in measured)


def file_contents(folder):
    """Return the bytes of all files in a folder, except a run's lock."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {path: path.read_bytes() for path in files}


def killed_after(step, finished, out):
    """Copy a finished run to a folder, as a kill after the checkpoint of a step would leave it."""
    run = out / finished.name
    shutil.copytree(finished, run)
    (run / "README.md").unlink()
    for result in ("pipeline", "lora"):
        shutil.rmtree(run / result, ignore_errors=True)
    for later in (run / "checkpoints").iterdir():
        if int(later.name) > step:
            shutil.rmtree(later)
    return run
