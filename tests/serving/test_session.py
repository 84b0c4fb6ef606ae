"""Generation: the pipeline's own images, previews, deadlines, and one step at a time."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from serving_data import COLOURS, SEARCH, last, pixels
from tiny import tiny_pipeline

from pipeline.diffusion.guidance import InputError, interval
from pipeline.search import search
from pipeline.serving import session as session_module
from pipeline.serving.requests import Request
from pipeline.serving.session import SWEEP_WS, InferenceSession


def test_create_gives_the_pipelines_images(session):
    options = {"eta": 0.5, "seed": 7}
    request = Request("red heart", "blue", w=2.0, steps=3, images=2, low=0.1, high=0.9, **options)
    frame = last(session.create(request))
    call = {"negative_prompt": "blue", "num_inference_steps": 3, "num_images_per_prompt": 2}
    images = session.trained("red heart", w=interval(2.0, 0.1, 0.9), **call, **options).images
    assert np.array_equal(pixels(frame.images), pixels(images))


def test_sweep_uses_one_noise_for_every_w(session):
    images = last(session.sweep(Request("red heart", steps=3, seed=5))).images
    options = {"num_inference_steps": 3, "seed": 5}
    alone = [session.trained("red heart", w=w, **options).images[0] for w in SWEEP_WS]
    # Batches of another size are rounded differently.
    assert np.abs(pixels(images) - pixels(alone)).max() <= 1
    assert [json.loads(image.info["parameters"])["w"] for image in images] == list(SWEEP_WS)


@pytest.mark.parametrize(("w", "calls"), [(0.0, 1), (-1.0, 1), (1.0, 2)])
def test_create_counts_a_guided_step_as_two_calls(session, w, calls):
    request = Request("red heart", w=w, steps=5, images=2)
    assert last(session.create(request)).calls == 5 * 2 * calls


def test_sweep_counts_one_call_for_each_unguided_w(session):
    """Of the six w, -1 and 0 take one call a step, the others two."""
    assert last(session.sweep(Request("red heart", steps=3))).calls == 3 * (1 + 1 + 4 * 2)


def test_create_yields_previews_before_the_images(session, monkeypatch):
    monkeypatch.setattr(session_module, "PREVIEW_INTERVAL", 0.0)
    frames = list(session.create(Request("red heart", steps=4)))
    assert [frame.step for frame in frames] == [1, 2, 3, 4]
    assert [frame.last for frame in frames] == [False] * 3 + [True]
    assert not any(frame.images[0].info for frame in frames[:-1])


@pytest.mark.parametrize("request_", [Request("red heart", steps=50), SEARCH])
def test_create_closed_early_leaves_nothing_behind(session, monkeypatch, request_):
    monkeypatch.setattr(session_module, "PREVIEW_INTERVAL", 0.0)
    frames = session.create(request_)
    next(frames)
    frames.close()
    assert not session.trained.unet._forward_hooks
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("method", ["create", "sweep", "backward", "search"])
def test_timed_steps_end_a_request_at_its_deadline(session, monkeypatch, method):
    monkeypatch.setattr(session_module, "DEADLINE", -1.0)
    with pytest.raises(InputError, match="-1 s"):
        if method == "search":
            list(session.create(SEARCH))
        else:
            list(getattr(session, method)(Request("red heart", steps=4)))


def test_identity_differs_for_other_weights_of_one_name(session, data):
    other = InferenceSession(tiny_pipeline(caption_length=8), "tiny", data)
    next(other.trained.unet.parameters()).data += 1
    assert session.identity.startswith("tiny (")
    assert session.identity != other.identity
    same_weights = InferenceSession(tiny_pipeline(w=2.0), "tiny", data)
    assert same_weights.identity == session.identity


# ---- several requests at once


def test_exclusive_runs_one_step_of_one_request(session):
    """Gradio's Stop frees the queue while the interrupted step runs on in its thread."""
    active = []
    most = []

    def enter(*_):
        active.append(1)
        most.append(len(active))
        time.sleep(0.002)

    def leave(*_):
        active.pop()

    def forward():
        x_0 = session.find_image("red heart")
        return [session.forward(x_0, 1, 0) for _ in range(4)]

    requests = [
        lambda: last(session.create(Request("red heart", steps=8))).calls,
        lambda: last(session.create(SEARCH)).calls,
        lambda: last(session.sweep(Request("red heart", steps=3))).calls,
        lambda: len([*session.backward(Request("red heart", steps=8))]),
        lambda: len(forward()),
    ]
    network = session.trained.unet
    hooks = [network.register_forward_pre_hook(enter), network.register_forward_hook(leave)]
    with ThreadPoolExecutor(len(requests)) as threads:
        answers = [threads.submit(request) for request in requests]
        found = [answer.result() for answer in answers]
    for hook in hooks:
        hook.remove()
    assert set(most) == {1}
    assert found == [16, 4 * 58, 30, 8, 4]


def test_exclusive_lets_others_run_beside_an_open_request(session, monkeypatch):
    monkeypatch.setattr(session_module, "PREVIEW_INTERVAL", 0.0)
    left = session.create(Request("red heart", steps=6))
    next(left)
    found = []

    def generate():
        found.append(last(session.create(Request("red heart", steps=3))))

    other = threading.Thread(target=generate, daemon=True)
    other.start()
    other.join(60)
    assert found[0].calls == 6
    rest = [(frame.step, frame.steps, bool(frame.images[0].info)) for frame in left]
    assert rest == [(i, 6, i == 6) for i in range(2, 7)], "the images come last"


# ---- search


@pytest.mark.parametrize(
    "request_",
    [SEARCH, Request("red heart", "blue", 2.0, 20, 0.5, seed=7, low=0.2, high=0.9, think=6)],
    ids=["plain", "every setting"],
)
def test_create_with_a_budget_is_the_search(session, request_):
    frame = last(session.create(request_))
    pipe = session.trained
    budget = 6 * search.calls_of_sample(pipe, request_.weight, 20)
    options = {"w": request_.weight, "steps": 20, "eta": request_.eta, "seed": 7}
    options["negative_prompt"] = request_.negative_prompt or None
    verifier = session_module.VERIFIER
    found = search.find_best(pipe, "red heart", budget, verifier, **options)
    assert len(found.candidates) > 1
    assert frame.calls == frame.search.calls == found.calls
    assert frame.search.curve == found.curve
    images = session_module.to_images(pipe, found.candidates)
    assert np.array_equal(pixels([*frame.images, *frame.discarded]), pixels(images))


def test_create_with_a_budget_scores_four_candidates(session):
    frame = last(session.create(SEARCH))
    assert len(frame.search.candidates) == len(frame.search.curve) == 4
    assert frame.calls == 4 * 58


def test_create_with_too_small_a_budget_gives_the_plain_image(session):
    options = {"w": 1.0, "steps": 4, "seed": 7}
    frame = last(session.create(Request("red heart", think=2, **options)))
    plain = last(session.create(Request("red heart", **options)))
    assert np.array_equal(pixels(frame.images), pixels(plain.images))
    assert not frame.discarded
    assert frame.calls == 8


def test_create_with_a_budget_yields_previews(session, monkeypatch):
    monkeypatch.setattr(session_module, "PREVIEW_INTERVAL", 0.0)
    frames = list(session.create(SEARCH))
    assert [frame.last for frame in frames] == [False] * (len(frames) - 1) + [True]
    assert len(frames) > 20
    assert all(frame.calls == frame.step for frame in frames)
    assert len(frames[0].images) == 4
    assert not any(image.info for frame in frames[:-1] for image in frame.images)


def test_create_searches_with_the_exact_denoiser(session):
    frame = last(session.create(Request("red heart", w=0.0, steps=20, think=8), "exact"))
    assert np.abs(pixels(frame.images) - COLOURS["red heart"]).max() <= 1
    assert len(frame.discarded) == 3


# ---- tokens


def test_token_counter_leaves_the_pipelines_tokenizer_alone(session):
    """The fast tokenizer remembers how its last caller padded."""
    tokenizer = session.pipe.tokenizer
    count = session.token_counter()
    tokenizer("a", padding="max_length", max_length=8, truncation=True)
    backend = tokenizer.backend_tokenizer
    before = backend.padding, backend.truncation
    count("red heart")
    assert before[0]
    assert before == (backend.padding, backend.truncation)


def test_describe_tokens_cuts_as_the_pipeline_does(session):
    count = session.token_counter()
    assert count("red heart") == "2 of 6 tokens"
    cut = count("a very long red heart a very green cat")
    assert cut == "9 of 6 tokens; left out: very green cat"
