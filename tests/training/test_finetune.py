"""Fine-tuning from Stable Diffusion's format and from our own: what trains, what is saved, and who can load it."""

import json
import re
import shutil
from pathlib import Path

import datasets
import numpy as np
import peft
import pytest
import torch
from accelerate import Accelerator
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    DDPMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
)
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from test_train import killed_after, log, same, train, weights
from tiny import seeded, tiny_pipeline, tiny_text, tiny_unet

import train_text2img
from pipeline import config as config_module
from pipeline import randomness
from pipeline.config import (
    DEFAULT,
    Config,
    ConfigError,
    DiffusionConfig,
    LoraConfig,
    TrainConfig,
    load,
)
from pipeline.data import dataset, latent_cache, sampler
from pipeline.models import build, loading, lora
from pipeline.runs.folder import ADAPTER_FILE, RunFolder

FINETUNE = """
name: tuned
data: {source: SOURCE, held_out: null, resolution: 16, cache: CACHE}
model: {pretrained: BASE}
train: {steps: 4, batch_size: 4, lr: 1e-2, log_every: 1, validate_every: 2, save_every: 2, keep: 9, threads: 1, ema: 0.5}
sample: {prompts: [red, blue], w: [0, 1], steps: 2, every: 4}
"""
LORA = (
    "--train.method",
    "lora",
    "--lora.rank",
    "2",
    "--lora.alpha",
    "6",  # alpha is not the rank: the scale is 3
    "--lora.targets",
    "[to_q, to_v, conv1, conv_shortcut, time_emb_proj]",
)


def tiny_vae(kind: str = "kl"):
    """An autoencoder of 16x16 pictures into 4 channels of 8x8."""
    if kind == "tiny":
        return seeded(
            lambda: AutoencoderTiny(
                encoder_block_out_channels=(8, 8),
                decoder_block_out_channels=(8, 8),
                num_encoder_blocks=(1, 1),
                num_decoder_blocks=(1, 1),
            )
        )
    return seeded(
        lambda: AutoencoderKL(
            block_out_channels=(8, 16),
            norm_num_groups=4,
            sample_size=16,
            scaling_factor=0.7,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
        )
    )


def stable_diffusion(scheduler=None) -> StableDiffusionPipeline:
    """A pipeline of diffusers' own, all of its parts tiny."""
    tokenizer, encoder = tiny_text("clip")
    scheduler = scheduler or PNDMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        steps_offset=1,
        skip_prk_steps=True,
    )
    pipe = StableDiffusionPipeline(
        tiny_vae(),
        encoder,
        tokenizer,
        tiny_unet(4, 8, text=False),
        scheduler,
        None,
        None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Its folder, as a download from the Hub leaves one."""
    folder = tmp_path_factory.mktemp("sd") / "base"
    stable_diffusion().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Eight squares with a black edge on the left, captions as file names."""
    folder = tmp_path_factory.mktemp("colours") / "train"
    folder.mkdir()
    for i, colour in enumerate(["red", "green", "blue", "white", "black", "grey", "pink", "brown"]):
        pixels = np.full((16, 16, 3), (30 * i, 255 - 30 * i, 128), np.uint8)
        pixels[:, :4] = 0
        Image.fromarray(pixels).save(folder / f"{colour}.png")
    return folder.parent


@pytest.fixture(scope="module")
def config(images, base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("config")
    path = folder / "tuned.yaml"
    path.write_text(
        FINETUNE.replace("SOURCE", str(images))
        .replace("CACHE", str(folder / "cache"))
        .replace("BASE", str(base))
    )
    return path


@pytest.fixture(scope="module")
def adapted(config, tmp_path_factory):
    """The folder of a LoRA run."""
    out = tmp_path_factory.mktemp("lora")
    train(config, out, *LORA)
    return out / "tuned"


def stock(base, adapter=None):
    pipe = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    if adapter:
        pipe.load_lora_weights(adapter)
    return pipe


def ours(model):
    pipe = loading.load_pipeline(model)
    pipe.scheduler = build.build_scheduler(
        DiffusionConfig(timestep_spacing="leading"), pipe.scheduler
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, **call):
    call = {
        "guidance_scale": 3.0,
        "num_inference_steps": 3,
        "generator": torch.Generator().manual_seed(0),
    } | call
    return pipe("red", output_type="np", **call).images


# ---- Stable Diffusion's format


def test_stable_diffusions_weights_draw_stable_diffusions_pixels(base):
    assert np.abs(draw(ours(base)) - draw(stock(base))).max() < 1e-4


def test_a_full_fine_tune_leaves_what_stock_diffusers_loads(config, base, tmp_path):
    train(config, tmp_path)
    tuned = tmp_path / "tuned" / "pipeline"
    before, after = (
        load_file(base / "unet" / "diffusion_pytorch_model.safetensors"),
        weights(tmp_path / "tuned"),
    )
    assert before.keys() == after.keys() and not any(
        torch.equal(before[k], after[k]) for k in before if "conv1.weight" in k
    )
    theirs = stock(tuned)
    assert np.abs(draw(theirs) - draw(ours(tmp_path / "tuned"))).max() < 1e-4
    assert np.abs(draw(theirs) - draw(stock(base))).max() > 1e-3


def test_stable_diffusion_is_guided_as_by_its_own_pipeline(base):
    assert loading.load_pipeline(base).guidance_scale == 7.5


def test_latents_are_not_clipped_whatever_stable_diffusions_scheduler_says(tmp_path):
    """A DDIMScheduler that says nothing clips to [-1, 1] and takes no offset; StableDiffusionPipeline mends both."""
    stable_diffusion(
        DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    ).save_pretrained(tmp_path)
    path = tmp_path / "scheduler" / "scheduler_config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"clip_sample": True, "steps_offset": 0})
    )
    theirs, mine = (
        StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None),
        loading.load_pipeline(str(tmp_path)),
    )
    for pipe in (theirs, mine):
        pipe.set_progress_bar_config(disable=True)
    np.testing.assert_allclose(draw(theirs), draw(mine), rtol=0, atol=1e-4)
    assert (
        not build.build_scheduler(DiffusionConfig(), mine.scheduler).config.clip_sample
        and mine.is_stable_diffusion()
    )


def test_the_scheduler_that_trained_is_the_one_that_is_saved(config, tmp_path):
    """A pretrained model's noise process is kept but for what the configuration names."""
    zero_snr = (
        "--diffusion.prediction_type",
        "v_prediction",
        "--diffusion.rescale_betas_zero_snr",
        "true",
    )
    done = train(config, tmp_path, *zero_snr, check=False)
    assert (
        done.returncode == 2
        and "train.weighting must be velocity, min_velocity or x_0" in done.stderr
    )
    train(
        config,
        tmp_path,
        *zero_snr,
        "--train.weighting",
        "velocity",
        "--diffusion.timestep_spacing",
        "trailing",
        "--train.steps",
        "1",
    )
    saved = DDPMScheduler.from_pretrained(
        tmp_path / "tuned" / "pipeline", subfolder="scheduler"
    ).config
    assert (saved.prediction_type, saved.rescale_betas_zero_snr, saved.timestep_spacing) == (
        "v_prediction",
        True,
        "trailing",
    )
    assert (saved.beta_schedule, saved.beta_end, saved.clip_sample) == (
        "scaled_linear",
        0.012,
        False,
    )


def test_checkpointed_gradients_are_the_same_gradients(config, tmp_path):
    for name, more in (("kept", ()), ("twice", ("--train.gradient_checkpointing", "true"))):
        train(config, tmp_path / name, "--train.steps", "2", "--train.precision", "no", *more)
        chosen, _ = load(["--config", str(config), *more])
        assert train_text2img.prepare(
            chosen, None, torch.device("cpu")
        ).unet.is_gradient_checkpointing == bool(more)
    a, b = weights(tmp_path / "kept" / "tuned"), weights(tmp_path / "twice" / "tuned")
    assert all(torch.allclose(a[k], b[k], atol=1e-5) for k in a)


def test_an_emoji_pipeline_is_fine_tuned_with_its_own_captions_and_patches(config, tmp_path):
    folder, cache = tmp_path / "own", str(tmp_path / "cache")
    tiny_pipeline(patch_size=2, caption_length=6, caption_dropout=0.1).save_pretrained(folder)
    train(
        config,
        tmp_path,
        "--model.pretrained",
        str(folder),
        "--data.cache",
        cache,
        "--train.steps",
        "2",
    )
    tuned = loading.load_pipeline(tmp_path / "tuned")
    assert tuned.config.caption_length == 6 and type(tuned.vae).__name__ == "PatchAutoencoder"
    assert not same(tuned.unet.state_dict(), loading.load_pipeline(folder).unet.state_dict())


# ---- LoRA


def test_only_the_adapter_is_trained_and_saved(adapted, base):
    (file,) = adapted.joinpath("lora").iterdir()
    assert not (adapted / "pipeline").exists() and RunFolder(adapted).finished
    assert sorted(p.name for p in (adapted / "checkpoints" / "4" / "lora").iterdir()) == [file.name]
    assert (
        file.stat().st_size
        < 0.2 * (base / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size
    )
    tensors = load_file(file)
    assert all(name.startswith("unet.") and ".lora_" in name for name in tensors)
    assert any(value.any() for name, value in tensors.items() if "lora_B" in name), (
        "B starts at zero and has moved"
    )
    with safe_open(file, "pt") as opened:
        assert '"unet.lora_alpha": 6' in opened.metadata()["lora_adapter_metadata"].replace(
            "\n", " "
        )


def test_the_adapter_draws_alike_in_stock_diffusers_and_here(adapted, base):
    theirs, mine, plain = draw(stock(base, adapted / "lora")), draw(ours(adapted)), draw(ours(base))
    assert np.abs(theirs - mine).max() < 1e-4
    assert np.abs(mine - plain).max() > 1e-3
    assert np.abs(draw(ours(adapted), guidance_scale=8.0) - mine).max() > 1e-3, "w still steers"


def test_the_lines_of_its_card_draw_in_stock_diffusers(adapted):
    (lines,) = re.findall(r"```python\n(.*?)```", RunFolder(adapted).card.read_text(), re.S)
    assert "guidance_scale=3)" in lines, "1 + the w of its settings"
    exec(lines, there := {})
    assert type(there["pipe"]) is StableDiffusionPipeline and there["pipe"].get_list_adapters()


def test_a_file_made_by_stock_diffusers_draws_alike_here(base, tmp_path):
    maker = stock(base)
    maker.unet.add_adapter(
        peft.LoraConfig(r=2, lora_alpha=5, target_modules=["to_q", "to_v"], init_lora_weights=False)
    )
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=peft.get_peft_model_state_dict(maker.unet),
        unet_lora_adapter_metadata=maker.unet.peft_config["default"].to_dict(),
    )
    mine = ours(base)
    mine.load_lora_weights(tmp_path)
    assert np.abs(draw(mine) - draw(maker)).max() < 1e-4


def test_a_fused_adapter_draws_the_same_and_an_unloaded_one_leaves_nothing(adapted, base):
    pipe, plain = ours(adapted), draw(ours(base))
    loose = draw(pipe)
    pipe.fuse_lora()
    assert np.abs(draw(pipe) - loose).max() < 1e-4
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert np.abs(draw(pipe) - plain).max() < 1e-5 < np.abs(loose - plain).max()


def test_a_lora_run_resumes_in_the_same_bytes(config, adapted, tmp_path):
    run = killed_after(2, adapted, tmp_path)
    assert "going on from step 2" in train(config, tmp_path, *LORA).stdout
    assert same(*(load_file(folder / "lora" / ADAPTER_FILE) for folder in (run, adapted)))
    assert log(run) == log(adapted)
    assert "is finished at step 4" in train(config, tmp_path, *LORA).stdout


def test_a_checkpoint_of_a_lora_run_draws_as_the_finished_one(adapted):
    checkpoint, finished = (
        loading.load_checkpoint(RunFolder(adapted), 4),
        loading.load_pipeline(adapted),
    )
    for pipe in (checkpoint, finished):
        pipe.set_progress_bar_config(disable=True)
    assert (
        finished.config.w == checkpoint.config.w == 2
        and finished.config.caption_dropout == checkpoint.config.caption_dropout
    )
    finished.scheduler = (
        checkpoint.scheduler
    )  # the model's own PNDM in stock diffusers' way, and what it trains with
    assert np.abs(draw(checkpoint) - draw(finished)).max() < 1e-5


@pytest.mark.parametrize("name", ["sd15-lora", "sd15-full", "noto-lora"])
def test_configs_for_models_that_are_not_here_are_rehearsed_on_tiny_ones(
    name, images, base, tmp_path
):
    own = tmp_path / "own"
    tiny_pipeline(patch_size=2, caption_length=8, caption_dropout=0.1).save_pretrained(own)
    chosen = {
        "model.pretrained": own if name == "noto-lora" else base,
        "data.source": images,
        "data.resolution": 16,
        "data.held_out": "null",
        "data.cache": tmp_path / "cache",
        "train.batch_size": 4,
        "train.threads": 1,
    }
    if name == "noto-lora":  # a tiny UNet has no shortcuts of other widths to adapt by name
        chosen["lora.targets"] = "[conv1, to_q]"
    more = [part for key, value in chosen.items() for part in (f"--{key}", str(value))]
    done = train(Path(DEFAULT).parent / f"{name}.yaml", tmp_path, *more, "--dry_run")
    assert "weights to train" in done.stdout and "steps of 4 images" in done.stdout


# ---- latents


@pytest.mark.parametrize("kind", ["kl", "tiny"])
def test_latents_are_what_the_autoencoder_says(images, tmp_path, kind):
    pictures, vae = dataset.load_images(images, resolution=16, cache_dir=tmp_path), tiny_vae(kind)
    kept = latent_cache.cache_latents(pictures, vae, tmp_path)
    rows, pixels = torch.tensor([5, 0]), pictures.images[[5, 0]].float() / 127.5 - 1
    assert len(kept) == len(pictures) and kept.shape == (4, 8, 8)
    with torch.no_grad():
        for mirrored, x in ((False, pixels), (True, pixels.flip(3))):
            found = vae.encode(x)
            which = torch.tensor([mirrored, mirrored])
            if kind == "tiny":
                wanted, spread = found.latents, torch.zeros(())
            else:
                wanted, spread = found.latent_dist.mean, found.latent_dist.std
            scale = vae.config.scaling_factor
            z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
            torch.testing.assert_close(
                kept.sample(rows, which, z * 0), wanted * scale, rtol=1e-3, atol=1e-3
            )
            torch.testing.assert_close(
                kept.sample(rows, which, z), (wanted + spread * z) * scale, rtol=2e-3, atol=2e-3
            )


def test_latents_are_encoded_once(images, tmp_path):
    pictures, vae = dataset.load_images(images, resolution=16, cache_dir=tmp_path), tiny_vae()
    calls = []
    vae.encoder.register_forward_hook(lambda *_: calls.append(1))
    z, rows = torch.zeros(8, 4, 8, 8), torch.arange(8)
    first = latent_cache.cache_latents(pictures, vae, tmp_path).sample(rows, rows < 0, z)
    once = len(calls)
    assert torch.equal(
        latent_cache.cache_latents(pictures, vae, tmp_path).sample(rows, rows < 0, z), first
    )
    assert (
        once == 3 and len(calls) == once + 1
    )  # both flips of the batch of 8, and one picture for the shape
    for i, path in enumerate(
        sorted((images / "train").iterdir())
    ):  # the same pictures, called otherwise
        (tmp_path / "renamed").mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / "renamed" / f"{i}.png")
    renamed = dataset.load_images(tmp_path / "renamed", resolution=16, cache_dir=tmp_path)
    assert renamed.fingerprint != pictures.fingerprint and renamed.captions != pictures.captions
    assert (
        torch.equal(
            latent_cache.cache_latents(renamed, vae, tmp_path).sample(rows, rows < 0, z), first
        )
        and len(calls) == once + 2
    )
    alone = latent_cache.cache_latents(pictures, vae, tmp_path, mirrored=False)
    assert len(calls) == once + 4 and torch.equal(alone.sample(rows, rows < 0, z), first)


def test_every_step_draws_another_latent_of_the_same_picture(config):
    chosen = config_module.load_file(config)
    parts = train_text2img.prepare(chosen, None, torch.device("cpu"))
    rows = [
        sampler.batch_indices(0, step, 4, len(parts.images)) for step in range(4)
    ]  # two epochs of eight
    later, slot = next(
        (step, slot) for step in (2, 3) for slot in range(4) if rows[step][slot] == rows[0][1]
    )
    drawn = lambda step: parts.examples(chosen, step, torch.arange(4))[0]
    first, again = drawn(0)[1], drawn(later)[slot]
    assert not torch.equal(first, again)
    assert torch.equal(first, drawn(0)[1])


def test_a_streams_latents_are_drawn_from_what_the_autoencoder_says_too(config, images, tmp_path):
    """As those that are kept: the same picture at two steps is two latents, as far apart as its posterior is wide."""
    rows = [
        {"image": {"bytes": path.read_bytes()}, "text": path.stem}
        for path in sorted((images / "train").glob("*.png"))
    ]
    datasets.Dataset.from_list(rows[:1]).cast_column("image", datasets.Image()).to_parquet(
        tmp_path / "one.parquet"
    )
    chosen = load(
        [
            "--config",
            str(config),
            "--data.source",
            str(tmp_path / "one.parquet"),
            "--data.streaming",
            "true",
            "--data.cache",
            str(tmp_path / "cache"),
        ]
    )[0]
    parts, slots = train_text2img.prepare(chosen, None, torch.device("cpu")), torch.arange(4)
    with train_text2img.open_stream(chosen, Accelerator(cpu=True)) as parts.stream:
        drawn = torch.cat([parts.examples(chosen, step, slots)[0] for step in range(8)])
    mean, std = latent_cache.posterior_moments(
        parts.pipe.vae, parts.images.images[:1].float() / 127.5 - 1
    )
    z = drawn / parts.pipe.vae.config.scaling_factor - mean
    assert (z / std).std().item() == pytest.approx(1, abs=0.05) and (
        z / std
    ).mean().abs().item() < 0.05


def test_mirrored_examples_come_from_the_mirrored_latents(config):
    chosen, _ = load(["--config", str(config), "--data.flip", "true"])
    parts = train_text2img.prepare(chosen, None, torch.device("cpu"))
    slots, rows = torch.arange(4), sampler.batch_indices(0, 0, 4, len(parts.images))
    flip = randomness.flips(0, 0, slots)
    assert flip.any() and not flip.all()
    z = randomness.noise(0, 0, slots, parts.latents.shape, "posterior")
    assert torch.equal(parts.examples(chosen, 0, slots)[0], parts.latents.sample(rows, flip, z))
    assert not torch.equal(
        parts.latents.sample(rows, flip, z), parts.latents.sample(rows, ~flip, z)
    )


# ---- what is refused


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (
            ["--train.method", "lora", "--lora.targets", "[to_q, to_kk]"],
            "lora.targets has to_kk, which no layer's name ends in",
        ),
        (
            ["--train.method", "lora", "--lora.targets", "[norm1]"],
            "lora.targets norm1 cannot be adapted",
        ),
        (
            ["--train.method", "lora", "--diffusion.prediction_type", "sample"],
            "noise process: leave diffusion.prediction_type out",
        ),
        (
            ["--diffusion.rescale_betas_zero_snr", "true"],
            "must be sample or v_prediction with rescale_betas_zero_snr, got epsilon",
        ),
        (["--sample.steps", "1000"], "sample: num_inference_steps is 1000, expected what "),
        (["--data.resolution", "18"], "data.resolution must be a multiple of 4 for"),
        (["--model.pretrained", "nowhere/at-all/x"], "model.pretrained: nowhere/at-all/x"),
        (
            ["--model.channels", "[64, 64]"],
            "model.channels is the pretrained model's own: leave it out",
        ),
        (["--lora.rank", "0", "--lora.alpha", "-1"], "lora.rank must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_fine_tuned_is_one_sentence(config, tmp_path, more, says):
    done = train(config, tmp_path / "bad", *more, check=False)
    assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr


def test_an_adapter_is_no_model_to_go_on_from(config, adapted, tmp_path):
    done = train(config, tmp_path / "bad", "--model.pretrained", str(adapted), check=False)
    assert (
        done.returncode == 2
        and "model.pretrained must be a whole model" in done.stderr
        and "is an adapter" in done.stderr
    )


def test_a_model_that_reads_no_captions_is_refused(config, base, tmp_path):
    pipe = loading.load_pipeline(base)
    pipe.register_modules(text_encoder=None, tokenizer=None)
    pipe.save_pretrained(tmp_path / "mute")
    done = train(config, tmp_path, "--model.pretrained", str(tmp_path / "mute"), check=False)
    assert (
        done.returncode == 2
        and "without tokenizer and text_encoder: save it with them" in done.stderr
    )


def test_adapters_without_their_method_are_refused_but_in_a_run_that_is_there(tmp_path):
    with pytest.raises(
        ConfigError, match="used by train.method lora only, not by full: leave them out, or set"
    ):
        load(["--lora.rank", "16"])
    (tmp_path / "config.yaml").write_text(Config(lora=LoraConfig(rank=16)).to_yaml())
    assert config_module.load_file(tmp_path / "config.yaml").lora.rank == 16


def test_an_adapter_needs_a_pretrained_model():
    problems = Config(train=TrainConfig(method="lora")).problems()
    assert any("train.method lora adapts a pretrained model" in problem for problem in problems)


def test_adapters_start_at_the_pretrained_network():
    x, t, states = torch.randn(1, 3, 8, 8), torch.tensor([5]), torch.randn(1, 8, 16)
    network = tiny_unet()
    with torch.no_grad():
        before = network(x, t, states).sample
        lora.add_adapter(network, LoraConfig())
        assert torch.equal(network(x, t, states).sample, before)
    assert all(
        "lora_" in name for name, weight in network.named_parameters() if weight.requires_grad
    )
    with pytest.raises(ConfigError, match=r"lora\.targets"):
        lora.add_adapter(tiny_unet(), LoraConfig(targets=("nothing",)))
