"""Fixtures of the benchmarks' tests."""

import re

import pytest
import torch
from tiny import tiny_text
from tiny_run import shapes_dataset, untrained_run

TINY = """
data: {source: SOURCE, resolution: 16, cache: CACHE}
model:
  {patch_size: 2, channels: [32, 32], attention: [false, true], heads: 4, text_encoder: ENCODER}
diffusion: {prediction_type: sample}
train: {steps: 6, batch_size: 2, lr: 1e-3, weighting: min_velocity, gamma: 5, threads: 1}
"""


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Keep the benchmarks from taking every core of a machine that runs other tests."""
    monkeypatch.setattr(torch, "set_num_threads", lambda _n: None)


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """The folder of a dataset of 28 coloured shapes, some held out."""
    return shapes_dataset(tmp_path_factory.mktemp("shapes") / "set")


@pytest.fixture(scope="session")
def tiny_config(shapes):
    """The file of a configuration that trains in seconds."""
    folder = shapes.parent
    for part in tiny_text(length=16, width=64):
        part.save_pretrained(folder / "encoder")
    places = {"SOURCE": shapes, "CACHE": folder / "cache", "ENCODER": folder / "encoder"}
    text = TINY
    for name, place in places.items():
        text = text.replace(name, str(place))
    path = folder / "tiny.yaml"
    path.write_text(text)
    return path


@pytest.fixture
def run(shapes, tmp_path):
    """The folder of a run that was never trained."""
    return untrained_run(tmp_path / "run", shapes)


@pytest.fixture
def quick_section(tmp_path):
    """Run a benchmark's smallest form; return what it writes."""

    def write(module, *argv):
        document = tmp_path / "docs" / "benchmarks.md"
        module.main(["--quick", "--output", str(document), *map(str, argv)])
        text = document.read_text()
        name = module.__name__.split(".")[-1]
        assert f"<!-- {name}: generated -->" in text
        assert f"Command: `python benchmarks/{name}.py --quick" in text
        for figure in re.findall(r"\]\((figures/[\w.-]+)\)", text):
            assert (document.parent / figure).is_file()
        return text

    return write
