"""Samples are cached by what they depend on, and seeds share no noise."""

import json

import pytest
import torch
from diffusers.configuration_utils import FrozenDict
from tiny import tiny_pipeline, tiny_unet

from pipeline.cli import evaluate as command
from pipeline.evaluation import evaluate, samples


def test_cached_tensors_are_computed_once_and_never_in_part(tmp_path):
    path = tmp_path / "new" / "cached.safetensors"
    calls = []

    def compute():
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return {"a": torch.arange(3)}

    with pytest.raises(KeyboardInterrupt):
        samples.cached_tensors(path, compute)
    assert not path.exists()
    for _ in range(2):
        assert samples.cached_tensors(path, compute)["a"].tolist() == [0, 1, 2]
    assert len(calls) == 2


def check_that_seeds_share_no_image(folder):
    pipe = tiny_pipeline(caption_length=8)
    images = torch.cat(
        [
            samples.generate_samples(pipe, ["red"] * 3, 1.0, seed, 2, folder / f"{seed}.st", 2)
            for seed in (0, 1)
        ]
    )
    assert len({image.numpy().tobytes() for image in images}) == 6


def test_generate_samples_shares_no_noise_between_seeds(tmp_path):
    check_that_seeds_share_no_image(tmp_path)


def test_semantic_breaks_are_noticed(tmp_path, monkeypatch):
    """Seeds of neighbouring images overlap: image 1 of seed 0 is image 0 of seed 1."""
    monkeypatch.setattr(samples, "SEED_STRIDE", 1)
    with pytest.raises(AssertionError):
        check_that_seeds_share_no_image(tmp_path)


def test_samples_file_depends_on_sampler_and_open_prompts(run, monkeypatch):
    sizes = []
    generate_batch = samples.generate_batch

    def counted(pipe, prompts, **call):
        sizes.append(len(prompts))
        return generate_batch(pipe, prompts, **call)

    def measure():
        sizes.clear()
        assert command.main([str(run), "--w", "0", "--steps", "2", "--batch", "16"]) == 0
        return sum(sizes)

    monkeypatch.setattr(samples, "generate_batch", counted)
    assert measure() == 28 + 20
    assert measure() == 0
    settings = run / "pipeline" / "scheduler" / "scheduler_config.json"
    changed = json.loads(settings.read_text()) | {"timestep_spacing": "leading"}
    settings.write_text(json.dumps(changed))
    assert measure() == 28 + 20
    monkeypatch.setattr(evaluate, "OPEN_PROMPTS", evaluate.OPEN_PROMPTS[:3])
    assert measure() == 3


def test_samples_identity_is_the_same_in_another_process(references):
    """A scheduler notes which settings are defaults, in an order that differs between processes."""
    found = []
    for noted in (["beta_start", "beta_end"], ["beta_end", "beta_start"]):
        pipe = tiny_pipeline(caption_length=8)
        settings = dict(pipe.scheduler.config) | {"_use_default_values": noted}
        pipe.scheduler._internal_dict = FrozenDict(settings)
        found.append(samples.samples_identity(pipe, references))
    assert found[0] == found[1]
    pipe.unet = tiny_unet(seed=1)
    assert samples.samples_identity(pipe, references) != found[0]


@pytest.mark.parametrize("bf16", [True, False])
def test_generate_samples_computes_in_the_precision_of_training(bf16, monkeypatch, tmp_path):
    pipe = tiny_pipeline(caption_length=8)
    dtypes = set()
    monkeypatch.setattr(samples, "has_bf16", lambda device: bf16)
    pipe.unet.conv_in.register_forward_hook(lambda net, args, out: dtypes.add(out.dtype))
    path = tmp_path / "images.safetensors"
    images = samples.generate_samples(pipe, ["red", "blue"], 1.0, 0, 2, path, 2)
    assert dtypes == {torch.bfloat16 if bf16 else torch.float32}
    assert images.shape == (2, 3, 8, 8)
