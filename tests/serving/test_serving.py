"""What the page does: every request is checked, every picture can be drawn again, and every panel shows its equation."""

import gc
import io
import json
import math
import re
import shutil
import struct
import threading
import time
import weakref
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from diffusers import PNDMScheduler
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import tiny_pipeline, tiny_text, tiny_unet

import app
from pipeline.config import Config, DataConfig, ModelConfig
from pipeline.diffusion.guidance import InputError, interval
from pipeline.diffusion.scheduler import DDPMScheduler
from pipeline.models import ema, loading
from pipeline.runs.folder import RunFolder
from pipeline.runs.state_files import save_state
from pipeline.search import search
from pipeline.serving import session
from pipeline.serving.model_store import ModelStore
from pipeline.serving.png_metadata import read_png, same_model
from pipeline.serving.requests import MAX_SEED, MAX_STEPS_PER_REQUEST, Request
from pipeline.serving.session import InferenceSession

COLORS = {
    "red heart": (250, 20, 20),
    "green heart": (20, 250, 20),
    "blue circle": (20, 20, 250),
    "yellow square": (250, 250, 20),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Four plain squares of 8x8 with captions that the tiny tokenizer knows; one of them is held out."""
    folder = tmp_path_factory.mktemp("squares")
    for i, (name, color) in enumerate(COLORS.items()):
        split = folder / ("test" if i == 3 else "train")
        split.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), color).save(split / f"{name}.png")
    return DataConfig(source=str(folder), resolution=8, cache=str(folder / "cache"))


@pytest.fixture(scope="module")
def studio(source):
    return InferenceSession(
        tiny_pipeline(caption_length=8, caption_dropout=0.1, w=1.0), "tiny", source
    )


@pytest.fixture(scope="module")
def alone(source):
    """A page without a network."""
    return InferenceSession(None, "the exact denoiser", source)


def last(frames):
    *_, frame = frames
    assert frame.last
    return frame


def pixels(images):
    return np.stack([np.asarray(image).astype(int) for image in images])


# ---- requests


@pytest.mark.parametrize(
    "raw, message",
    [
        ({"steps": 3.7}, "steps is 3.7, expected a whole number from 1 to 1000"),
        ({"steps": 0}, "steps is 0, expected a whole number from 1 to 1000"),
        ({"steps": True}, "steps is True, expected a whole number"),
        ({"steps": "5"}, "steps is '5', expected a whole number"),
        ({"steps": None}, "steps is None, expected a whole number"),
        ({"w": math.nan}, "w is nan, expected a number from -10 to 30"),
        ({"w": math.inf}, "w is inf, expected a number from -10 to 30"),
        ({"w": [1]}, "w is [1], expected a number"),
        ({"seed": -1}, "seed is -1, expected a whole number from 0"),
        ({"seed": 2**53}, "expected a whole number from 0 to 9007199254740991"),
        ({"seed": None}, "seed is None, expected a whole number"),
        ({"images": 5}, "images is 5, expected a whole number from 1 to 4"),
        ({"eta": 1.01}, "eta is 1.01, expected a number from 0 to 1"),
        (
            {"low": 0.8, "high": 0.2},
            "the guidance interval is 0.8 to 0.2, expected its start below its end: swap them",
        ),
        ({"prompt": {"a": 1}}, "prompt is {'a': 1}, expected a text"),
        ({"prompt": "x" * 501}, "prompt has 501 characters, expected 500 at most: shorten it"),
        ({"negative_prompt": None}, "negative_prompt is None, expected a text"),
        ({"prompt": "\ud83d"}, "prompt holds half a surrogate pair"),
        (
            {"images": 4, "steps": 257},
            "4 pictures of 257 steps are 1028 network steps, and one request may take 1024",
        ),
        ({"think": 0}, "think is 0, expected a whole number from 1 to 16"),
        ({"think": 2.5}, "think is 2.5, expected a whole number from 1 to 16"),
        (
            {"think": 4, "images": 2},
            "images is 2 and think is 4, expected 1 of either: a search ends in one picture",
        ),
        (
            {"think": 16, "steps": 65},
            "16 times 65 steps are 1040 network steps, and one request may take 1024",
        ),
        ({"size": 4096}, "size is not a setting, expected prompt, negative_prompt, w"),
    ],
)
def test_a_request_out_of_range_is_refused_by_name(raw, message):
    with pytest.raises(InputError, match="^.*" + re.escape(message)):
        Request.read(raw, T=1000)


def test_all_that_is_wrong_is_said_at_once():
    with pytest.raises(InputError) as said:
        Request.read({"prompt": 7, "steps": 0, "w": math.nan, "eta": 2}, T=1000)
    assert str(said.value).count("expected") == 4


def test_whole_numbers_may_come_as_floats():
    request = Request.read({"prompt": "", "steps": 7.0, "seed": 3.0, "w": 2}, T=1000)
    assert (request.steps, request.seed, request.w) == (7, 3, 2.0)
    assert type(request.steps) is int and type(request.w) is float


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda x: st.lists(x) | st.dictionaries(st.text(), x),
    max_leaves=3,
)


@settings(
    deadline=None, suppress_health_check=[HealthCheck.too_slow]
)  # the first text loads Unicode's tables
@given(st.dictionaries(st.sampled_from(list(Request.__dataclass_fields__)), JSON))
def test_anything_that_json_can_say_is_either_drawable_or_refused(raw):
    try:
        request = Request.read(raw, T=1000)
    except InputError:
        return
    assert (
        1 <= request.steps * request.images * request.think <= MAX_STEPS_PER_REQUEST
        and math.isfinite(request.w)
    )
    assert (
        0 <= request.low <= request.high <= 1
        and 0 <= request.seed <= MAX_SEED
        and len(request.prompt) <= 500
    )
    json.dumps(request.prompt).encode()


# ---- pictures


def test_the_page_draws_what_the_pipeline_draws(studio):
    request = Request(
        "red heart", "blue", w=2.0, steps=3, eta=0.5, images=2, seed=7, low=0.1, high=0.9
    )
    drawn = last(studio.create(request))
    images = studio.network(
        "red heart",
        negative_prompt="blue",
        w=interval(2.0, 0.1, 0.9),
        num_inference_steps=3,
        eta=0.5,
        seed=7,
        num_images_per_prompt=2,
    ).images
    assert np.array_equal(pixels(drawn.images), pixels(images))


def test_a_picture_carries_what_draws_it_again(studio, tmp_path):
    request = Request(
        'a "red" heart ❤', "cat", w=1.5, steps=4, eta=0.0, images=2, seed=2**40, low=0.2, high=0.7
    )
    drawn = last(studio.create(request)).images
    for i, image in enumerate(drawn):
        image.save(tmp_path / "a.png", pnginfo=_text(image.info))
        assert read_png(tmp_path / "a.png", T=1000) == (request, "network", studio.identity)
        assert json.loads(image.info["parameters"])["image"] == i
    again = last(studio.create(read_png(tmp_path / "a.png", T=1000)[0])).images
    assert np.array_equal(pixels(drawn), pixels(again))


def _text(info):
    from PIL.PngImagePlugin import PngInfo

    chunk = PngInfo()
    for key, value in info.items():
        chunk.add_text(key, value)
    return chunk


def test_the_sweep_is_one_noise_under_six_weights(studio):
    request = Request("red heart", steps=3, seed=5)
    drawn = last(studio.sweep(request)).images
    alone = [
        studio.network("red heart", w=w, num_inference_steps=3, seed=5).images[0]
        for w in session.SWEEP_WS
    ]
    assert (
        np.abs(pixels(drawn) - pixels(alone)).max() <= 1
    )  # the rounding of a batch of another size
    assert [json.loads(image.info["parameters"])["w"] for image in drawn] == list(session.SWEEP_WS)


@pytest.mark.parametrize("w, calls", [(0.0, 1), (-1.0, 1), (1.0, 2)])
def test_network_calls_are_counted_and_a_doubled_one_is_two(studio, w, calls):
    assert last(studio.create(Request("red heart", w=w, steps=5, images=2))).calls == 5 * 2 * calls


def test_the_sweeps_calls(studio):
    """Each step: w = -1 and w = 0 take one, the other four two."""
    assert last(studio.sweep(Request("red heart", steps=3))).calls == 3 * (1 + 1 + 4 * 2)


def test_previews_come_before_the_pictures(studio, monkeypatch):
    monkeypatch.setattr(session, "PREVIEW_INTERVAL", 0.0)
    frames = list(studio.create(Request("red heart", steps=4)))
    assert [frame.step for frame in frames] == [1, 2, 3, 4]
    assert not any(frame.images[0].info for frame in frames[:-1]) and [
        frame.last for frame in frames
    ] == [False] * 3 + [True]


def test_leaving_early_leaves_nothing_behind(studio, monkeypatch):
    monkeypatch.setattr(session, "PREVIEW_INTERVAL", 0.0)
    frames = studio.create(Request("red heart", steps=50))
    next(frames)
    frames.close()
    assert not studio.network.unet._forward_hooks
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("draw", ["create", "sweep", "backward"])
def test_a_request_ends_at_its_deadline(studio, monkeypatch, draw):
    monkeypatch.setattr(session, "DEADLINE", -1.0)
    with pytest.raises(
        InputError, match="longer than the -1 s that one request may: ask for fewer steps"
    ):
        list(getattr(studio, draw)(Request("red heart", steps=4)))


# ---- several requests at once


def test_one_step_of_one_request_at_a_time(studio):
    """Gradio's Stop frees the page while the step that it interrupts goes on in its thread."""
    inside, most = [], []

    def enter(*_):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.002)

    def forward():
        return [studio.forward(studio.named("red heart"), 1, 0) for _ in range(4)]

    drawn = [
        lambda: last(studio.create(Request("red heart", steps=8))).calls,
        lambda: last(studio.create(THOUGHT)).calls,
        lambda: last(studio.sweep(Request("red heart", steps=3))).calls,
        lambda: len([*studio.backward(Request("red heart", steps=8))]),
        lambda: len(forward()),
    ]
    network = studio.network.unet
    hooks = [
        network.register_forward_pre_hook(enter),
        network.register_forward_hook(lambda *_: inside.pop() and None),
    ]
    with ThreadPoolExecutor(len(drawn)) as threads:
        found = [answer.result() for answer in [threads.submit(draw) for draw in drawn]]
    for hook in hooks:
        hook.remove()
    assert set(most) == {1} and found == [16, 4 * 58, 30, 8, 4]


def test_a_request_that_is_left_open_is_in_nobodys_way(studio, monkeypatch):
    monkeypatch.setattr(session, "PREVIEW_INTERVAL", 0.0)
    left, found = studio.create(Request("red heart", steps=6)), []
    next(left)
    other = threading.Thread(
        target=lambda: found.append(last(studio.create(Request("red heart", steps=3)))), daemon=True
    )
    other.start()
    other.join(60)
    assert found[0].calls == 6
    rest = [(frame.step, frame.steps, bool(frame.images[0].info)) for frame in left]
    assert rest == [(i, 6, i == 6) for i in range(2, 7)], "the pictures are the last ones"


# ---- thinking longer


THOUGHT = Request(
    "red heart", w=1.0, steps=20, seed=7, think=6
)  # 240 calls: four of 40, each judged by 18


def test_thinking_longer_is_the_search_and_shows_what_it_discarded(studio):
    drawn = last(studio.create(THOUGHT))
    found = search.find_best(
        studio.network, "red heart", 6 * 40, session.VERIFIER, w=1.0, steps=20, eta=1.0, seed=7
    )
    assert len(found.candidates) == 4 and drawn.calls == drawn.found.calls == found.calls == 4 * 58
    assert drawn.found.curve == found.curve and len(found.curve) == 4
    images = session.to_images(studio.network, found.candidates)
    assert np.array_equal(pixels([*drawn.images, *drawn.discarded]), pixels(images))


def test_thinking_longer_goes_by_all_that_was_asked(studio):
    asked = Request(
        "red heart", "blue", w=2.0, steps=20, eta=0.5, seed=7, low=0.2, high=0.9, think=6
    )
    drawn, w = last(studio.create(asked)), interval(2.0, 0.2, 0.9)
    budget = 6 * search.calls_of_sample(studio.network, w, 20)
    found = search.find_best(
        studio.network,
        "red heart",
        budget,
        session.VERIFIER,
        negative_prompt="blue",
        w=w,
        steps=20,
        eta=0.5,
        seed=7,
    )
    assert len(found.candidates) > 1 and drawn.calls == found.calls
    images = session.to_images(studio.network, found.candidates)
    assert np.array_equal(pixels([*drawn.images, *drawn.discarded]), pixels(images))


def test_a_searched_picture_and_the_discarded_carry_what_draws_them_again(studio, tmp_path):
    drawn = last(studio.create(THOUGHT))
    for image, best in [(drawn.images[0], True), *((image, False) for image in drawn.discarded)]:
        image.save(tmp_path / "a.png", pnginfo=_text(image.info))
        request, *_ = read_png(tmp_path / "a.png", T=1000)
        assert (request == THOUGHT) == best and request.think == (6 if best else 1)
        again = last(studio.create(request)).images
        assert np.abs(pixels(again) - pixels([image])).max() <= (
            0 if best else 1
        )  # alone it rounds otherwise


def test_a_budget_that_judges_nothing_draws_the_plain_picture(studio):
    drawn = last(studio.create(Request("red heart", w=1.0, steps=4, seed=7, think=2)))
    plain = last(studio.create(Request("red heart", w=1.0, steps=4, seed=7)))
    assert (
        np.array_equal(pixels(drawn.images), pixels(plain.images))
        and not drawn.discarded
        and drawn.calls == 8
    )


def test_a_search_is_shown_on_its_way_and_can_be_left(studio, monkeypatch):
    monkeypatch.setattr(session, "PREVIEW_INTERVAL", 0.0)
    frames = list(studio.create(THOUGHT))
    assert [frame.last for frame in frames] == [False] * (len(frames) - 1) + [True] and len(
        frames
    ) > 20
    assert all(frame.calls == frame.step for frame in frames) and len(frames[0].images) == 4
    assert not any(image.info for frame in frames[:-1] for image in frame.images)
    left = studio.create(THOUGHT)
    next(left)
    left.close()
    assert not studio.network.unet._forward_hooks and torch.is_grad_enabled()
    monkeypatch.setattr(session, "DEADLINE", -1.0)
    with pytest.raises(InputError, match="longer than the -1 s that one request may"):
        list(studio.create(THOUGHT))


def test_the_exact_denoiser_thinks_too(studio):
    drawn = last(studio.create(Request("red heart", w=0.0, steps=20, think=8), "exact"))
    assert (
        np.abs(pixels(drawn.images) - COLORS["red heart"]).max() <= 1 and len(drawn.discarded) == 3
    )


def test_a_picture_of_before_the_search_is_read(tmp_path):
    old = {name: value for name, value in vars(Request("cat", steps=9)).items() if name != "think"}
    content = png(
        pnginfo=_text({"parameters": json.dumps(old | {"denoiser": "exact", "model": "emoji"})})
    )
    assert read_png(saved(tmp_path, content), T=1000) == (Request("cat", steps=9), "exact", "emoji")


# ---- the exact denoiser


def test_without_a_network_a_name_draws_its_own_picture(source):
    studio = InferenceSession(None, "exact", source)
    image = last(studio.create(Request("green heart", w=0.0, steps=20))).images[0]
    assert np.abs(pixels([image]) - COLORS["green heart"]).max() <= 1


def test_the_exact_denoiser_refuses_what_it_does_not_know(studio):
    with pytest.raises(
        InputError,
        match="knows the 3 names of its pictures .* 'red hart' is none of them: try red heart",
    ):
        list(studio.create(Request("red hart"), "exact"))
    with pytest.raises(InputError, match="denoiser is 'best', expected one of network, exact"):
        list(studio.create(Request("red heart"), "best"))


def test_the_exact_denoiser_shares_the_networks_chain(studio):
    image = last(studio.create(Request("blue circle", w=0.0, steps=20), "exact")).images[0]
    assert np.abs(pixels([image]) - COLORS["blue circle"]).max() <= 1


# ---- the lecture's panels


def test_the_panels_of_the_way_forwards(studio):
    panels = studio.forward(studio.named("red heart"), 1000, 3, "red heart")
    assert list(panels) == [
        "x_0",
        "(5) the jump",
        "(1) the chain",
        "(15) x̂_0, network",
        "(15) x̂_0, exact",
    ]
    picture = pixels([panels["x_0"]])
    assert np.abs(picture - COLORS["red heart"]).max() <= 1
    assert (
        np.abs(pixels([panels["(15) x̂_0, exact"]]) - picture).max() <= 1
    )  # told the caption, it knows
    assert (
        np.abs(pixels([panels["(5) the jump"]]) - picture).mean() > 40
    )  # by the jump and by the chain nothing is left
    assert np.abs(pixels([panels["(1) the chain"]]) - picture).mean() > 40


def test_one_step_of_the_chain_is_hardly_noise(studio):
    panels = studio.forward(studio.named("yellow square"), 1, 3)
    for name in ("(5) the jump", "(1) the chain"):
        assert (
            0 < np.abs(pixels([panels[name]]) - COLORS["yellow square"]).mean() < 3
        )  # sqrt(beta_1) = 0.01


def test_held_out_pictures_are_not_the_exact_denoisers(studio):
    guess = pixels([studio.forward(studio.named("yellow square"), 10, 3)["(15) x̂_0, exact"]])
    nearest = min(np.abs(guess - COLORS[name]).max() for name in list(COLORS)[:3])
    assert nearest <= 1


def test_the_exact_denoiser_is_not_told_of_a_picture_that_it_does_not_know(studio):
    told, untold = (
        studio.forward(studio.named("yellow square"), 500, 3, caption)
        for caption in ("yellow square", "")
    )
    assert list(told)[-2:] == ["(15) x̂_0, network", "(15) x̂_0, exact, not told"]
    assert np.array_equal(told["(15) x̂_0, exact, not told"], untold["(15) x̂_0, exact"])
    assert not np.array_equal(told["(15) x̂_0, network"], untold["(15) x̂_0, network"])


def test_two_models_of_one_name_are_told_apart(studio, source):
    other = InferenceSession(tiny_pipeline(caption_length=8), "tiny", source)
    next(other.network.unet.parameters()).data += 1
    assert studio.identity.startswith("tiny (") and studio.identity != other.identity
    assert InferenceSession(tiny_pipeline(w=2.0), "tiny", source).identity == studio.identity, (
        "of the same weights"
    )


@pytest.mark.parametrize(
    "one, other, same",
    [
        ("x (abcdef12)", "x (abcdef12)", True),
        ("x at step 560 (abcdef12)", "y (1) (abcdef12)", True),
        ("x (abcdef12)", "x (abcdef13)", False),
        ("x", "x", True),
        ("x", "y", False),
    ],
)
def test_a_model_is_known_by_the_digits_of_its_weights_and_without_them_by_its_name(
    one, other, same
):
    assert same_model(one, other) == same_model(other, one) == same


def test_an_unknown_picture_is_refused(studio):
    with pytest.raises(InputError, match="picture is 'purple', expected one of the set's 4 names"):
        studio.named("purple")


def test_the_curves_are_the_schedule(studio):
    beta, abar, snr, posterior = map(np.array, studio.curves().values())
    assert np.allclose(beta, np.linspace(1e-4, 0.02, 1000), atol=1e-9)
    assert np.allclose(abar, np.cumprod(1 - beta))
    assert np.allclose(snr, abar / (1 - abar))
    assert posterior[0] == 0 and np.allclose(
        posterior[1:], beta[1:] * (1 - abar[:-1]) / (1 - abar[1:])
    )


def test_the_strip_goes_from_noise_to_the_picture(studio):
    *_, strip = studio.backward(Request("red heart", w=3.0, steps=20, eta=0.0, seed=4))
    assert len(strip) == session.STRIP_COLUMNS and strip[-1][0] == 0
    assert [t for t, _, _ in strip] == sorted((t for t, _, _ in strip), reverse=True)
    picture = studio.network("red heart", w=3.0, num_inference_steps=20, eta=0.0, seed=4).images
    assert np.array_equal(pixels([strip[-1][1]]), pixels(picture))


def test_tokens_are_counted_apart_from_what_is_being_drawn(studio):
    """The fast tokenizer keeps how its last caller padded."""
    tokenizer = studio.pipe.tokenizer
    tokenizer("a", padding="max_length", max_length=8, truncation=True)
    before = tokenizer.backend_tokenizer.padding, tokenizer.backend_tokenizer.truncation
    studio.tokens("red heart")
    assert before[0] and before == (
        tokenizer.backend_tokenizer.padding,
        tokenizer.backend_tokenizer.truncation,
    )


def test_tokens_are_counted_as_the_pipeline_cuts_them(studio):
    assert studio.tokens("red heart") == "2 of 6 tokens"
    assert (
        studio.tokens("a very long red heart a very green cat")
        == "9 of 6 tokens; left out: very green cat"
    )


# ---- files


def saved(tmp_path, content):
    path = tmp_path / "upload.png"
    path.write_bytes(content)
    return path


def png(size=(8, 8), kind="PNG", **options):
    out = io.BytesIO()
    Image.new("RGB", size, (10, 200, 30)).save(out, kind, **options)
    return out.getvalue()


def bomb(width, height):
    """A PNG that claims a size, with next to nothing behind it."""
    chunk = lambda body: (
        struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    )
    header = chunk(b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT" + zlib.compress(b"\0" * 1000))


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "cannot be read, expected a picture"),
        (b"<svg/>", "cannot be read, expected a picture"),
        (png(kind="GIF"), "cannot be read, expected a picture"),
        (bomb(2001, 2000), "the picture is 2001 x 2000, expected 4 megapixels at most"),
        (
            bomb(60000, 60000),
            "cannot be read, expected a picture",
        ),  # Pillow itself will not open it
        (png((300, 300))[:-40], "damaged"),
        (b"\0" * 2_000_001, "the file has 2.0 MB, expected 2 at most"),
    ],
)
def test_a_file_that_is_no_reasonable_picture_is_refused(tmp_path, content, message):
    with pytest.raises(InputError, match=message):
        session.load_uploaded_image(saved(tmp_path, content), 8)


def test_a_file_that_is_deleted_meanwhile_is_told(tmp_path):
    for read in (
        lambda path: session.load_uploaded_image(path, 8),
        lambda path: read_png(path, T=1000),
    ):
        with pytest.raises(
            InputError,
            match="the file is no longer here, expected one dropped within the hour: drop it again",
        ):
            read(tmp_path / "gone.png")


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_an_uploaded_picture_is_one_of_the_sets_size(tmp_path, kind):
    x_0 = session.load_uploaded_image(saved(tmp_path, png((40, 20), kind)), 8)
    assert x_0.shape == (1, 3, 8, 8)
    assert torch.allclose(
        (x_0[0].mean((1, 2)) + 1) * 127.5, torch.tensor([10.0, 200.0, 30.0]), atol=3
    )


DREW = {"denoiser": "network", "model": "emoji"}


@pytest.mark.parametrize(
    "parameters, message",
    [
        (None, "carries no settings"),
        ("a cat, steps: 5", "carries no settings"),
        ("[1, 2]", "carries no settings"),
        (json.dumps({"prompt": "cat"}), "carries no settings"),
        (json.dumps(Request.__dict__["__dataclass_fields__"].__len__()), "carries no settings"),
        (json.dumps(vars(Request("cat"))), "carries no settings"),
        (json.dumps({**vars(Request("cat")), **DREW, "denoiser": "cat"}), "carries no settings"),
        (json.dumps({**vars(Request("cat")), **DREW, "model": ["cat"]}), "carries no settings"),
        (
            json.dumps({**vars(Request("cat")), **DREW, "steps": 10**9}),
            "steps is 1000000000, expected",
        ),
        (json.dumps({**vars(Request("cat")), **DREW, "w": math.nan}), "w is nan, expected"),
    ],
)
def test_settings_of_a_foreign_picture_are_checked(tmp_path, parameters, message):
    content = png(pnginfo=_text({} if parameters is None else {"parameters": parameters}))
    with pytest.raises(InputError, match=message):
        read_png(saved(tmp_path, content), T=1000)


# ---- which model


def test_a_saved_pipeline_is_served_as_it_is(tmp_path):
    tiny_pipeline(w=1.5, caption_length=8).save_pretrained(tmp_path / "model")
    shelf = ModelStore(tmp_path / "model")
    assert not shelf.follows and shelf.steps() == [] and shelf.name == "model"
    assert shelf.studio() is shelf.studio(7)
    image = last(shelf.studio().create(Request("red heart", w=1.5, steps=2, seed=3))).images
    assert np.array_equal(
        pixels(image),
        pixels(tiny_pipeline()("red heart", w=1.5, num_inference_steps=2, seed=3).images),
    )


def test_a_model_with_a_stock_scheduler_shows_the_equations_of_its_own_noise(tmp_path):
    """Stable Diffusion's PNDM has no eta, no posterior and no single steps: ours takes its betas over."""
    stock = PNDMScheduler(
        beta_start=0.001, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True
    )
    tiny_pipeline(caption_length=8, scheduler=stock).save_pretrained(tmp_path / "model")
    studio = ModelStore(tmp_path / "model").studio()
    assert np.allclose(studio.curves()["ᾱ_t (4)"], stock.alphas_cumprod, rtol=1e-5)
    assert last(studio.create(Request("red heart", steps=2, eta=0.5))).images
    assert "(1) the chain" in studio.forward(torch.zeros(1, 3, 8, 8), 3, 0)


def test_a_model_of_few_timesteps_and_a_size_of_two_numbers_is_served(source, tmp_path):
    pipe = tiny_pipeline(caption_length=8, scheduler=DDPMScheduler(num_train_timesteps=20))
    pipe.unet.register_to_config(sample_size=(8, 8))
    pipe.save_pretrained(tmp_path / "model")
    studio = ModelStore(tmp_path / "model").studio()
    assert studio.source.resolution == 8 and studio.T == 20
    (tmp_path / "model" / "config.yaml").write_text(Config(data=source).to_yaml())
    blocks = app.build_demo(ModelStore(tmp_path / "model")).blocks.values()
    sliders = [block for block in blocks if getattr(block, "label", "") == "Steps"]
    assert len(sliders) == 3 and all(
        (slider.value, slider.maximum) == (20, 20) for slider in sliders
    )


def test_of_a_large_set_the_exact_denoiser_knows_a_part(studio, monkeypatch):
    whole = studio.set[0].captions
    monkeypatch.setattr(session, "MAX_EXACT_VALUES", 2 * 3 * studio.source.resolution**2)
    part = session.InferenceSession(studio.network, studio.name, studio.source)
    assert part.known == [whole[0], whole[-1]] and len(part.exact.unet.x_0) == 2 < len(whole)
    assert (
        np.abs(
            pixels(last(part.create(Request(whole[-1], w=0.0, steps=20), "exact")).images)
            - COLORS[whole[-1]]
        ).max()
        <= 1
    )
    monkeypatch.setattr(app, "EXAMPLES", (whole[1], whole[-1]))
    assert app.known_caption(part) == whole[-1], "what the page begins with"
    with pytest.raises(InputError, match="knows the 2 names of its pictures"):
        part.chosen("exact", whole[1])


def test_a_model_whose_pictures_are_elsewhere_is_compared_to_the_embedded_ones(tmp_path):
    tiny_pipeline(caption_length=8).save_pretrained(tmp_path / "model")
    config = Config(data=DataConfig(source=str(tmp_path / "gone"), resolution=8))
    (tmp_path / "model" / "config.yaml").write_text(config.to_yaml())
    assert ModelStore(tmp_path / "model").studio().source == DataConfig(resolution=8)


def test_a_folder_above_is_not_taken_for_the_models_own(tmp_path):
    tiny_pipeline(caption_length=8).save_pretrained(tmp_path / "mine")
    (tmp_path / "README.md").write_text("# somebody else's")
    assert "There is no model card" in ModelStore(tmp_path / "mine").card()
    (tmp_path / "config.yaml").write_text("")
    assert ModelStore(tmp_path / "mine").card() == "# somebody else's"


def test_a_model_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="does not exist, expected the folder of a run or of a saved pipeline"
    ):
        ModelStore(tmp_path / "nothing").studio()


def test_a_model_without_its_text_encoder_gets_the_one_its_settings_name(tmp_path):
    pipe = tiny_pipeline(caption_length=8)
    pipe.register_modules(text_encoder=None, tokenizer=None)
    pipe.save_pretrained(tmp_path / "model")
    with pytest.raises(
        InputError,
        match="no text encoder to read .* load it with pipeline.hub.load, .* or pass prompt_embeds",
    ):
        loading.load_pipeline(tmp_path / "model")("red heart")
    (tmp_path / "model" / "config.yaml").write_text(Config().to_yaml())
    assert (
        loading.load_pipeline(tmp_path / "model").text_encoder.config.hidden_size == 384
    )  # the embedded all-MiniLM-L6-v2


# ---- a run in progress


def saved_at(run, *steps, keep=9):
    """Checkpoints of a run as training saves them, of other weights at each step."""
    for step in steps:
        network = tiny_unet(seed=step)
        state = {"ema": ema.build_ema(network, 0.99).state_dict()}

        def write(folder, network=network, state=state):
            network.save_pretrained(folder / "unet")
            save_state(folder, "trainer", state)

        run.save(step, write, keep)


@pytest.fixture
def run(source, tmp_path):
    """A run with checkpoints at steps 10 and 20."""
    run = RunFolder(tmp_path / "run")
    run.create()
    for part in tiny_text(length=8):
        part.save_pretrained(tmp_path / "encoder")
    config = Config(
        name="run", model=ModelConfig(text_encoder=str(tmp_path / "encoder")), data=source
    )
    run.config.write_text(config.to_yaml())
    saved_at(run, 10, 20)
    return run


def spied(monkeypatch, before):
    """hub.load_checkpoint, with `before()` before the first call of it alone."""
    load, todo = loading.load_checkpoint, [before]
    monkeypatch.setattr(
        loading, "load_checkpoint", lambda *given: (todo and todo.pop()(), load(*given))[1]
    )


def test_a_page_keeps_one_network_of_a_run(run, monkeypatch):
    shelf, alive = ModelStore(run.folder), []
    page = app.build_demo(shelf)
    network = weakref.ref(shelf.studio().network)
    spied(monkeypatch, lambda: (gc.collect(), alive.append(network() is not None)))
    assert network() is not None and shelf.studio().name == "run at step 20"
    assert shelf.studio(10).name == "run at step 10" and shelf.studio(12) is shelf.studio(10)
    assert alive == [False] and page.fns, (
        "let go before the next was loaded, by the page's functions too"
    )


def test_a_checkpoint_that_is_deleted_while_it_is_read_gives_way_to_what_is_left(run, monkeypatch):
    shelf = ModelStore(run.folder)
    spied(monkeypatch, lambda: saved_at(run, 30, keep=1))
    assert shelf.studio(10).name == "run at step 30"
    shutil.rmtree(run.checkpoints)
    for step in (None, 30):
        with pytest.raises(
            InputError,
            match="^run has no checkpoint any more, expected one .*until the next is saved",
        ):
            shelf.studio(step)


def test_the_one_before_a_torn_newest_checkpoint_draws(run, caplog):
    (run.checkpoints / "20" / "unet" / "config.json").write_text("{}")
    shelf = ModelStore(run.folder)
    assert shelf.studio().name == shelf.studio(20).name == "run at step 10"
    assert "config.json is not what was written" in caplog.text
    (run.checkpoints / "10" / "trainer.json").unlink()
    with pytest.raises(
        InputError,
        match="^checkpoint run/checkpoints/10 cannot be used: trainer.json is missing, expected",
    ):
        shelf.studio()
