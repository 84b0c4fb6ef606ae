"""Runs that train on a stream resume to the same bytes and survive its failures."""

import io
import os
import signal
import time

import pytest
from datasets_on_disk import png, save_image, write_parquet
from PIL import Image
from training_runs import (
    ROOT,
    TINY,
    Broken,
    alike,
    killed_after,
    log,
    same,
    train,
    weights,
)

from pipeline import randomness
from pipeline.config import load_file
from pipeline.data.sources.rows import DataError, Unreachable
from pipeline.data.streaming import Stream
from pipeline.runs.folder import RunFolder


@pytest.fixture(scope="module")
def config(table, encoder, tmp_path_factory):
    """test_train's run on the table, with every setting that draws something at each step; 'both' has two captions a row."""
    folder = tmp_path_factory.mktemp("run")
    rows = [
        {"image": big(i), "text": f"square {i}", "other": "red" if i % 2 else None}
        for i in range(12)
    ]
    path = write_parquet(folder / "both.parquet", rows)
    more = "streaming: true, flip: true, shuffle_buffer: 5, caption_column: [text, other], "
    text = TINY.replace(
        "{source: SOURCE, held_out: HELD, ", f"{{source: {path}, held_out: train, {more}"
    )
    (folder / "tiny.yaml").write_text(
        text.replace("ENCODER", str(encoder)).replace("CACHE", str(folder / "cache"))
    )
    return folder / "tiny.yaml"


def big(i):
    """A image that differs from its mirror image."""
    buffer = io.BytesIO()
    ramp = (
        Image.linear_gradient("L")
        .transpose(Image.Transpose.ROTATE_90)
        .resize((16, 16))
        .convert("RGB")
    )
    ramp.point(lambda value: (value + 20 * i) % 256).save_image(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """One uninterrupted run."""
    out = tmp_path_factory.mktemp("whole")
    return out / "tiny", train(config, out)


def test_stream_run_trains_and_reports_the_preview(whole):
    run, done = whole
    assert (run / "pipeline" / "model_index.json").exists()
    assert (
        "both.parquet (train), the first 12 rows of a stream: 12 of 12 images usable" in done.stdout
    )
    assert "1 to 2 (median 2) captions an image" in done.stdout and "captions of" in done.stdout


@pytest.mark.parametrize("step", [2, 4])
def test_stream_run_resumes_to_the_same_bytes(whole, tmp_path, step):
    run = killed_after(step, whole[0], tmp_path)
    assert f"going on from step {step}" in train(run / "config.yaml", tmp_path).stdout
    assert same(weights(run), weights(whole[0]))


@pytest.mark.parametrize("more", [(), ("--train.accumulation", "2")])
def test_stream_failure_saves_the_steps_before(whole, tmp_path, monkeypatch, more):
    """Between two periodic checkpoints, and between two micro-steps: the last whole step is kept, with its place."""
    real, taken = Stream.take, []

    def take(self, n):
        taken.append(n)
        if sum(taken) > 4 * 4 + 2:  # in the fifth batch of four
            raise Unreachable(
                "cannot read both.parquet in 3 attempts (reset by peer): run the same command again"
            )
        return real(self, n)

    config, seldom = whole[0] / "config.yaml", ("--train.save_every", "100", *more)
    if more:
        train(config, tmp_path / "whole", *seldom)
    monkeypatch.setattr(Stream, "take", take)
    done = train(config, tmp_path, *seldom, check=False)
    assert done.returncode == 1
    assert (
        "(reset by peer)" in done.stderr
        and "step 4 is saved: the same command goes on from it" in done.stderr
    )
    monkeypatch.setattr(Stream, "take", real)
    assert "going on from step 4" in train(config, tmp_path, *seldom).stdout
    assert same(
        weights(tmp_path / "tiny"), weights(tmp_path / "whole" / "tiny" if more else whole[0])
    )


@pytest.mark.parametrize("every", ["2", "100"])
def test_stop_signal_ends_a_wait_for_the_stream(whole, tmp_path, monkeypatch, every):
    """The steps before are saved, once."""
    real, taken, saved, save = Stream.take, [], [], RunFolder.save

    def take(self, n):
        taken.append(n)
        if len(taken) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        return real(self, n)

    monkeypatch.setattr(
        RunFolder,
        "save",
        lambda run, step, *more, **facts: (
            saved.append(step) or save_image(run, step, *more, **facts)
        ),
    )
    monkeypatch.setattr(Stream, "take", take)
    done = train(whole[0] / "config.yaml", tmp_path, "--train.save_every", every, check=False)
    assert (
        done.returncode == 143
        and "Stopped (SIGTERM) after step 4 of 6; run the same command to go on." in done.stdout
    )
    assert saved == ([2, 4] if every == "2" else [4])
    monkeypatch.undo()
    assert (
        "going on from step 4"
        in train(whole[0] / "config.yaml", tmp_path, "--train.save_every", every).stdout
    )
    assert same(weights(tmp_path / "tiny"), weights(whole[0]))


def test_skipped_step_of_a_stream_names_slots(whole, tmp_path, monkeypatch):
    Broken(monkeypatch, lambda step, slot: step == 2 and slot == 1)
    said = train(whole[0] / "config.yaml", tmp_path).stdout
    t = randomness.timesteps(load_file(whole[0] / "config.yaml").seed, 2, [1], 4, 100).item()
    assert f"step 3 is skipped: no finite loss for the batch's image 1 at t = {t}\n" in said


def test_stream_failure_at_first_leaves_no_checkpoint(whole, tmp_path, monkeypatch):
    def take(self, n):
        raise DataError(
            "cannot read both.parquet in 3 attempts (reset by peer): run the same command again"
        )

    monkeypatch.setattr(Stream, "take", take)
    done = train(whole[0] / "config.yaml", tmp_path, check=False)
    assert done.returncode == 2
    assert "(reset by peer)" in done.stderr and "is saved" not in done.stderr
    assert not list((tmp_path / "tiny" / "checkpoints").iterdir())


@pytest.mark.parametrize(
    "setting", [("--data.flip", "false"), ("--data.caption_column", "text"), ("--seed", "1")]
)
def test_stream_run_depends_on_flip_captions_and_seed(whole, tmp_path, setting):
    train(whole[0] / "config.yaml", tmp_path, *setting)
    assert not same(weights(tmp_path / "tiny"), weights(whole[0]))


def test_stream_micro_steps_take_the_same_examples(whole, tmp_path):
    one_step = ("--train.precision", "no", "--train.steps", "1")
    train(whole[0] / "config.yaml", tmp_path, *one_step, "--train.accumulation", "2")
    train(whole[0] / "config.yaml", tmp_path / "one", *one_step)
    two, one = log(tmp_path / "tiny"), log(tmp_path / "one" / "tiny")
    assert "grad_norm" in two[0] and all(alike(a, b) for a, b in zip(two, one, strict=True))


@pytest.mark.parametrize("name", ["folder", "stream"])
def test_dry_run_of_the_templates_on_own_data(name, table, tmp_path):
    if name == "folder":
        for split in ("train", "test"):
            (tmp_path / "set" / split).mkdir(parents=True)
            for i in range(3):
                (tmp_path / "set" / split / f"square {i}.png").write_bytes(png(i))
        source = ["--data.source", str(tmp_path / "set"), "--data.held_out", "test"]
    else:
        source = [
            "--data.source",
            str(table),
            "--data.held_out",
            "null",
            "--data.image_column",
            "image",
            "--data.caption_column",
            "text",
        ]
    small = [
        "--data.resolution",
        "16",
        "--data.cache",
        str(tmp_path / "cache"),
        "--train.batch_size",
        "4",
        "--train.threads",
        "1",
        "--model.patch_size",
        "2",
        "--model.channels",
        "[32, 32]",
        "--model.attention",
        "[false, true]",
        "--model.heads",
        "4",
    ]
    done = train(ROOT / "configs" / f"{name}.yaml", tmp_path / "out", *source, *small, "--dry_run")
    assert "images usable" in done.stdout and "weights to train" in done.stdout
