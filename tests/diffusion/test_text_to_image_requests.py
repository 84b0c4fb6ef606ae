"""Requests that the pipeline refuses, by the value it names."""

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler
from generation import STEPS, generate
from tiny import WIDTH, tiny_pipeline

from pipeline.diffusion.guidance import InputError, interval
from pipeline.diffusion.scheduler import DDPMScheduler

STATES = torch.zeros(1, 8, WIDTH)
# The offending value, as a regular expression, for each bad request.
REFUSED = [
    ("prompt", {"prompt": None}),
    ("prompt_embeds", {"prompt_embeds": STATES}),
    (r"prompt .*\[\]", {"prompt": []}),
    ("prompt .*3", {"prompt": 3}),
    (r"prompt .*\['a', None\]", {"prompt": ["a", None]}),
    (r"prompt .*a \\ud83d cat", {"prompt": "a \ud83d cat"}),
    (r"prompt_embeds .*\(8, 16\)", {"prompt": None, "prompt_embeds": torch.zeros(8, WIDTH)}),
    (
        r"prompt_embeds .*\(prompts, 8, width\).*\(1, 5, 16\)",
        {"prompt": None, "prompt_embeds": torch.zeros(1, 5, WIDTH)},
    ),
    ("negative_prompt .*2 .*1 prompts", {"negative_prompt": ["a", "b"]}),
    ("negative_prompt .*3", {"negative_prompt": 3}),
    (
        "negative_prompt and negative_prompt_embeds",
        {"negative_prompt": "a", "negative_prompt_embeds": STATES},
    ),
    (
        r"negative_prompt_embeds .*\(2, 8, 16\)",
        {"negative_prompt_embeds": STATES.expand(2, 8, WIDTH)},
    ),
    ("w and guidance_scale", {"w": 1.0, "guidance_scale": 2.0}),
    ("w .*inf", {"w": float("inf")}),
    ("w .*nan", {"w": float("nan")}),
    ("w .*'2'", {"w": "2"}),
    ("guidance_scale .*'2'", {"guidance_scale": "2"}),
    ("w .*2 values .*1 prompts", {"w": [1.0, 2.0]}),
    ("num_inference_steps .*1000.* 0", {"num_inference_steps": 0}),
    ("num_inference_steps .*-5", {"num_inference_steps": -5}),
    ("num_inference_steps .*1001", {"num_inference_steps": 1001}),
    (r"num_inference_steps .*2\.5", {"num_inference_steps": 2.5}),
    ("num_inference_steps .*True", {"num_inference_steps": True}),
    ("num_images_per_prompt .* 0", {"num_images_per_prompt": 0}),
    ("eta .*1.5", {"eta": 1.5}),
    ("eta .*nan", {"eta": float("nan")}),
    ("seed and generator", {"seed": 1, "generator": torch.Generator()}),
    ("seed .*-1", {"seed": -1}),
    (r"seed .*1\.5", {"seed": 1.5}),
    ("1 generators.* 2", {"seed": None, "generator": [torch.Generator(), torch.Generator()]}),
    (r"latents .*\(1, 3, 8, 8\).*\(1, 3, 4, 4\)", {"latents": torch.zeros(1, 3, 4, 4)}),
    ("height .*1.* 0", {"height": 0}),
    ("width .*1.* 8.0", {"width": 8.0}),
    ("output_type .*latent.*'jpg'", {"output_type": "jpg"}),
    ("tensor_inputs .*'image'", {"callback_on_step_end_tensor_inputs": ["image"]}),
]


@pytest.fixture(scope="module")
def model():
    return tiny_pipeline(caption_length=8)


@pytest.mark.parametrize(("offence", "bad"), REFUSED)
def test_check_inputs_refuses_bad_requests(model, offence, bad):
    request = {"prompt": "red heart", "seed": 0, "num_inference_steps": STEPS} | bad
    with pytest.raises(InputError, match=offence):
        model(**request)


def test_prepare_extra_step_kwargs_refuses_eta_of_fixed_large():
    pipe = tiny_pipeline(scheduler=DDPMScheduler(variance_type="fixed_large"))
    assert generate(pipe, eta=1.0).shape == (1, 8, 8, 3)
    with pytest.raises(InputError, match="eta .*fixed_large.* 0.5"):
        generate(pipe, eta=0.5)


def test_prepare_extra_step_kwargs_ignores_foreign_settings():
    """from_config keeps settings that a stock scheduler does not read."""
    foreign = DDPMScheduler(variance_type="fixed_large").config
    pipe = tiny_pipeline(scheduler=DDIMScheduler.from_config(foreign))
    assert pipe.scheduler.config.variance_type == "fixed_large"
    assert generate(pipe, eta=0).shape == (1, 8, 8, 3)


def test_prepare_scheduler_refuses_flow_matching():
    flow = tiny_pipeline(scheduler=diffusers.FlowMatchEulerDiscreteScheduler())
    with pytest.raises(InputError, match="FlowMatchEulerDiscreteScheduler .*init_noise_sigma"):
        generate(flow)


def test_prepare_scheduler_refuses_impossible_plans():
    pipe = tiny_pipeline(
        scheduler=DDPMScheduler(timestep_spacing="leading", steps_offset=1), caption_length=8
    )
    with pytest.raises(InputError, match="num_inference_steps.* 1000.*got 1000 … 1"):
        pipe("cat", num_inference_steps=1000)
    with pytest.raises(InputError, match=r"timesteps.* \[0, 10\]"):
        pipe("cat", timesteps=[0, 10])


def test_prepare_scheduler_allows_as_many_steps_as_betas():
    pipe = tiny_pipeline(
        scheduler=DDPMScheduler(trained_betas=[0.1, 0.2, 0.9], timestep_spacing="trailing")
    )
    assert generate(pipe, num_inference_steps=3).shape == (1, 8, 8, 3)
    with pytest.raises(InputError, match="num_inference_steps .* 3, got 4"):
        generate(pipe, num_inference_steps=4)


def test_denoise_refuses_what_a_scheduler_does_not_take(pipe):
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(InputError, match="EulerDiscreteScheduler .*eta.* 0.5"):
        generate(pipe, eta=0.5)
    pipe.scheduler = DDIMScheduler()
    with pytest.raises(InputError, match="DDIMScheduler .*timesteps"):
        generate(pipe, timesteps=[10, 0])
    pipe.scheduler = diffusers.EDMEulerScheduler()
    with pytest.raises(InputError, match="EDMEulerScheduler"):
        generate(pipe, w=interval(2.0, 0.2, 0.8))
