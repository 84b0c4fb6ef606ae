"""The scripts in examples/ run and show what they claim."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))


def load_example(name):
    """Return an example as a module, without running it."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run_example(tmp_path, monkeypatch):
    """Run an example in the repository's root; return its module and the image that it saved."""

    def run(name, steps):
        monkeypatch.chdir(ROOT)
        module = load_example(name)
        output = tmp_path / f"{name}.png"
        module.main(["--output", str(output), "--steps", str(steps)])
        return module, np.asarray(Image.open(output)).astype(int)

    return run


def tiles(image, rows, columns):
    """Cut a grid (H, W, 3) into its images (rows, columns, h, w, 3)."""
    height, width = image.shape[0] // rows, image.shape[1] // columns
    return image.reshape(rows, height, columns, width, 3).swapaxes(1, 2)


def test_sample_with_guidance_changes_rows_by_w_alone(run_example):
    module, image = run_example("sample_with_guidance", steps=4)
    unconditional, unguided, *guided = tiles(image, len(module.WEIGHTS), len(module.PROMPTS))
    assert image.std() > 10
    for row in (unconditional, *guided):
        assert np.abs(row - unguided).mean() > 1
    # w = 3 on an interval is neither w = 3 everywhere nor w = 0 everywhere.
    assert np.abs(guided[-1] - guided[-2]).mean() > 0.1


def test_exact_denoiser_returns_images_of_its_set(run_example, capsys):
    _, image = run_example("exact_denoiser", steps=10)
    images, samples = tiles(image, 2, 8)
    for sample in samples:
        assert min(np.abs(sample - one).max() for one in images) <= 1
    assert "at most 0.0" in capsys.readouterr().out


def test_custom_scheduler_agrees_with_diffusers_ddim(run_example, capsys):
    module, image = run_example("custom_scheduler", steps=8)
    ours, ddim, solver, ancestral = tiles(image, 4, len(module.PROMPTS))
    assert np.abs(ours - ddim).max() <= 1  # the last bit of a rounded pixel
    assert np.abs(ours - solver).mean() > 0.1
    assert np.abs(ours - ancestral).mean() > 0.1
    assert len(capsys.readouterr().out.splitlines()) == 4


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_example_is_listed_and_does_nothing_on_import(path, capsys):
    module = load_example(path.stem)
    assert module.__doc__ and not capsys.readouterr().out
    assert f"`{path.name}`" in (ROOT / "examples/README.md").read_text()
