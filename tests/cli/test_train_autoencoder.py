"""`direct-jump train-autoencoder`: a run that resumes to the same bytes and leaves a model."""

import os
import signal

import pytest
import torch
from safetensors.torch import load_file as load_tensors
from training_runs import COLOURS, write_images, write_template

from pipeline.cli import train_autoencoder
from pipeline.config import AutoencoderConfig, ModelConfig, load, load_file
from pipeline.diffusion.autoencoder import ConvAutoencoder
from pipeline.hub.export import export
from pipeline.hub.model_card import TRAINING_FACTS
from pipeline.models.build import build_autoencoder
from pipeline.runs.folder import RunFolder
from pipeline.training import autoencoder
from pipeline.training.autoencoder import AutoencoderTrainer, psnr

TINY = """
name: tiny
data: {source: SOURCE, resolution: 16, cache: CACHE}
model: {block_out_channels: [3, 4, 8, 8], encoder_layers: 1, decoder_layers: 1, latent_channels: 4}
train: {steps: 6, batch_size: 4, crop: 8, lr: 1e-3, optimizer: muon, log_every: 1,
        validate_every: 3, save_every: 2, keep: 9, threads: 1}
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The settings of a small run on colours, two of which are held out."""
    folder = tmp_path_factory.mktemp("autoencoder")
    (folder / "images").mkdir()
    images = write_images(folder / "images", COLOURS, 20, edge=4, held_out=("red", "cyan"))
    values = {"SOURCE": images, "CACHE": folder / "cache"}
    return write_template(folder / "tiny.yaml", TINY, values)


def train(config, out, *more):
    """Run the command in this process and return the run's folder."""
    threads = torch.get_num_threads()
    arguments = ["--config", str(config), "--output", str(out), *more]
    try:
        code = train_autoencoder.main(arguments)
    finally:
        torch.set_num_threads(threads)
    return code, RunFolder(out / "tiny")


def weights(run):
    return load_tensors(run.autoencoder / "diffusion_pytorch_model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_leaves_a_model_a_log_and_a_card(config, tmp_path, capsys):
    code, run = train(config, tmp_path)
    assert code == 0
    vae = ConvAutoencoder.from_pretrained(run.autoencoder, use_safetensors=True)
    assert vae.config.latent_channels == 4
    images, _ = train_autoencoder.load_splits(load_file(run.config, AutoencoderConfig).data)
    with torch.no_grad():
        z = vae.eval().encode(images.images[:] / 127.5 - 1).latents
    z = (z - vae.config.shift_factor) * vae.config.scaling_factor
    assert z.mean().item() == pytest.approx(0, abs=1e-3)
    assert z.std().item() == pytest.approx(1, abs=1e-3)
    history = run.history()
    assert [line["step"] for line in history if "psnr" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in history if "held_out_psnr" in line] == [3, 6]
    assert run.steps() == [2, 4, 6]
    card = run.card.read_text()
    assert "| held out | 2 |" in card
    assert "| training | 10 |" in card
    assert (run.folder / "images" / "reconstructions.png").is_file()
    assert (run.folder / TRAINING_FACTS).is_file()
    train(config, tmp_path)
    assert "finished" in capsys.readouterr().out


def test_a_stopped_run_ends_in_the_bytes_of_an_unbroken_one(config, tmp_path, monkeypatch, capsys):
    _, whole = train(config, tmp_path / "whole")
    step = AutoencoderTrainer.step

    def stop_at_3(self):
        if self.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self)

    monkeypatch.setattr(AutoencoderTrainer, "step", stop_at_3)
    code, broken = train(config, tmp_path / "broken")
    assert code == 143
    assert "after step 3" in capsys.readouterr().out
    assert not broken.autoencoder.exists()
    monkeypatch.undo()
    code, broken = train(config, tmp_path / "broken")
    assert code == 0
    assert same(weights(broken), weights(whole))
    logged = [[line.get("psnr") for line in run.history()] for run in (broken, whole)]
    assert logged[0] == logged[1]


def test_a_run_that_diverges_ends_without_a_result(config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(autoencoder, "psnr", lambda restored, x, floor: restored.mean() * torch.nan)
    code, run = train(config, tmp_path, "--train.max_skipped", "2")
    assert code == 1
    assert "train.lr" in capsys.readouterr().err
    assert not run.autoencoder.exists()


def test_other_settings_and_other_images_do_not_resume(config, tmp_path, capsys):
    train(config, tmp_path, "--train.steps", "2")
    code, _ = train(config, tmp_path, "--train.latent_noise", "0.5")
    assert code == 2
    assert "train.latent_noise" in capsys.readouterr().err
    other = tmp_path / "other"
    other.mkdir()
    images = write_images(other, COLOURS[:4], 30)
    text = config.read_text().replace(str(config.parent / "images"), str(images))
    changed = tmp_path / "other.yaml"
    changed.write_text(text)
    code, _ = train(changed, tmp_path, "--train.steps", "4")
    assert code == 2


def test_a_dry_run_times_steps_and_saves_nothing(config, tmp_path, capsys):
    code, run = train(config, tmp_path, "--dry_run")
    assert code == 0
    printed = capsys.readouterr().out
    assert "6 steps of" in printed
    assert "a new run" in printed
    assert not run.folder.exists()


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (("--train.crop", "12"), "train.crop"),
        (("--train.crop", "24"), "data.resolution"),
        (("--train.method", "lora"), "train.method"),
        (("--train.latent_noise", "-1"), "train.latent_noise"),
    ],
)
def test_bad_settings_are_one_error(config, tmp_path, capsys, changed, named):
    code, run = train(config, tmp_path, *changed)
    assert code == 2
    message = capsys.readouterr().err
    assert named in message
    assert "Traceback" not in message
    assert not run.folder.exists()


def test_psnr_of_an_error_of_one_grey_level_is_48_db():
    x = torch.zeros(2, 3, 8, 8)
    expected = 20 * torch.log10(torch.tensor([255.0, 25.5]))
    found = psnr(torch.stack([x[0] + 2 / 255, x[1] + 20 / 255]), x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


def test_a_step_decodes_noisy_latents(config, tmp_path):
    losses = []
    for noise in ("0", "3"):
        argv = ["--config", str(config), "--output", str(tmp_path), "--train.latent_noise", noise]
        chosen, _ = load(argv, AutoencoderConfig)
        images, _ = train_autoencoder.load_splits(chosen.data)
        accelerator = train_autoencoder.start_accelerator(chosen)
        losses.append(AutoencoderTrainer(chosen, accelerator, images).step().loss)
    assert losses[0] < losses[1]


def test_each_step_cuts_other_crops_from_the_next_images(config, tmp_path):
    chosen, _ = load(["--config", str(config), "--output", str(tmp_path)], AutoencoderConfig)
    images, _ = train_autoencoder.load_splits(chosen.data)
    trainer = AutoencoderTrainer(chosen, train_autoencoder.start_accelerator(chosen), images)
    first = trainer.batch()
    assert first.shape == (4, 3, 8, 8)
    assert torch.equal(trainer.batch(), first)
    crops = images.images[:].float().div(127.5).sub(1).unfold(2, 8, 1).unfold(3, 8, 1)
    both = torch.cat([crops.flatten(0, 0), crops.flip(5)])  # (2N, 3, 9, 9, 8, 8)
    both = both.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
    for crop in first:
        assert (both == crop).flatten(1).all(1).any()
    trainer.global_step = 3
    assert not torch.equal(trainer.batch(), first)


def test_export_halves_the_weights_and_names_no_local_path(config, tmp_path):
    _, run = train(config, tmp_path)
    folder = export(run.folder, tmp_path / "shipped")
    stored = load_tensors(folder / "diffusion_pytorch_model.safetensors")
    whole = weights(run)
    assert stored.keys() == whole.keys()
    for name, weight in stored.items():
        assert torch.equal(weight, whole[name].half() if weight.is_floating_point() else weight)
    vae = build_autoencoder(ModelConfig(autoencoder=str(folder)))
    assert vae.dtype == torch.float32
    for path in (folder / "README.md", folder / "config.yaml", folder / "config.json"):
        assert str(config.parent) not in path.read_text()
    assert (folder / "images" / "reconstructions.png").is_file()
