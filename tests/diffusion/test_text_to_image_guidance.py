"""Guidance (17) in the pipeline: what w means and which rows the network sees."""

import numpy as np
import pytest
import torch
from generation import STEPS, assert_close, generate, plan, rows_per_call
from tiny import tiny_pipeline

from pipeline.diffusion import text_to_image
from pipeline.diffusion.guidance import interval
from pipeline.diffusion.scheduler import DDPMScheduler
from pipeline.diffusion.text_to_image import noise_level


def test_call_keeps_diffusers_guidance_scale(pipe):
    for w in (0.0, 0.5, 6.5):
        assert np.array_equal(generate(pipe, guidance_scale=1 + w), generate(pipe, w=w))
    for scale in (
        0,
        0.5,
        lambda level: 0.0,
    ):  # without guidance, as in diffusers; the lecture's -1 is w's alone
        assert np.array_equal(generate(pipe, guidance_scale=scale), generate(pipe, w=0.0))
    assert not np.allclose(
        generate(pipe, guidance_scale=1.0), generate(pipe, guidance_scale=7.5), atol=1e-3
    )


def test_predict_without_guidance_sees_one_row(pipe):
    assert rows_per_call(pipe, w=0.0) == [1] * STEPS


def test_predict_at_w_minus_one_ignores_the_prompt(pipe):
    assert rows_per_call(pipe, w=-1.0) == [1] * STEPS
    assert_close(generate(pipe, w=-1.0), generate(pipe, "", w=0.0))
    assert_close(generate(pipe, w=-1.0), generate(pipe, "cat", w=-1.0))


def test_predict_with_guidance_doubles_the_rows(pipe):
    assert rows_per_call(pipe, w=2.0) == [2] * STEPS


def test_predict_in_an_interval_doubles_the_rows_there(pipe):
    levels = [noise_level(pipe.scheduler, t) for t in plan(pipe.scheduler, 5)]
    inside = interval(2.0, levels[3], levels[1])
    assert rows_per_call(pipe, w=inside, num_inference_steps=5) == [1, 2, 2, 2, 1]


def test_call_takes_a_weight_per_prompt(pipe):
    prompts, w = ["red heart", "cat", "dog"], [0.0, 2.0, -1.0]
    assert rows_per_call(pipe, prompt=prompts, w=w) == [4] * STEPS
    for images, own in (
        (generate(pipe, prompts, w=w), w),
        (generate(pipe, prompts, guidance_scale=[1, 3.0, 0.5]), [0, 2.0, 0]),
    ):
        for i in range(3):
            assert_close(images[i], generate(pipe, prompts[i], seed=i, w=own[i])[0])
    assert generate(pipe, prompts, guidance_scale=torch.tensor([1, 3, 0.5])).shape == images.shape
    twice = generate(pipe, prompts, w=torch.tensor(w), num_images_per_prompt=2)
    assert_close(twice[3], generate(pipe, "cat", seed=3, w=2.0)[0])


def test_call_takes_w_as_a_constant_function(pipe):
    assert np.array_equal(generate(pipe, w=lambda level: 2.0), generate(pipe, w=2.0))


def test_noise_level_is_the_noise_of_add_noise():
    """x_t of the zero image has the standard deviation that (5) gives its noise."""
    scheduler, eps = (
        DDPMScheduler(),
        torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)),
    )
    for t in (0, 300, 999):
        x_t = scheduler.add_noise(torch.zeros_like(eps), eps, torch.tensor([t]))
        assert noise_level(scheduler, torch.tensor(t)) == pytest.approx(
            float(x_t.std() / eps.std()), rel=1e-4
        )


@pytest.mark.parametrize("w", [-1.0, 2.0, 7.5])
def test_call_with_an_empty_prompt_ignores_w(pipe, w):
    assert_close(generate(pipe, "", w=w), generate(pipe, "", w=0.0))


def test_call_with_a_huge_w_is_still_linear():
    """Without clipping one step is affine: x_0(w) = x_0(0) + w (x_0(0) - x_0(-1))."""
    pipe = tiny_pipeline(
        scheduler=DDPMScheduler(
            timestep_spacing="trailing", clip_sample=False, prediction_type="sample"
        )
    )
    plain, empty, huge = (
        generate(pipe, w=w, num_inference_steps=1, output_type="latent") for w in (0.0, -1.0, 1e6)
    )
    torch.testing.assert_close(huge, plain + 1e6 * (plain - empty), rtol=1e-4, atol=1.0)
    assert (
        huge.abs().max() > 1e3
        and generate(tiny_pipeline(), w=1e6, output_type="latent").isfinite().all()
    )


def test_call_uses_the_pipelines_w_by_default():
    assert np.array_equal(generate(tiny_pipeline(w=2.0)), generate(tiny_pipeline(), w=2.0))


def test_call_puts_negative_prompt_for_the_empty_caption(pipe):
    assert np.array_equal(generate(pipe, negative_prompt="", w=2.0), generate(pipe, w=2.0))
    assert_close(generate(pipe, negative_prompt="dog", w=-1.0), generate(pipe, "dog", w=0.0))


@pytest.mark.parametrize(
    ("dropout", "w", "warned"),
    [(0.0, 2.0, True), (0.0, 0.0, False), (0.1, 2.0, False), (None, 2.0, False)],
)
def test_denoise_warns_of_guidance_without_caption_dropout(caplog, dropout, w, warned):
    generate(tiny_pipeline(caption_dropout=dropout), w=w)
    assert ("trained without caption dropout" in caplog.text) == warned


def test_semantic_breaks_are_noticed(pipe, monkeypatch):
    """guidance_scale taken for w."""
    monkeypatch.setattr(text_to_image, "w_from_guidance_scale", lambda scale: scale)
    with pytest.raises(AssertionError):
        test_call_keeps_diffusers_guidance_scale(pipe)
