"""`direct-jump search` saves the best image with what samples it again."""

import re

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_clip, tiny_pipeline

from pipeline.cli import search as command
from pipeline.serving.png_metadata import read_png
from pipeline.serving.requests import Request


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folders of a pipeline and of a CLIP model."""
    folder = tmp_path_factory.mktemp("models")
    tiny_pipeline(w=1.5, caption_length=8).save_pretrained(folder / "tiny")
    return folder / "tiny", tiny_clip(folder / "clip")


@pytest.fixture
def run_search(saved):
    def run(*arguments):
        call = [str(saved[0]), "red heart", "--steps", "4", "--device", "cpu"]
        return command.main([*call, *map(str, arguments)])

    return run


def test_search_saves_the_best_and_prints_the_curve(saved, run_search, tmp_path, capsys):
    out = tmp_path / "best.png"
    settings = ["--negative", "blue", "--w", 2, "--eta", 0.5, "--seed", 3]
    assert run_search("--budget", 24, *settings, "--verifier", saved[1], "--out", out) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" network")[0] for line in lines[:3]] == ["8", "16", "24"]
    seed = int(re.fullmatch(rf"{out}: .* 3 by 24 .* --seed (\d) .*", lines[3])[1])
    pipe = tiny_pipeline(w=1.5, caption_length=8)
    call = {"negative_prompt": "blue", "w": 2.0, "eta": 0.5, "num_inference_steps": 4}
    images = pipe("red heart", seed=3, num_images_per_prompt=3, **call).images
    assert np.array_equal(np.asarray(Image.open(out)), np.asarray(images[seed - 3]))
    request, _denoiser, _model = read_png(out, 1000)
    assert request == Request("red heart", "blue", w=2.0, steps=4, eta=0.5, seed=seed)


class Interrupting:
    """A verifier by brightness that is interrupted at its n-th batch."""

    calls = 0

    def __init__(self, n):
        self.left = n

    def __call__(self, pipe, prompt, x_0):
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt
        return x_0.flatten(1).mean(1)


def test_search_that_is_interrupted_saves_the_best_so_far(
    run_search, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "best.png"
    monkeypatch.setattr(command, "ClipVerifier", lambda name: Interrupting(int(name)))
    assert run_search("--budget", 160, "--verifier", 3, "--out", out) == 130
    last = capsys.readouterr().out.splitlines()[-1]
    seed = int(re.fullmatch(rf"{out}: the best of 8 by \d+ .* --seed (\d) .*", last)[1])
    pipe = tiny_pipeline(w=1.5, caption_length=8)
    images = pipe("red heart", seed=0, num_images_per_prompt=16, num_inference_steps=4).images
    assert seed == max(range(8), key=lambda i: np.asarray(images[i]).mean())
    assert np.array_equal(np.asarray(Image.open(out)), np.asarray(images[seed]))
    out.unlink()
    assert run_search("--budget", 160, "--verifier", 1, "--out", out) == 130
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "offending"),
    [
        (["--budget", "7"], "7 network calls"),
        (["--budget", "80", "--pairs", "0"], "got 0"),
        (["--budget", "80", "--verifier", "no/such"], "no/such"),
        (["--budget", "80", "--seed", "-1"], "-1"),
        (["--budget", "80", "--out", "best.txt"], "best.txt"),
    ],
)
def test_search_reports_bad_input_in_one_line(run_search, capsys, arguments, offending):
    assert run_search(*arguments) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert offending in error
