"""Runs that train on a stream resume to the same bytes and survive its failures."""

import os
import signal
import time

import pytest
from datasets_on_disk import encode_image, png, write_parquet
from PIL import Image
from training_runs import (  # noqa: F401
    ROOT,
    TINY,
    Broken,
    alike,
    check_refused,
    encoder,
    killed_after,
    log,
    same,
    train,
    weights,
    write_template,
)

from pipeline import randomness
from pipeline.config import load_file
from pipeline.data.sources.rows import DataError, Unreachable
from pipeline.data.streaming import Stream
from pipeline.runs.folder import RunFolder

pytestmark = pytest.mark.slow


def ramp(i):
    """Return an image file that differs from its mirror image."""
    image = Image.linear_gradient("L").transpose(Image.Transpose.ROTATE_90).resize((16, 16))
    return encode_image(image.convert("RGB").point(lambda value: (value + 20 * i) % 256))


@pytest.fixture(scope="module")
def config(encoder, tmp_path_factory):
    """A run on a stream with everything that is chosen at each step; two captions a row."""
    folder = tmp_path_factory.mktemp("run")
    rows = [
        {"image": ramp(i), "text": f"square {i}", "other": "red" if i % 2 else None}
        for i in range(12)
    ]
    values = {
        "source: SOURCE": f"source: {write_parquet(folder / 'both.parquet', rows)}",
        "held_out: HELD": "held_out: train, streaming: true, flip: true, shuffle_buffer: 5, "
        "caption_column: [text, other]",
        "ENCODER": encoder,
        "CACHE": folder / "cache",
    }
    return write_template(folder / "tiny.yaml", TINY, values)


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """The folder of an uninterrupted run, and the result of the command."""
    out = tmp_path_factory.mktemp("whole")
    return out / "tiny", train(config, out)


def test_stream_run_trains_and_reports_the_preview(finished):
    run, done = finished
    assert (run / "pipeline" / "model_index.json").exists()
    preview = "both.parquet (train), the first 12 rows of a stream: 12 of 12 images usable"
    assert preview in done.stdout
    assert "1 to 2 (median 2) captions an image" in done.stdout
    assert "captions of" in done.stdout


@pytest.mark.parametrize("step", [2, 4])
def test_stream_run_resumes_to_the_same_bytes(finished, tmp_path, step):
    run = killed_after(step, finished[0], tmp_path)
    assert f"from step {step}" in train(run / "config.yaml", tmp_path).stdout
    assert same(weights(run), weights(finished[0]))


@pytest.mark.parametrize("more", [(), ("--train.accumulation", "2")])
def test_stream_failure_saves_the_steps_before(finished, tmp_path, monkeypatch, more):
    """Also between two checkpoints or two micro-steps: the last complete step is saved."""
    take = Stream.take
    taken = []

    def fail_in_the_fifth_batch(self, n):
        taken.append(n)
        if sum(taken) > 4 * 4 + 2:
            raise Unreachable("both.parquet: reset by peer")
        return take(self, n)

    config = finished[0] / "config.yaml"
    options = ("--train.save_every", "100", *more)
    uninterrupted = finished[0]
    if more:
        train(config, tmp_path / "whole", *options)
        uninterrupted = tmp_path / "whole" / "tiny"
    monkeypatch.setattr(Stream, "take", fail_in_the_fifth_batch)
    done = train(config, tmp_path, *options, check=False)
    check_refused(done, "both.parquet: reset by peer", "tep 4", code=1)
    monkeypatch.setattr(Stream, "take", take)
    assert "from step 4" in train(config, tmp_path, *options).stdout
    assert same(weights(tmp_path / "tiny"), weights(uninterrupted))


@pytest.mark.parametrize(("every", "steps"), [("2", [2, 4]), ("100", [4])])
def test_stop_signal_ends_a_wait_for_the_stream(finished, tmp_path, monkeypatch, every, steps):
    """The steps before are saved, once."""
    take = Stream.take
    save = RunFolder.save
    taken = []
    saved = []

    def hang_in_the_fifth_batch(self, n):
        taken.append(n)
        if len(taken) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        return take(self, n)

    def record(run, step, *arguments, **options):
        saved.append(step)
        return save(run, step, *arguments, **options)

    monkeypatch.setattr(RunFolder, "save", record)
    monkeypatch.setattr(Stream, "take", hang_in_the_fifth_batch)
    command = (finished[0] / "config.yaml", tmp_path, "--train.save_every", every)
    done = train(*command, check=False)
    assert done.returncode == 143
    assert "(SIGTERM) after step 4 of 6" in done.stdout
    assert saved == steps
    monkeypatch.undo()
    assert "from step 4" in train(*command).stdout
    assert same(weights(tmp_path / "tiny"), weights(finished[0]))


def test_skipped_step_of_a_stream_names_the_slot(finished, tmp_path, monkeypatch):
    Broken(monkeypatch, lambda step, slot: step == 2 and slot == 1)
    output = train(finished[0] / "config.yaml", tmp_path).stdout
    t = randomness.timesteps(load_file(finished[0] / "config.yaml").seed, 2, [1], 4, 100).item()
    (line,) = [line for line in output.splitlines() if "step 3 is skipped" in line]
    assert "image 1" in line
    assert line.endswith(f"t = {t}")


def test_stream_failure_at_first_leaves_no_checkpoint(finished, tmp_path, monkeypatch):
    def fail(self, n):
        raise DataError("both.parquet: reset by peer")

    monkeypatch.setattr(Stream, "take", fail)
    done = train(finished[0] / "config.yaml", tmp_path, check=False)
    check_refused(done, "both.parquet: reset by peer")
    assert "is saved" not in done.stderr
    assert not list((tmp_path / "tiny" / "checkpoints").iterdir())


@pytest.mark.parametrize(
    "setting", [("--data.flip", "false"), ("--data.caption_column", "text"), ("--seed", "1")]
)
def test_stream_run_depends_on_flip_captions_and_seed(finished, tmp_path, setting):
    train(finished[0] / "config.yaml", tmp_path, *setting)
    assert not same(weights(tmp_path / "tiny"), weights(finished[0]))


def test_stream_micro_steps_take_the_same_examples(finished, tmp_path):
    config = finished[0] / "config.yaml"
    one_step = ("--train.precision", "no", "--train.steps", "1")
    train(config, tmp_path, *one_step, "--train.accumulation", "2")
    train(config, tmp_path / "one", *one_step)
    two = log(tmp_path / "tiny")
    one = log(tmp_path / "one" / "tiny")
    assert "grad_norm" in two[0]
    assert all(alike(a, b) for a, b in zip(two, one, strict=True))


@pytest.mark.parametrize("name", ["folder", "stream"])
def test_dry_run_of_the_templates_on_own_data(name, table, tmp_path):
    settings = {"data.source": table, "data.held_out": "null"}
    if name == "folder":
        for split in ("train", "test"):
            (tmp_path / "set" / split).mkdir(parents=True)
            for i in range(3):
                (tmp_path / "set" / split / f"square {i}.png").write_bytes(png(i))
        settings = {"data.source": tmp_path / "set", "data.held_out": "test"}
    else:
        settings |= {"data.image_column": "image", "data.caption_column": "text"}
    settings |= {
        "data.resolution": 16,
        "data.cache": tmp_path / "cache",
        "train.batch_size": 4,
        "train.threads": 1,
        "model.patch_size": 2,
        "model.channels": "[32, 32]",
        "model.attention": "[false, true]",
        "model.heads": 4,
    }
    options = [text for key, value in settings.items() for text in (f"--{key}", str(value))]
    done = train(ROOT / "configs" / f"{name}.yaml", tmp_path / "out", *options, "--dry_run")
    assert "images usable" in done.stdout
    assert "weights to train" in done.stdout
