"""The sampling loop as an iterator, and its random numbers."""

import diffusers
import numpy as np
import pytest
import torch
from generation import STEPS, generate, plan

from pipeline.diffusion.guidance import InputError
from pipeline.diffusion.scheduler import DDPMScheduler


def test_denoise_yields_the_steps_of_the_call(pipe):
    steps = list(pipe.denoise("red heart", seed=0, num_inference_steps=STEPS, w=2.0))
    assert [int(step.t) for step in steps] == plan(pipe.scheduler, STEPS).tolist()
    assert [int(step.s) for step in steps] == [*plan(pipe.scheduler, STEPS)[1:].tolist(), -1]
    assert torch.equal(steps[-1].x_t, generate(pipe, w=2.0, output_type="latent"))
    assert torch.equal(steps[-1].x_t, steps[-1].x_0_hat)  # the last step adds no noise
    assert all(step.x_0_hat.abs().max() <= 1 for step in steps)


def test_denoise_continues_with_what_is_written_to_a_step(pipe):
    written = pipe.denoise("red heart", seed=0, num_inference_steps=2)
    next(written).x_t = torch.zeros(1, 3, 8, 8)
    x = next(written).x_t
    rest = torch.zeros(1, 3, 8, 8)
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(2)
    captions, _ = pipe.encode_prompt("red heart")
    with torch.no_grad():
        eps_hat = pipe.unet(
            rest, scheduler.timesteps[1], encoder_hidden_states=captions, return_dict=False
        )[0]
    torch.testing.assert_close(x, scheduler.step(eps_hat, scheduler.timesteps[1], rest).prev_sample)


def test_denoise_refuses_a_request_at_once(pipe):
    with pytest.raises(InputError, match="num_inference_steps"):
        pipe.denoise("red heart", num_inference_steps=0)


def test_denoise_has_no_x_0_hat_where_the_scheduler_has_none(pipe):
    pipe.scheduler = diffusers.PNDMScheduler.from_config(pipe.scheduler.config, skip_prk_steps=True)
    assert next(pipe.denoise("red heart", num_inference_steps=2, seed=0)).x_0_hat is None


def test_denoise_calls_may_interleave(pipe):

    def start(n, w):
        return pipe.denoise("red heart", w=w, seed=0, num_inference_steps=n)

    alone = [list(start(4, 2.0))[-1], list(start(3, 0.0))[-1]]
    first, second = start(4, 2.0), start(3, 0.0)
    for _ in range(3):
        one, other = next(first), next(second)
    assert torch.equal(next(first).x_t, alone[0].x_t) and torch.equal(other.x_t, alone[1].x_t)
    assert int(one.s) == int(alone[0].t)


def test_denoise_follows_given_timesteps(pipe):
    steps = list(pipe.denoise("cat", timesteps=[999, 500, 20, 0], seed=0))
    assert [int(step.t) for step in steps] == [999, 500, 20, 0]


def test_denoise_gives_the_same_bytes_from_a_seed(pipe):
    assert np.array_equal(generate(pipe, seed=7), generate(pipe, seed=7))
    assert not np.allclose(generate(pipe, seed=7), generate(pipe, seed=8), atol=1e-3)


def test_make_generators_seeds_one_generator_per_image(pipe):
    own = [torch.Generator().manual_seed(5 + i) for i in range(2)]
    assert np.array_equal(
        generate(pipe, ["cat", "dog"], generator=own), generate(pipe, ["cat", "dog"], seed=5)
    )


def test_make_generators_leaves_the_global_generator_alone(pipe):
    before = torch.get_rng_state()
    images = generate(pipe, ["cat", "cat"], seed=None)
    assert torch.equal(torch.get_rng_state(), before)
    assert not np.allclose(images[0], images[1], atol=1e-3)
    assert not np.allclose(generate(pipe, ["cat", "cat"], seed=None), images, atol=1e-3)


def test_prepare_latents_takes_given_latents(pipe):
    x_T = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert np.array_equal(generate(pipe, latents=x_T, eta=0), generate(pipe, eta=0))


def test_denoise_at_eta_zero_is_deterministic_after_x_T(pipe):
    x_T = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert np.array_equal(
        generate(pipe, latents=x_T, eta=0, seed=1), generate(pipe, latents=x_T, eta=0, seed=2)
    )
    assert not np.allclose(
        generate(pipe, latents=x_T, eta=1, seed=1),
        generate(pipe, latents=x_T, eta=1, seed=2),
        atol=1e-3,
    )
