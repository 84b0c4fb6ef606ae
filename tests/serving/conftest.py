"""Plain squares with captions, and a session of a tiny model on them."""

import pytest
from PIL import Image
from serving_data import COLOURS
from tiny import tiny_pipeline

from pipeline.config import DataConfig
from pipeline.serving.session import InferenceSession


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Four squares of 8x8 whose captions the tiny tokenizer knows; the last is held out."""
    folder = tmp_path_factory.mktemp("squares")
    for i, (name, colour) in enumerate(COLOURS.items()):
        split = folder / ("test" if i == 3 else "train")
        split.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), colour).save(split / f"{name}.png")
    return DataConfig(source=str(folder), resolution=8, cache=str(folder / "cache"))


@pytest.fixture(scope="module")
def session(data):
    pipe = tiny_pipeline(caption_length=8, caption_dropout=0.1, w=1.0)
    return InferenceSession(pipe, "tiny", data)
