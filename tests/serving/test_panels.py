"""The exact denoiser, and the lecture's panels: noise forwards, the film strip backwards."""

import numpy as np
import pytest
from serving_data import COLOURS, last, pixels

from pipeline.diffusion.guidance import InputError
from pipeline.serving import session as session_module
from pipeline.serving.requests import Request
from pipeline.serving.session import STRIP_COLUMNS, InferenceSession


def distance(image, name):
    """Return the absolute differences of an image from a caption's colour."""
    return np.abs(pixels([image]) - COLOURS[name])


# ---- the exact denoiser


def test_exact_generates_a_captions_image_without_a_network(data):
    session = InferenceSession(None, "exact", data)
    image = last(session.create(Request("green heart", w=0.0, steps=20))).images[0]
    assert distance(image, "green heart").max() <= 1


def test_exact_shares_the_networks_scheduler(session):
    image = last(session.create(Request("blue circle", w=0.0, steps=20), "exact")).images[0]
    assert distance(image, "blue circle").max() <= 1
    assert session.exact.scheduler is session.trained.scheduler


def test_select_pipeline_refuses_what_exact_does_not_know(session):
    with pytest.raises(InputError, match="its 3 captions, got 'red hart'.* red heart"):
        session.select_pipeline("exact", "red hart")
    with pytest.raises(InputError, match="best"):
        session.select_pipeline("best")


def test_exact_knows_a_part_of_a_large_dataset(session, monkeypatch):
    captions = session.splits[0].captions
    first, second, third = captions
    most = 2 * 3 * session.data.resolution**2
    monkeypatch.setattr(session_module, "MAX_EXACT_VALUES", most)
    part = InferenceSession(session.trained, session.name, session.data)
    assert part.known_captions == [first, third]
    assert len(part.exact.unet.x_0) == 2
    image = last(part.create(Request(third, w=0.0, steps=20), "exact")).images[0]
    assert distance(image, third).max() <= 1
    monkeypatch.setattr(session_module, "EXAMPLES", [second, third])
    assert part.default_prompt() == third
    with pytest.raises(InputError, match="2 captions"):
        part.select_pipeline("exact", second)


# ---- forwards


def test_forward_shows_jump_chain_and_both_predictions(session):
    panels = session.forward(session.find_image("red heart"), 1000, 3, "red heart")
    jump, chain, exact = "(5) direct jump", "(1) chain", "(15) x̂_0, exact"
    assert list(panels) == ["x_0", jump, chain, "(15) x̂_0, network", exact]
    assert distance(panels["x_0"], "red heart").max() <= 1
    image = pixels([panels["x_0"]])
    # With the caption the exact denoiser knows the image.
    assert np.abs(pixels([panels[exact]]) - image).max() <= 1
    # Neither the jump nor the chain leaves anything of it.
    assert np.abs(pixels([panels[jump]]) - image).mean() > 40
    assert np.abs(pixels([panels[chain]]) - image).mean() > 40


@pytest.mark.parametrize("panel", ["(5) direct jump", "(1) chain"])
def test_forward_adds_little_noise_in_one_step(session, panel):
    panels = session.forward(session.find_image("yellow square"), 1, 3)
    # sqrt(beta_1) = 0.01
    assert 0 < distance(panels[panel], "yellow square").mean() < 3


def test_forward_predicts_a_training_image_for_a_held_out_one(session):
    panels = session.forward(session.find_image("yellow square"), 10, 3)
    prediction = panels["(15) x̂_0, exact"]
    assert min(distance(prediction, name).max() for name in list(COLOURS)[:3]) <= 1


def test_forward_gives_exact_no_caption_it_does_not_know(session):
    x_0 = session.find_image("yellow square")
    told = session.forward(x_0, 500, 3, "yellow square")
    untold = session.forward(x_0, 500, 3, "")
    network, exact = "(15) x̂_0, network", "(15) x̂_0, exact"
    assert list(told)[-2:] == [network, f"{exact}, no caption"]
    assert np.array_equal(told[f"{exact}, no caption"], untold[exact])
    assert not np.array_equal(told[network], untold[network])


def test_find_image_refuses_an_unknown_caption(session):
    with pytest.raises(InputError, match="4 captions, got 'purple'"):
        session.find_image("purple")


def test_schedule_curves_are_the_schedule(session):
    beta, abar, snr, posterior = map(np.array, session.schedule_curves().values())
    assert np.allclose(beta, np.linspace(1e-4, 0.02, 1000), atol=1e-9)
    assert np.allclose(abar, np.cumprod(1 - beta))
    assert np.allclose(snr, abar / (1 - abar))
    assert posterior[0] == 0
    assert np.allclose(posterior[1:], beta[1:] * (1 - abar[:-1]) / (1 - abar[1:]))


# ---- backwards


def test_backward_goes_from_noise_to_the_image(session):
    options = {"w": 3.0, "eta": 0.0, "seed": 4}
    *_, strip = session.backward(Request("red heart", steps=20, **options))
    timesteps = [t for t, _, _ in strip]
    assert len(strip) == STRIP_COLUMNS
    assert timesteps[-1] == 0
    assert timesteps == sorted(timesteps, reverse=True)
    images = session.trained("red heart", num_inference_steps=20, **options).images
    assert np.array_equal(pixels([strip[-1][1]]), pixels(images))
