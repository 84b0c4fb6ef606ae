"""Sample images, and messages about what does not fit in memory."""

import contextlib
import dataclasses

import numpy as np
import pytest
import torch
from finetuning import quiet
from PIL import Image
from tqdm.auto import tqdm
from training_runs import train

import train_text2img
from pipeline.config import load_file
from pipeline.hardware import skip_on_out_of_memory
from pipeline.models import loading
from pipeline.runs.folder import RunFolder
from pipeline.training import monitor
from pipeline.training.validation import sample_images


@pytest.fixture
def messages(monkeypatch):
    """What is written beside the progress bar."""
    written = []
    monkeypatch.setattr(tqdm, "write", written.append)
    return written


def test_sample_images_stops_within_a_step(finished, tmp_path):
    settings = dataclasses.replace(load_file(finished[0] / "config.yaml").sample, steps=50)
    pipe, calls = loading.load_pipeline(finished[0]), []
    pipe.unet.register_forward_hook(lambda *_: calls.append(1))

    class StopAtTheThirdCall:
        def __bool__(self):
            return len(calls) >= 3

    sample_images(pipe, settings, tmp_path / "samples.png", StopAtTheThirdCall())
    assert len(calls) == 3
    assert not list(tmp_path.iterdir())


def test_sample_images_has_a_column_per_prompt(finished, tmp_path):
    settings = load_file(finished[0] / "config.yaml").sample
    settings = dataclasses.replace(settings, w=(0.0, 1.0, 4.0))
    pipe = quiet(loading.load_pipeline(finished[0]))
    sample_images(pipe, settings, tmp_path / "samples.png", False)
    grid = np.asarray(Image.open(tmp_path / "samples.png"))
    assert grid.shape == (3 * 16, 2 * 16, 3)
    for row, w in enumerate(settings.w):
        alone = pipe(list(settings.prompts), w=w, seed=0, num_inference_steps=2).images
        assert np.array_equal(grid[16 * row : 16 * (row + 1)], np.hstack(alone))


def test_train_survives_samples_without_memory(config, tmp_path, monkeypatch, messages):
    def full(*_args, **_more):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    for module, name in (
        (monitor, "validate"),
        (monitor, "sample_images"),
        (train_text2img, "plot_training"),
        (train_text2img, "plot_strips"),
    ):
        monkeypatch.setattr(module, name, full)
    done = train(config, tmp_path, "--train.steps", "1")
    skipped = ("validation of step 1", "000001.png", "training.png", "strips.png")
    for what, line in zip(skipped, messages, strict=True):
        assert what in line
        assert "CUDA out of memory. Tried to allocate 2.00 GiB." in line
        assert ("sample.prompts" in line) == (what in ("000001.png", "strips.png"))
    assert RunFolder(tmp_path / "tiny").finished
    assert "000001.png" not in done.stdout


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), ": smaller"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), ": smaller"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), ": smaller"),
        (OSError(28, "No space left on device"), ""),
        (RuntimeError("a bug"), None),
    ],
)
def test_skip_on_out_of_memory_skips_nothing_else(error, advice, messages):
    is_bug = advice is None
    expected = pytest.raises(RuntimeError, match="a bug") if is_bug else contextlib.nullcontext()
    with expected, skip_on_out_of_memory("x.png", ": smaller"):
        raise error
    if is_bug:
        assert messages == []
    else:
        (line,) = messages
        assert "x.png" in line
        assert line.endswith(f"{error}{advice}")
