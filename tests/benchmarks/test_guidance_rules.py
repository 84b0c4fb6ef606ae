"""The guidance rules of the benchmark are those of diffusers."""

import numpy as np
import pytest
import torch
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from tiny import WORDS, tiny_pipeline

from benchmarks import guidance
from pipeline.diffusion.guidance import guide

W = torch.tensor(2.0)


def test_rescale_is_diffusers():
    c, u = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for phi in (0.0, 0.7, 1.0):
        theirs = rescale_noise_cfg(u + 3 * (c - u), c, phi)
        assert torch.allclose(guidance.Rescale(phi)(c, u, W), theirs, atol=1e-5)


def test_apg_is_diffusers_over_the_steps_of_a_call():
    generator = torch.Generator().manual_seed(0)
    apg = guidance.Apg(r=9.0, momentum=-0.5, eta=0.3)
    buffer = MomentumBuffer(-0.5)
    for _ in range(3):
        c, u = torch.randn(2, 3, 4, 8, 8, generator=generator)
        theirs = normalized_guidance(c, u, 2.0, buffer, 0.3, 9.0, use_original_formulation=True)
        assert torch.allclose(apg(c, u, W), theirs, atol=1e-5)
    free = guidance.Apg(r=float("inf"), momentum=0.0, eta=1.0)
    assert torch.allclose(free(c, u, W), guide(c, u, 2.0), atol=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_guided_with_a_rule_that_changes_nothing_is_plain(prediction):
    """Whatever the network predicts: x_0 and back again."""
    pipe = tiny_pipeline(caption_length=8)
    pipe.scheduler.register_to_config(prediction_type=prediction)
    guided = guidance.Guided(**pipe.components, caption_length=8)
    guided.set_progress_bar_config(disable=True)
    request = {"w": 2.0, "seed": 0, "num_inference_steps": 3, "output_type": "np"}
    expected = pipe(list(WORDS[:2]), **request).images
    for rule in (guidance.plain, guidance.Apg(r=float("inf"), momentum=0.0, eta=1.0)):
        guided.rule = rule
        assert np.abs(guided(list(WORDS[:2]), **request).images - expected).max() < 1e-3
