"""The gallery shows what the default w samples, and the figures are drawn."""

import dataclasses
import shutil

import numpy as np
from huggingface_hub import ModelCard
from PIL import Image

from pipeline.config import load_file
from pipeline.hub import figures, model_card
from pipeline.models import loading
from pipeline.runs.folder import RunFolder


def test_collect_images_crops_each_prompt_at_default_w(run):
    image = np.asarray(Image.open(run.folder / "images" / "prompt-1.png"))
    grid = np.asarray(Image.open(run.samples / "000006.png"))
    assert np.array_equal(image, grid[16:, 16:])


def test_collect_images_needs_samples_at_default_w(run, tmp_path):
    """The card shows the images above code that samples at that w."""
    made = RunFolder(tmp_path / "run")
    shutil.copytree(run.folder, made.folder)
    config = load_file(made.config)
    sample = dataclasses.replace(config.sample, default_w=0.5)
    Image.new("RGB", (32, 32)).save(made.samples / "mine.png")  # no sample of a step
    figures.collect_images(dataclasses.replace(config, sample=sample), made)
    images = made.folder / "images"
    assert sorted(path.name for path in images.iterdir()) == ["samples.png", "training.png"]
    assert (images / "samples.png").read_bytes() == (made.samples / "000006.png").read_bytes()
    model_card.refresh_card(made.folder)
    text = made.card.read_text()
    assert "<Gallery />" not in text and "(images/samples.png)" in text
    assert "widget" not in ModelCard(text).data.to_dict()


def test_plot_strips_labels_prompts_that_were_not_trained(run, tmp_path, monkeypatch):
    from matplotlib import pyplot as plt

    drawn = []
    monkeypatch.setattr(plt, "close", drawn.append)
    pipe = loading.load_from_folder(run.pipeline)
    pipe.set_progress_bar_config(disable=True)
    prompts = ["red heart", "blue cat"]
    path = tmp_path / "strips.png"
    options = {"w": 1.0, "seed": 0, "steps": 4, "columns": 2}
    assert figures.plot_strips(pipe, prompts, {"red heart"}, path, **options) == path
    with Image.open(path) as image:
        assert image.width > image.height
    (figure,) = drawn
    labels = [text.get_text() for ax in figure.axes for text in ax.texts]
    assert labels == ["red heart", "blue cat\n(in no training image)"]
