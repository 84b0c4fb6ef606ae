"""Callbacks and interruption (P14, P15, P24)."""

import numpy as np
import pytest
import torch
from diffusers.callbacks import SDCFGCutoffCallback
from generation import STEPS, generate, plan
from tiny import tiny_pipeline

from pipeline import TextToImagePipeline
from pipeline.diffusion.guidance import InputError
from pipeline.diffusion.text_to_image import noise_level


def test_callback_sees_and_changes_the_tensors(pipe):
    seen = []

    def at_the_end_zero(pipe, i, t, tensors):
        seen.append((i, int(t), set(tensors)))
        return (
            {"latents": torch.zeros_like(tensors["latents"])} if i == pipe.num_timesteps - 1 else {}
        )

    names = pipe._callback_tensor_inputs
    x = generate(
        pipe,
        callback_on_step_end=at_the_end_zero,
        callback_on_step_end_tensor_inputs=names,
        output_type="latent",
    )
    assert x.abs().sum() == 0
    assert seen == [(i, int(t), set(names)) for i, t in enumerate(plan(pipe.scheduler, STEPS))]
    generate(
        pipe, callback_on_step_end=at_the_end_zero, callback_on_step_end_tensor_inputs=["latents"]
    )
    assert seen[-1][2] == {"latents"}


def test_callback_changes_captions_of_later_steps(pipe):
    other, _ = pipe.encode_prompt("green cat")

    def swap(pipe, i, t, tensors):
        return {"prompt_embeds": other}

    swapped = generate(
        pipe, callback_on_step_end=swap, callback_on_step_end_tensor_inputs=["prompt_embeds"]
    )
    assert not np.allclose(swapped, generate(pipe), atol=1e-3)


def test_callback_may_raise_guidance_scale(pipe):
    def raise_it(pipe, i, t, tensors):
        pipe._guidance_scale += 1.0
        return tensors

    raised = generate(pipe, guidance_scale=2.0, callback_on_step_end=raise_it)
    assert pipe.guidance_scale == 2.0 + pipe.num_timesteps
    levels = [noise_level(pipe.scheduler, t) for t in plan(pipe.scheduler, STEPS)]
    assert np.array_equal(raised, generate(pipe, w=lambda level: 1.0 + levels.index(level)))
    of_tensors = generate(
        pipe, guidance_scale=torch.tensor([2.0]), callback_on_step_end=raise_it
    )  # which `+=` changes in place
    assert np.array_equal(of_tensors, raised)


def test_callback_of_diffusers_stops_the_guidance(pipe):
    levels = [noise_level(pipe.scheduler, t) for t in plan(pipe.scheduler, STEPS)]
    cut = generate(
        pipe,
        w=3.0,
        callback_on_step_end=SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1),
    )
    assert np.array_equal(
        cut, generate(pipe, w=lambda level: 3.0 if levels.index(level) < 2 else 0.0)
    )
    assert not np.allclose(cut, generate(pipe, w=3.0), atol=1e-3)


def test_callback_that_drops_a_row_is_refused(pipe):
    """diffusers' documentation stops guidance this way: there the rows are u and c."""

    def halve(pipe, i, t, tensors):
        return {"prompt_embeds": tensors["prompt_embeds"].chunk(2)[-1]}

    call = {"callback_on_step_end": halve, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    with pytest.raises(InputError, match=r"prompt_embeds .*\(1, .*\(2, "):
        generate(pipe, ["red heart", "cat"], **call)


def test_callback_may_start_to_guide_with_given_states():
    pipe = tiny_pipeline()
    states, empty = pipe.encode_prompt("red heart")
    pipe.register_modules(text_encoder=None, tokenizer=None)

    def start_to_guide(pipe, i, t, tensors):
        pipe._guidance_scale = 3.0
        return {}

    given = {"prompt_embeds": states, "negative_prompt_embeds": empty}
    changed = generate(pipe, None, w=0.0, callback_on_step_end=start_to_guide, **given)
    assert np.abs(changed - generate(pipe, None, w=0.0, **given)).max() > 1e-3


@pytest.mark.parametrize("name", ["interrupt", "_interrupt"])
def test_interrupt_stops_within_one_step(pipe, name):
    """`_interrupt` is the name in diffusers' documentation."""
    seen = []

    def stop(pipe, i, t, tensors):
        seen.append(tensors["latents"])
        setattr(pipe, name, i == 1)
        return tensors

    x = generate(pipe, callback_on_step_end=stop, output_type="latent")
    assert len(seen) == 2 and pipe.interrupt
    assert torch.equal(x, seen[1])
    generate(pipe)
    assert not pipe.interrupt


def test_callback_that_raises_still_frees_the_hooks():
    freed = []

    class Watched(TextToImagePipeline):
        def maybe_free_model_hooks(self):
            freed.append(True)
            super().maybe_free_model_hooks()

    def fail(pipe, i, t, tensors):
        raise RuntimeError("stop here")

    pipe = Watched(**tiny_pipeline().components)
    with pytest.raises(RuntimeError, match="stop here"):
        generate(pipe, callback_on_step_end=fail)
    assert freed == [True]
