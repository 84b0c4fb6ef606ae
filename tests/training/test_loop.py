"""The training loop: what its losses depend on, and what they do not."""

import contextlib
import dataclasses

import pytest
import torch
from accelerate import Accelerator
from training_runs import (
    alike,
    checkpoint_weights,
    first_losses,
    killed_after,
    log,
    same,
    take_step,
    train,
    weights,
)

from pipeline import randomness
from pipeline.config import load
from pipeline.data import image_ops, sampler
from pipeline.diffusion.losses import loss_weight
from pipeline.models import ema
from pipeline.training.task import TrainingTask
from pipeline.training.trainer import StepResult, Trainer
from pipeline.training.validation import validate

CPU = torch.device("cpu")
SLOTS = torch.arange(4)


def build(config, *more):
    return TrainingTask.build(load(["--config", str(config), *more])[0], CPU)


def check_caption_dropout(config, dropout):
    """(14): a dropped caption is the empty one, whatever the caption's own states are."""
    task = build(config, "--data.caption_dropout", str(dropout))
    others = dataclasses.replace(task, caption_states=task.caption_states.flip(0).roll(1, 1))
    a, b = first_losses(task), first_losses(others)
    assert a.isfinite().all()
    assert torch.equal(a, b) == bool(dropout)


@pytest.mark.parametrize("dropout", [0, 1])
def test_training_loop_drops_captions(config, dropout):
    check_caption_dropout(config, dropout)


def test_training_loop_weights_the_loss(finished):
    """The network predicts x_0, whose own weight is 1."""
    config = finished[0] / "config.yaml"
    task = build(config, "--train.weighting", "x_0", "--train.gamma", "null")
    clipped = load(["--config", str(config), "--train.weighting", "min_snr", "--train.gamma", "2"])
    a, b = first_losses(task), first_losses(dataclasses.replace(task, config=clipped[0]))
    t = randomness.timesteps(0, 0, SLOTS, 4, 100)
    torch.testing.assert_close(b, loss_weight(task.scheduler, t, "min_snr", 2.0) * a)


def test_get_batch_mirrors_chosen_images(finished):
    """Other images take the place of these, which are plain."""
    task = build(finished[0] / "config.yaml", "--data.flip", "true")
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (9, 3, 16, 16), dtype=torch.uint8, generator=generator)
    task.images = dataclasses.replace(task.images, images=pixels)
    shown, flip = pixels[sampler.batch_indices(0, 0, 4, 9)], randomness.flips(0, 0, SLOTS)
    assert flip.any()
    assert not flip.all()
    shown[flip] = shown[flip].flip(-1)
    x_0 = task.get_batch(0, SLOTS).x_0
    assert torch.equal(task.pipe.decode(x_0), image_ops.as_float(shown))


def test_training_loop_runs_on_another_device(config, monkeypatch):
    """Torch's meta device refuses operands of two devices as a GPU does, and computes no values."""
    chosen, _ = load(["--config", str(config), "--data.flip", "true"])
    TrainingTask.build(chosen, CPU)  # leaves the caption states in the cache
    task = TrainingTask.build(chosen, torch.device("meta"))
    assert task.caption_states.device == task.held_out_states.device == CPU
    assert task.empty_caption.device.type == "meta"
    losses = first_losses(task)
    assert losses.shape == (4,)
    assert losses.device.type == "meta"
    monkeypatch.setattr(torch.Tensor, "item", lambda self: float(self.device.type == "meta"))
    found = validate(task.unet, task, stop=False)
    assert found["train_loss"] == found["held_out_loss"] == 1.0


def check_accumulation(config, accelerator):
    """Two micro-batches of 2 give the gradient of one batch of 4."""
    norms = []
    for accumulation in (2, 1):
        more = ("--train.accumulation", str(accumulation), "--train.precision", "no")
        task = build(config, *more)
        accelerator.gradient_accumulation_steps = accumulation
        norms.append(take_step(Trainer(task.config, accelerator, task)).grad_norm)
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


def test_accumulated_micro_batches_equal_one_batch(finished, tmp_path):
    """Slots belong to the global batch: two micro-batches of 2 see what one batch of 4 sees."""
    config, more = finished[0] / "config.yaml", ("--train.precision", "no")
    train(config, tmp_path, "--train.accumulation", "2", *more)
    train(config, tmp_path / "one", *more)
    runs = log(tmp_path / "tiny"), log(tmp_path / "one" / "tiny")
    assert all(alike(a, b) for a, b in zip(*runs, strict=True))


def test_train_depends_on_the_seed(finished, tmp_path):
    train(finished[0] / "config.yaml", tmp_path, "--seed", "1")
    assert not same(weights(tmp_path / "tiny"), weights(finished[0]))


def test_intervals_do_not_change_the_weights(finished, tmp_path):
    """How often a run logs, validates, samples and saves, also after a resume."""
    rare = ("--train.log_every", "4", "--train.validate_every", "5", "--train.save_every", "5")
    train(finished[0] / "config.yaml", tmp_path, *rare, "--sample.every", "2")
    assert same(weights(tmp_path / "tiny"), weights(finished[0]))
    run = killed_after(2, finished[0], tmp_path / "resumed")
    train(run / "config.yaml", tmp_path / "resumed", *rare)
    assert same(weights(run), weights(finished[0]))


def check_ema_weights(config, accelerator):
    """Validation sees the averaged weights; training continues with its own."""
    task = build(config)
    trainer = Trainer(task.config, accelerator, task)
    own = [weight.detach().clone() for weight in trainer.weights]
    trainer.ema.shadow_params = [torch.full_like(weight, 0.5) for weight in own]
    with ema.ema_weights(task.unet, trainer.ema) as network:
        assert not network.training
        assert all((weight == 0.5).all() for weight in network.parameters())
    assert task.unet.training
    assert all(map(torch.equal, trainer.weights, own))


def test_ema_weights_swap_in_and_back(config, accelerator):
    check_ema_weights(config, accelerator)


def check_skipped_step(config, accelerator):
    """A gradient that is not finite changes no weight and counts as skipped."""
    task = build(config)
    trainer = Trainer(task.config, accelerator, task)
    before = [weight.detach().clone() for weight in trainer.weights]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(task, "loss", lambda prediction, *_: prediction.mean((1, 2, 3)) * torch.nan)
        take_step(trainer)
    assert (trainer.global_step, trainer.skipped, trainer.consecutive_skips) == (1, 1, 1)
    assert all(map(torch.equal, trainer.weights, before))


def test_optimizer_step_skips_a_gradient_of_nan(config, accelerator):
    check_skipped_step(config, accelerator)


def keep_all_captions(patch):
    patch.setattr(TrainingTask, "keep_captions", lambda task, batch: torch.tensor(True))


def sum_micro_batches(patch):
    real = Accelerator.backward

    def backward(self, loss):
        real(self, loss * self.gradient_accumulation_steps)

    patch.setattr(Accelerator, "backward", backward)


def forget_to_swap_back(patch):
    @contextlib.contextmanager
    def ema_weights(network, ema):
        for weight, mean in zip(network.parameters(), ema.shadow_params, strict=True):
            weight.data = mean.data
        yield network.eval()
        network.train()

    patch.setattr(ema, "ema_weights", ema_weights)


def take_every_step(patch):
    patch.setattr(StepResult, "is_finite", True)


@pytest.mark.parametrize(
    ("break_it", "check", "argument"),
    [
        (keep_all_captions, check_caption_dropout, 1),
        (sum_micro_batches, check_accumulation, None),
        (forget_to_swap_back, check_ema_weights, None),
        (take_every_step, check_skipped_step, None),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_semantic_breaks_are_noticed(config, accelerator, monkeypatch, break_it, check, argument):
    """Each check passes, and fails once the code is broken."""
    argument = accelerator if argument is None else argument
    check(config, argument)
    break_it(monkeypatch)
    with pytest.raises(AssertionError):
        check(config, argument)


def test_ema_of_decay_zero_is_the_last_weights(finished, tmp_path):
    train(finished[0] / "config.yaml", tmp_path, "--train.ema", "0", "--train.steps", "2")
    for run, step, expected in ((tmp_path / "tiny", 2, True), (finished[0], 6, False)):
        last, average = checkpoint_weights(run, step), weights(run)
        close = [torch.allclose(last[name], value) for name, value in average.items()]
        assert all(close) == expected
