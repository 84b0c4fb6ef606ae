"""The benchmarks run, and compare like with like."""

import numpy as np
import pytest
import torch
from tiny import tiny_pipeline

from benchmarks import autoencoder, bench, growth, guidance, muon, sampling, scheduler, training
from pipeline.diffusion.autoencoder import ConvAutoencoder


def test_contenders_sample_the_same_pixels_by_the_same_calls():
    pipe = tiny_pipeline(sample_size=16, patch_size=2, caption_length=8)
    some = sampling.Contenders(pipe, 2, 5, 2.0, bf16=False)
    ours = some.call_ours()
    assert np.abs(ours - some.call_stock()).max() < sampling.LEVEL
    assert np.abs(ours - some.call_ours(w=0)).max() > sampling.LEVEL
    rows = []
    hook = pipe.unet.register_forward_pre_hook(lambda net, args: rows.append(len(args[0])))
    for call in (some.call_ours, some.call_stock, some.call_network):
        call()
    assert rows == [4] * 15
    rows.clear()
    guided, share = some.half_guided()
    some.call_ours(guided)
    hook.remove()
    assert len(rows) == 5
    assert rows.count(4) / 5 == share


@pytest.mark.slow
def test_sampling_writes_its_section(run, quick_section):
    text = quick_section(sampling, "--model", run)
    assert text.count("| 8 ancestral steps |") == 1
    assert "| 1 steps, UniPC |" in text
    assert "float32, batch 2" in text
    assert "What limits it" in text


def test_autoencoder_writes_its_section(quick_section, tmp_path):
    ConvAutoencoder((3, 4, 8, 16), 1, 1).save_pretrained(tmp_path / "vae")
    text = quick_section(autoencoder, "--model", tmp_path / "vae", "--cache", tmp_path / "cache")
    assert "| shapes | 22 |" in text
    assert "decode, bfloat16, batch 8" in text
    assert "the goal is ≥ 33: **not met**" in text


def test_measure_speed_refuses_other_pixels(monkeypatch):
    pipe = tiny_pipeline(sample_size=16, caption_length=8)
    contenders = sampling.Contenders
    monkeypatch.setattr(contenders, "call_stock", lambda self: 1 - self.call_ours())
    with pytest.raises(AssertionError, match="batch 1"):
        sampling.measure_speed(pipe, [1], 2, 1, 1.0)


@pytest.mark.slow
def test_scheduler_writes_its_section(run, quick_section):
    text = quick_section(scheduler, "--model", run)
    assert "| 4,096 |" in text
    assert "share of sampling, batch 1" in text


@pytest.mark.slow
def test_guidance_writes_its_section(run, quick_section):
    text = quick_section(guidance, "--model", run, "--w", 1, 8)
    assert all(f"| 8 | {rule} |" in text for rule in guidance.RULES)


@pytest.mark.slow
def test_training_and_muon_write_their_sections(tiny_config, quick_section, monkeypatch):
    monkeypatch.setattr(bench, "MATRIX_SIZE", 256)
    text = quick_section(training, "--config", tiny_config)
    assert "example, float32, cached" in text
    assert "like for like, float32, batch 2" in text
    text = quick_section(muon, "--config", tiny_config)
    assert "| 2 | adamw |" in text
    assert "| 2 | muon |" in text
    assert "<!-- training: generated -->" in text


def test_example_step_trains_another_network_on_our_images(tiny_config):
    """Its files hold the pixels that ours is trained on, and its step leaves our network alone."""
    runner = training.StepRunner(training.load_config(str(tiny_config), 2), bf16=False)
    image = runner.task.images.images[3]
    pixels = training.read_png(training.encode_png(image), 16)
    assert torch.allclose(pixels, image.float() / 127.5 - 1)
    before = runner.weights[0].clone()
    training.example_step(runner.task, bf16=False, cached=False)()
    assert torch.equal(runner.weights[0], before)
    runner.step()
    assert not torch.equal(runner.weights[0], before)


@pytest.mark.slow
def test_growth_writes_its_section(tiny_config, quick_section, tmp_path):
    """One point runs in a process of its own; reading is measured in this one."""
    text = quick_section(growth, "--config", tiny_config)
    assert "| 1 | 64 | 10 |" in text
    path = str(tmp_path / "some.parquet")
    growth.write_point(path, 128, 16)
    for streaming in (False, True):
        found = growth.read_point(path, 128, 16, streaming)
        assert found["peak"] >= found["before"] > 100
        assert found["seconds"][0] > 0
