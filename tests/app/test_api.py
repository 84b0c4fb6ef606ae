"""The demo's API: every way to ask for an image gives the same pixels."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from demo_client import GOOD, call, create, fetch_image, gallery_pixels, trigger, upload, web
from gradio_client import Client
from PIL import Image
from serving_data import pixels, png_with

from pipeline.diffusion.guidance import interval
from pipeline.search import search
from pipeline.serving import session as session_module
from pipeline.serving.png_metadata import read_png
from pipeline.serving.requests import Request
from pipeline.serving.session import STRIP_COLUMNS, SWEEP_WS, InferenceSession

ROOT = Path(__file__).parents[2]
SETTINGS = list(Request.__dataclass_fields__)


def test_create_gives_api_client_and_python_the_same_pixels(url, store, tmp_path):
    asked = GOOD | {"negative_prompt": "blue", "w": 2.0, "eta": 0.5, "images": 2}
    images = (
        store.session()
        .trained(
            "red heart",
            negative_prompt="blue",
            w=2.0,
            num_inference_steps=4,
            eta=0.5,
            seed=7,
            num_images_per_prompt=2,
        )
        .images
    )
    status, event, (gallery, text, seed, curve, discarded) = call(url, "create", *asked.values())
    assert (status, event, seed, curve, discarded) == (200, "complete", 7, None, [])
    assert np.array_equal(gallery_pixels(gallery), pixels(images))
    assert [entry["caption"] for entry in gallery] == ["red heart, seed 7", "red heart, seed 8"]
    assert re.fullmatch(r"\d+\.\d s · 16 network calls · seed 7", text)
    client = Client(url, verbose=False, download_files=tmp_path)
    gallery, *_ = client.predict(**asked, api_name="/create")
    assert np.array_equal(pixels([Image.open(entry["image"]) for entry in gallery]), pixels(images))
    request, denoiser, model = read_png(gallery[0]["image"], T=1000)
    assert (denoiser, model) == ("network", store.session().identity)
    assert request == Request("red heart", "blue", w=2.0, steps=4, eta=0.5, images=2, seed=7)


def test_create_runs_by_the_script_in_the_documents(url, tmp_path):
    documents = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    blocks = [b for d in documents for b in re.findall(r"```python\n(.*?)```", d.read_text(), re.S)]
    (code,) = (block for block in blocks if "gradio_client" in block)
    assert "http://127.0.0.1:7860" in code
    images = re.search(r"^(\w+), .* = \w+\.predict", code, re.M)[1]
    code = code.replace("http://127.0.0.1:7860", url) + f"print(len({images}), seed)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("1 7\n")


def test_endpoints_have_names_parameters_and_descriptions(url):
    endpoints = web.get(f"{url}/gradio_api/info").json()["named_endpoints"]
    names = {
        endpoint: [p["parameter_name"] for p in info["parameters"]]
        for endpoint, info in endpoints.items()
    }
    assert names == {
        "/create": list(GOOD),
        "/sweep": ["prompt", "seed", "steps", "denoiser", "checkpoint"],
        "/forward": ["picture", "t", "seed", "tell", "upload", "checkpoint"],
        "/backward": ["prompt", "w", "steps", "eta", "seed", "denoiser", "checkpoint"],
    }
    assert all(info["description"] for info in endpoints.values())


def test_create_returns_a_random_seed_that_reproduces_it(url):
    _, _, (first, _, seed, *_) = create(url, randomise=True)
    _, _, (again, *_) = create(url, seed=seed)
    assert np.array_equal(gallery_pixels(first), gallery_pixels(again))


def test_sweep_answers_with_labelled_images_and_a_pair(url):
    _, event, (gallery, text, pair) = call(url, "sweep", "red heart", 3, 2, "network", 0)
    assert event == "complete"
    assert [entry["caption"] for entry in gallery] == [f"w = {w:g}" for w in SWEEP_WS]
    followed, ignored = (fetch_image(gallery[SWEEP_WS.index(w)]) for w in (0, -1))
    assert "20 network calls" in text
    assert not np.array_equal(pixels([followed]), pixels([ignored]))
    shown = [fetch_image({"image": entry}) for entry in pair]
    assert np.array_equal(pixels(shown), pixels([followed, ignored]))


def test_forward_answers_with_the_panels(url, store):
    session = store.session()
    x_0 = session.find_image("red heart")
    seen = []
    for tell, caption in ((False, ""), (True, "red heart")):
        _, event, (panels,) = call(url, "forward", "red heart", 500, 0, tell, None, 0)
        expected = session.forward(x_0, 500, 0, caption)
        assert event == "complete"
        assert [entry["caption"] for entry in panels] == list(expected)
        seen.append(gallery_pixels(panels))
        assert np.array_equal(seen[-1], pixels(expected.values()))
    assert not np.array_equal(*seen), "the caption changes the predictions"


def test_backward_answers_with_two_strips(url):
    _, event, (noisy, clean) = call(url, "backward", "red heart", 1.0, 20, 1.0, 0, "exact", 0)
    assert event == "complete"
    assert len(noisy) == len(clean) == STRIP_COLUMNS


def test_create_with_a_search_returns_curve_and_discarded(url, store):
    _, event, (gallery, text, _seed, curve, discarded) = create(url, steps=20, think=6)
    assert event == "complete"
    assert re.fullmatch(r"best of 4 · \d+\.\d s · 232 network calls · seed 7", text)
    pipe = store.session().trained
    options = {"w": 1.0, "steps": 20, "eta": 1.0, "seed": 7}
    verifier = session_module.VERIFIER
    found = search.find_best(pipe, "red heart", 6 * 40, verifier, **options)
    images = session_module.to_images(pipe, found.candidates)
    assert np.array_equal(gallery_pixels([*gallery, *discarded]), pixels(images))
    scores = [float(entry["caption"]) for entry in discarded]
    assert scores == pytest.approx(found.scores[1:].tolist(), rel=1e-3)
    assert curve["plot"].startswith("data:image/png")


# ---- settings from a PNG


def restore(url, content):
    """Return the settings that a PNG restores, and the message about its model."""
    status, (*settings, message) = trigger(url, "restore", "upload", upload(url, content), 0)
    assert status == 200
    return settings, message


def test_restore_settings_returns_every_setting(url):
    changes = {"prompt": "green heart", "negative_prompt": "red heart", "w": 3.5, "steps": 9}
    changes |= {"eta": 0.5, "images": 2, "seed": 123, "low": 0.2, "high": 0.8}
    asked = GOOD | changes | {"denoiser": "exact"}
    _, event, (gallery, *_) = call(url, "create", *asked.values())
    assert event == "complete"
    settings, message = restore(url, web.get(gallery[0]["image"]["url"]).content)
    assert settings == [*(asked[name] for name in SETTINGS), "exact", False]
    assert not message


@pytest.mark.parametrize("is_other", [False, True])
def test_restore_settings_names_another_model(url, store, is_other):
    identity = store.session().identity
    model = "tiny (00000000)" if is_other else identity.replace("tiny", "tiny at step 560")
    parameters = vars(Request("blue circle")) | {"denoiser": "network", "model": model}
    _settings, message = restore(url, png_with(parameters))
    assert (f"`{model}`" in message) == is_other
    assert (f"`{identity}`" in message) == is_other


# ---- semantic breaks


def _same_seed_for_all(monkeypatch):
    real = InferenceSession._sample

    def sample(self, pipe, parameters, call):
        n = call.pop("num_images_per_prompt")
        seed = call.pop("seed")
        call["prompt"] = [call["prompt"]] * n
        call["generator"] = [torch.Generator().manual_seed(seed) for _ in range(n)]
        return real(self, pipe, parameters, call)

    monkeypatch.setattr(InferenceSession, "_sample", sample)


def _ignored_interval(monkeypatch):
    monkeypatch.setattr(Request, "weight", property(lambda self: self.w))


@pytest.mark.parametrize("apply_break", [None, _same_seed_for_all, _ignored_interval])
def test_semantic_breaks_are_noticed(url, store, monkeypatch, apply_break):
    """A break of the seeds or of the guidance interval changes the images of /create."""
    options = {"num_inference_steps": 4, "eta": 1.0, "num_images_per_prompt": 2, "seed": 7}
    weight = interval(3.0, 0.2, 0.8)
    images = store.session().trained("red heart", w=weight, **options).images
    if apply_break is not None:
        apply_break(monkeypatch)
    _, event, (gallery, *_) = create(url, w=3.0, images=2, low=0.2, high=0.8)
    assert event == "complete"
    assert np.array_equal(gallery_pixels(gallery), pixels(images)) == (apply_break is None)
