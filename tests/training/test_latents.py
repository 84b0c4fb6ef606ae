"""Latents of a learned autoencoder: encoded once, sampled at every step, mirrored as images."""

import shutil

import datasets
import pytest
import torch
from accelerate import Accelerator
from datasets_on_disk import load_images
from finetuning import tiny_vae
from training_runs import check_refused, train

from pipeline import randomness
from pipeline.config import load, load_file
from pipeline.data import latent_cache, sampler
from pipeline.diffusion.autoencoder import ConvAutoencoder
from pipeline.models.loading import load_pipeline
from pipeline.training.task import TrainingTask, open_stream

CPU = torch.device("cpu")
SLOTS = torch.arange(4)


@pytest.mark.parametrize("kind", ["kl", "tiny"])
def test_cache_latents_holds_the_autoencoders_posterior(edged, tmp_path, kind):
    images, vae = load_images(edged, resolution=16, cache_dir=tmp_path), tiny_vae(kind)
    cached = latent_cache.cache_latents(images, vae, tmp_path)
    rows, pixels = torch.tensor([5, 0]), images.images[[5, 0]].float() / 127.5 - 1
    assert len(cached) == len(images)
    assert cached.shape == (4, 8, 8)
    scale = vae.config.scaling_factor
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    for mirrored, x in ((False, pixels), (True, pixels.flip(3))):
        with torch.no_grad():
            encoded = vae.encode(x)
        if kind == "tiny":
            mean, std = encoded.latents, torch.zeros(())
        else:
            mean, std = encoded.latent_dist.mean, encoded.latent_dist.std
        which = torch.tensor([mirrored, mirrored])
        for noise, tolerance in ((z * 0, 1e-3), (z, 2e-3)):
            found, wanted = cached.sample(rows, which, noise), (mean + std * noise) * scale
            torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def test_cache_latents_encodes_once(edged, tmp_path):
    images, vae = load_images(edged, resolution=16, cache_dir=tmp_path), tiny_vae()
    calls, z, rows = [], torch.zeros(8, 4, 8, 8), torch.arange(8)
    vae.encoder.register_forward_hook(lambda *_: calls.append(1))

    def latents(images, **options):
        cached = latent_cache.cache_latents(images, vae, tmp_path, **options)
        return cached.sample(rows, rows < 0, z)

    first = latents(images)
    assert len(calls) == 3  # both flips of the batch of 8, and one image for the shape
    assert torch.equal(latents(images), first)
    assert len(calls) == 4
    renamed = tmp_path / "renamed"
    renamed.mkdir()
    for i, path in enumerate(sorted((edged / "train").iterdir())):
        shutil.copy(path, renamed / f"square {i}.png")
    others = load_images(renamed, resolution=16, cache_dir=tmp_path)
    assert others.fingerprint != images.fingerprint
    assert others.captions != images.captions
    assert torch.equal(latents(others), first)
    assert len(calls) == 5
    assert torch.equal(latents(images, mirrored=False), first)
    assert len(calls) == 7


def test_a_new_model_trains_in_the_latents_of_a_trained_autoencoder(config, tmp_path):
    vae = ConvAutoencoder((3, 4, 8, 16), 1, 1, latent_channels=4)
    vae.train()(torch.randn(8, 3, 16, 16))  # moves its averages
    vae.save_pretrained(tmp_path / "vae")
    chosen = ("--model.patch_size", "null", "--model.autoencoder", str(tmp_path / "vae"))
    train(config, tmp_path, *chosen, "--train.steps", "2")
    pipe = load_pipeline(tmp_path / "tiny")
    assert (pipe.unet.config.in_channels, pipe.unet.config.sample_size) == (4, 2)
    assert not pipe.scheduler.config.clip_sample
    for name, weight in vae.state_dict().items():
        assert torch.equal(pipe.vae.state_dict()[name], weight)
    assert pipe("red", num_inference_steps=2).images[0].size == (16, 16)


def test_training_in_latents_refuses_sizes_that_do_not_fit(config, tmp_path):
    ConvAutoencoder((3, 4, 8, 16), 1, 1).save_pretrained(tmp_path / "vae")
    chosen = ("--model.patch_size", "null", "--model.autoencoder", str(tmp_path / "vae"))
    done = train(config, tmp_path, *chosen, "--data.resolution", "24", check=False)
    check_refused(done, "data.resolution", 16, 24)


def test_get_batch_samples_another_latent_at_every_step(tuning):
    task = TrainingTask.build(load_file(tuning), CPU)
    # Two epochs of eight images.
    rows = [sampler.batch_indices(0, step, 4, len(task.images)) for step in range(4)]
    places = [(step, slot) for step in (2, 3) for slot in range(4)]
    later, slot = next(place for place in places if rows[place[0]][place[1]] == rows[0][1])
    first, again = task.get_batch(0, SLOTS).x_0[1], task.get_batch(later, SLOTS).x_0[slot]
    assert not torch.equal(first, again)
    assert torch.equal(first, task.get_batch(0, SLOTS).x_0[1])


def test_get_batch_samples_a_streams_latents_from_the_posterior(tuning, edged, tmp_path):
    """The same image at two steps is two latents, as far apart as its posterior is wide."""
    path = sorted((edged / "train").glob("*.png"))[0]
    rows = [{"image": {"bytes": path.read_bytes()}, "text": path.stem}]
    table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    table.to_parquet(tmp_path / "one.parquet")
    more = ("--data.source", str(tmp_path / "one.parquet"), "--data.streaming", "true")
    argv = ["--config", str(tuning), *more, "--data.cache", str(tmp_path / "cache")]
    config, _ = load(argv)
    task = TrainingTask.build(config, CPU)
    with open_stream(config, Accelerator(cpu=True)) as task.stream:
        latents = torch.cat([task.get_batch(step, SLOTS).x_0 for step in range(8)])
    vae, pixels = task.pipe.vae, task.images.images[:1].float() / 127.5 - 1
    mean, std = latent_cache.posterior_moments(vae, pixels)
    z = (latents / vae.config.scaling_factor - mean) / std
    assert z.std().item() == pytest.approx(1, abs=0.05)
    assert z.mean().item() == pytest.approx(0, abs=0.05)


def test_get_batch_mirrors_latents_of_chosen_images(tuning):
    config, _ = load(["--config", str(tuning), "--data.flip", "true"])
    task = TrainingTask.build(config, CPU)
    rows = sampler.batch_indices(0, 0, 4, len(task.images))
    flip = randomness.flips(0, 0, SLOTS)
    assert flip.any()
    assert not flip.all()
    z = randomness.noise(0, 0, SLOTS, task.latents.shape, "posterior")
    expected = task.latents.sample(rows, flip, z)
    assert torch.equal(task.get_batch(0, SLOTS).x_0, expected)
    assert not torch.equal(task.latents.sample(rows, ~flip, z), expected)
