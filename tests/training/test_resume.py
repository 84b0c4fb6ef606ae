"""Interrupted runs resume in the same bytes, and nothing is mixed or overwritten."""

import dataclasses
import shutil

import pytest
import torch
from PIL import Image
from training_runs import (
    check_refused,
    file_contents,
    killed_after,
    log,
    same,
    train,
    weights,
)

import train_text2img
from pipeline.config import load_file
from pipeline.diffusion.captions import CaptionWhitening
from pipeline.hub import client, export, push
from pipeline.runs.folder import RunFolder
from pipeline.training.task import TrainingTask


@pytest.mark.parametrize("step", [2, 4])
def test_resume_ends_in_the_same_bytes(finished, tmp_path, step):
    run = killed_after(step, finished[0], tmp_path)
    done = train(run / "config.yaml", tmp_path)
    assert f"resuming from step {step}" in done.stdout
    assert same(weights(run), weights(finished[0]))
    assert log(run) == log(finished[0])
    for saved in (run / "checkpoints" / "6").glob("*/*"):
        place = saved.relative_to(run)
        assert saved.read_bytes() == (finished[0] / place).read_bytes(), place


def test_resume_with_muon_ends_in_the_same_bytes(config, tmp_path):
    more = ["--train.optimizer", "muon", "--model.norm_groups", "8"]
    train(config, tmp_path / "through", *more)
    through = tmp_path / "through" / "tiny"
    run = killed_after(2, through, tmp_path / "again")
    output = train(config, tmp_path / "again", *more).stdout
    assert "resuming from step 2" in output
    assert "learning rate" not in output
    assert same(weights(run), weights(through))
    train(config, tmp_path / "adamw", *more[2:])
    assert not same(weights(tmp_path / "adamw" / "tiny"), weights(through))


@pytest.mark.slow
def test_resume_with_an_imported_optimizer_ends_in_the_same_bytes(config, tmp_path):
    """Adafactor's state has other shapes than its weights."""
    more = ["--train.optimizer", "torch.optim.Adafactor"]
    more += ["--train.optimizer_args", "{eps: [null, 1e-3], weight_decay: 0, maximize: false}"]
    train(config, tmp_path / "through", *more)
    through = tmp_path / "through" / "tiny"
    run = killed_after(4, through, tmp_path / "again")
    assert "resuming from step 4" in train(config, tmp_path / "again", *more).stdout
    assert same(weights(run), weights(through))


def test_resume_of_a_finished_run_is_unfinished_until_its_end(finished, tmp_path, monkeypatch):
    """Its first card must not pass for the second one's."""
    shutil.copytree(finished[0], tmp_path / "tiny")
    run, config = tmp_path / "tiny", finished[0] / "config.yaml"
    longer = ("--train.steps", "8")
    measured = [run / name for name in ("metrics.json", "images/free.png", "images/sweep.png")]
    for path in measured:
        path.write_text("{}")
    monkeypatch.setattr(train_text2img, "finish", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(config, tmp_path, *longer)
    monkeypatch.undo()
    assert RunFolder(run).newest().name == "8"
    assert not RunFolder(run).finished
    with pytest.raises(client.HubError, match="tiny"):
        export.export(run, tmp_path / "exported")
    with pytest.raises(client.HubError, match="tiny"):
        push.assemble_repository(run, tmp_path / "pushed")
    train(config, tmp_path, *longer, "--sample.prompts", "[red]")
    assert RunFolder(run).finished
    assert not same(weights(run), weights(finished[0]))
    assert not any(path.exists() for path in measured)
    # Sampled again, since the prompts have changed.
    assert Image.open(run / "samples" / "000008.png").size == (16, 2 * 16)


def test_resume_reports_a_changed_learning_rate(config, tmp_path):
    more = ("--train.lr_schedule", "linear", "--train.lr", "0.002", "--train.warmup", "0")
    train(config, tmp_path, *more, "--train.steps", "2")
    output = train(config, tmp_path, *more, "--train.steps", "4").stdout
    assert "With 4 steps the learning rate resumes at 0.001; it was 0." in output
    rates = [line["lr"] for line in log(tmp_path / "tiny") if "lr" in line]
    assert rates == pytest.approx([2e-3, 1e-3, 1e-3, 5e-4])


@pytest.mark.parametrize(("more", "steps"), [((), 6), (("--train.steps", "4"), 4)])
def test_train_changes_nothing_in_a_finished_run(finished, more, steps):
    """Nor does a command with fewer steps."""
    run, _ = finished
    before = file_contents(run)
    done = train(run / "config.yaml", run.parent, *more)
    assert f"is finished at step 6 of {steps}" in done.stdout
    assert file_contents(run) == before


def test_newest_checkpoint_refuses_changed_settings(finished):
    config, out = finished[0] / "config.yaml", finished[0].parent
    check_refused(train(config, out, "--train.lr", "0.5", check=False), "train.lr", 0.001, 0.5)


def test_newest_checkpoint_refuses_foreign_files(finished, config, tmp_path):
    no_checkpoint = shutil.ignore_patterns("checkpoints")
    shutil.copytree(finished[0], tmp_path / "tiny", ignore=no_checkpoint)
    other = tmp_path / "mine" / "tiny"
    other.mkdir(parents=True)
    (other / "README.md").write_text("about something else")
    for out, found in ((tmp_path, "no checkpoint"), (tmp_path / "mine", "README.md")):
        before = file_contents(out / "tiny")
        check_refused(train(config, out, check=False), out / "tiny", found)
        assert before.items() <= file_contents(out / "tiny").items()


def test_newest_checkpoint_names_an_unreadable_config(finished, tmp_path):
    run = killed_after(2, finished[0], tmp_path)
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("  warmup:", "  warm_up:"))
    done = train(finished[0] / "config.yaml", tmp_path, check=False)
    check_refused(done, run / "config.yaml", "'train.warm_up'", "'train.warmup'")


def test_find_start_refuses_fewer_steps_than_made(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "tiny")
    RunFolder(tmp_path / "tiny").card.unlink()  # it was interrupted
    done = train(finished[0] / "config.yaml", tmp_path, "--train.steps", "4", check=False)
    check_refused(done, "step 6", "train.steps 4")
    assert not RunFolder(tmp_path / "tiny").finished


def test_check_data_refuses_changed_images(finished, images, tmp_path):
    run = killed_after(2, finished[0], tmp_path)
    mine = tmp_path / "squares"
    shutil.copytree(images, mine)
    text = (run / "config.yaml").read_text().replace(str(images), str(mine))
    (run / "config.yaml").write_text(text)
    (tmp_path / "mine.yaml").write_text(text)
    Image.new("RGB", (16, 16), "maroon").save(mine / "train" / "maroon.png")
    before = file_contents(run)
    done = train(tmp_path / "mine.yaml", tmp_path, check=False)
    check_refused(done, "fingerprint", mine)
    assert file_contents(run) == before
    (mine / "train" / "maroon.png").unlink()
    train(tmp_path / "mine.yaml", tmp_path)
    assert same(weights(run), weights(finished[0]))


def test_build_whitening_uses_the_checkpoints_own(finished):
    """The data's first rows may have changed since, above all a stream's."""
    chosen = load_file(finished[0] / "config.yaml")
    checkpoint = RunFolder(finished[0]).newest()
    saved = CaptionWhitening.from_pretrained(checkpoint / "whitening").matrix
    other = dataclasses.replace(chosen, model=dataclasses.replace(chosen.model, whitening=0.5))

    def matrix(checkpoint):
        task = TrainingTask.build(other, torch.device("cpu"), checkpoint)
        return task.pipe.whitening.matrix

    assert torch.equal(matrix(checkpoint), saved)
    assert not torch.allclose(matrix(None), saved)
