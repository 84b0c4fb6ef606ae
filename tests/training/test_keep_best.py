"""A run may save its best weights and stop early, by the held-out loss."""

import shutil

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file
from training_runs import (
    ROOT,
    UNET_FILE,
    arguments,
    check_refused,
    killed_after,
    log,
    run_ranks,
    same,
    train,
    weights,
)

from pipeline.config import load_file as load_config
from pipeline.models import loading
from pipeline.runs.folder import RunFolder
from pipeline.training import monitor
from pipeline.training.validation import sample_images

BEST = ("--train.keep_best", "true", "--train.validate_every", "1", "--train.save_every", "1")
# Nothing is learnt, so no validation improves on the first.
STUCK = ("--train.lr", "1e-30", "--train.patience", "2", "--train.validate_every", "1")


@pytest.fixture
def losses(monkeypatch):
    """Give the validations these held-out losses, one after the other by step."""
    chosen = [5.0, 3.0, 4.0, float("nan"), 3.0, 6.0, 1.0, 2.0]
    given = []
    real = monitor.validate

    def validate(network, task, stop):
        given.append(chosen[len(given)])
        return real(network, task, stop) | {"held_out_loss": given[-1]}

    monkeypatch.setattr(monitor, "validate", validate)
    return given


def averaged_weights(run, step):
    return loading.load_checkpoint(RunFolder(run), step).unet.state_dict()


def test_keep_best_saves_the_weights_of_the_lowest_held_out_loss(losses, config, tmp_path):
    more = (*BEST, "--train.precision", "no", "--train.lr", "0.02")
    train(config, tmp_path, *more)
    run = tmp_path / "tiny"
    assert same(weights(run), averaged_weights(run, 2))
    assert not same(weights(run), averaged_weights(run, 6))
    assert "step 2" in RunFolder(run).card.read_text()
    # The card shows the result's samples, not those of the last weights.
    settings = load_config(run / "config.yaml").sample
    images = [np.asarray(Image.open(run / "samples" / "000006.png")).astype(int)]
    for step in (2, 6):
        pipe = loading.load_checkpoint(RunFolder(run), step)
        sample_images(pipe, settings, tmp_path / "step.png", False)
        images.append(np.asarray(Image.open(tmp_path / "step.png")))
    differences = [abs(images[0] - other).max() for other in images[1:]]
    assert differences[0] <= 2
    assert differences[1] > 20
    train(config, tmp_path, *more, "--train.steps", "7")
    assert same(weights(run), averaged_weights(run, 7))


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 2, 4])
def test_keep_best_resumes_in_the_same_bytes(step, losses, config, tmp_path):
    """The best checkpoint itself may be deleted."""
    train(config, tmp_path / "through", *BEST)
    through = tmp_path / "through" / "tiny"
    run = killed_after(step, through, tmp_path / "again")
    for earlier in range(1, step):
        shutil.rmtree(run / "checkpoints" / str(earlier))
    del losses[step:]
    train(config, tmp_path / "again", *BEST)
    assert same(weights(run), weights(through))
    for name in ("trainer.safetensors", UNET_FILE):
        a, b = (load_file(each / "checkpoints" / "6" / name) for each in (run, through))
        assert same(a, b)


def test_patience_ends_a_run_without_improvement(config, tmp_path):
    done = train(config, tmp_path, *STUCK)
    run = RunFolder(tmp_path / "tiny")
    assert run.finished
    assert run.newest().name == "3"
    assert log(run.folder)[-1]["step"] == 3
    assert run.sample_files()[-1][0] == 3
    assert "3 steps" in run.card.read_text()
    assert "patience" in done.stdout
    again = train(config, tmp_path, *STUCK)
    assert "is finished at step 3 of 6" in again.stdout
    train(config, tmp_path, *STUCK, "--train.patience", "4")
    assert run.newest().name == "5"


@pytest.mark.parametrize("step", [2, 3])
def test_patience_resumes_in_the_same_bytes(step, config, tmp_path):
    """Also where the run was killed before it wrote its result."""
    more = (*STUCK, "--train.save_every", "1")
    train(config, tmp_path / "through", *more)
    through = tmp_path / "through" / "tiny"
    run = killed_after(step, through, tmp_path / "again")
    train(config, tmp_path / "again", *more)
    assert same(weights(run), weights(through))
    assert log(run) == log(through)
    assert RunFolder(run).newest().name == "3"


@pytest.mark.slow
def test_two_ranks_lose_patience_together(config, started, tmp_path):
    job = (ROOT, arguments(config, tmp_path, *STUCK))
    for code, output in run_ranks(started, job, job):
        assert code == 0, output
    assert RunFolder(tmp_path / "tiny").newest().name == "3"


@pytest.mark.parametrize("more", [("--train.keep_best", "true"), ("--train.patience", "3")])
def test_best_weights_need_a_held_out_split(more, config, tmp_path):
    done = train(config, tmp_path, *more, "--data.held_out", "null", check=False)
    check_refused(done, more[0].removeprefix("--"), "data.held_out")
