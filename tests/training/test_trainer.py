"""A trainer's step and the state that a checkpoint saves."""

import itertools
import math
import time
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from training_runs import (
    checkpoint_weights,
    killed_after,
    log,
    take_step,
    train,
)

from pipeline.config import load_file
from pipeline.runs.state_files import load_state, save_state
from pipeline.training.distributed import for_this_rank
from pipeline.training.task import TrainingTask
from pipeline.training.trainer import Trainer


@pytest.fixture
def trainer(config, accelerator):
    """The network of these tests in training, without a run."""
    chosen = load_file(config)
    return Trainer(chosen, accelerator, TrainingTask.build(chosen, torch.device("cpu")))


def test_resume_from_checkpoint_with_single_rank_losses(trainer, tmp_path):
    take_step(trainer)
    state = trainer.state_dict()
    state["state"]["losses"] = state.pop("losses")[0]
    save_state(tmp_path, "trainer", state)
    losses, trainer.losses = trainer.losses, []
    trainer.resume(tmp_path)
    assert trainer.losses == losses
    assert len(losses) == 1
    assert trainer.global_step == 1


def test_resume_restores_counters_and_time(trainer, tmp_path):
    """Steps, skipped ones, those in a row that `train.max_skipped` limits, and earlier hours."""
    trainer.global_step, trainer.skipped, trainer.consecutive_skips = 7, 3, 2
    trainer.start_time -= 1000
    save_state(tmp_path, "trainer", trainer.state_dict())
    trainer.global_step, trainer.skipped, trainer.consecutive_skips = 0, 0, 0
    trainer.start_time = time.monotonic()
    trainer.resume(tmp_path)
    assert (trainer.global_step, trainer.skipped, trainer.consecutive_skips) == (7, 3, 2)
    assert 1000 < trainer.seconds < 1060


def test_optimizer_step_lowers_the_scale_on_overflow(config, accelerator, monkeypatch):
    """By torch's own scaler on a CPU in float32; accelerate is told that it is half precision."""
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    chosen = load_file(config)
    trainer = Trainer(chosen, accelerator, TrainingTask.build(chosen, torch.device("cpu")))
    accelerator.native_amp = True
    monkeypatch.setattr(Accelerator, "mixed_precision", "fp16")
    real = TrainingTask.loss

    def loss(task, *arguments):
        return real(task, *arguments) * (math.inf if trainer.global_step == 1 else 1)

    monkeypatch.setattr(TrainingTask, "loss", loss)
    finite, scales, weights = [], [], []
    for _ in range(3):
        finite.append(take_step(trainer).is_finite)
        scales.append(accelerator.scaler.get_scale())
        weights.append([weight.detach().clone() for weight in trainer.weights])
    assert finite == [True, False, True]
    assert scales == [4, 2, 2]
    unchanged = [all(map(torch.equal, *pair)) for pair in itertools.pairwise(weights)]
    assert unchanged == [True, False]


def test_optimizer_step_clips_and_logs_its_own_rate(config, tmp_path):
    more = ("--train.steps", "2", "--train.lr_schedule", "linear", "--train.weight_decay", "0")
    for name, clip in (("free", "1.0"), ("clipped", "1e-14")):
        train(config, tmp_path / name, *more, "--train.precision", "no", "--train.clip", clip)
    free, clipped = (tmp_path / name / "tiny" for name in ("free", "clipped"))
    assert [line["lr"] for line in log(free) if "lr" in line] == pytest.approx([1e-3, 5e-4])
    norms = [log(run)[0]["grad_norm"] for run in (free, clipped)]
    assert norms[0] == norms[1] > 1e-14
    task = TrainingTask.build(load_file(config), torch.device("cpu"))
    first = task.unet.state_dict()

    def moved(run):
        last = checkpoint_weights(run, 2)
        return max(float((last[name] - first[name]).abs().max()) for name in last)

    # AdamW's eps of 1e-8 is far above a gradient of norm 1e-14.
    assert moved(clipped) < 1e-6 < 1e-4 < moved(free)


def test_resume_keeps_the_memory_format_of_the_ema(finished, tmp_path, monkeypatch):
    """A file is contiguous, and torch adds other layouts tensor by tensor."""
    real, strides = EMAModel.step, []

    def step(ema, weights):
        pairs = zip(weights, ema.shadow_params, strict=True)
        strides.extend((weight.stride(), mean.stride()) for weight, mean in pairs)
        return real(ema, weights)

    monkeypatch.setattr(EMAModel, "step", step)
    killed_after(4, finished[0], tmp_path)
    train(finished[0] / "config.yaml", tmp_path)
    assert strides
    assert all(weight == mean for weight, mean in strides)


def test_for_this_rank_returns_the_entry_of_the_rank(finished):
    state = load_state(finished[0] / "checkpoints" / "4", "trainer")
    assert len(state["losses"]) == 1
    ranks = [SimpleNamespace(process_index=i) for i in range(3)]
    assert [for_this_rank(["a", "b"], rank) for rank in ranks] == ["a", "b", "a"]
