"""--more, --features and --clip measure the same samples in more ways."""

import json

import pytest
import torch
from diffusers import DDIMScheduler
from tiny import tiny_clip, tiny_unet
from torch import nn

from pipeline import TextToImagePipeline
from pipeline.cli import evaluate as command
from pipeline.config import DiffusionConfig
from pipeline.evaluation import distances, evaluate
from pipeline.evaluation.feature_extractor import FEATURE_NETWORK
from pipeline.hub import model_card
from pipeline.models.build import build_scheduler

SAMPLING = ["--w", "1", "--steps", "2", "--batch", "16"]


class Colours(nn.Module):
    """A feature network: mean and deviation of each colour, (B, 6); `images` counts its inputs."""

    images = 0

    def forward(self, images):
        Colours.images += len(images)
        x = images.float() / 255
        return torch.cat([x.mean((2, 3)), x.std((2, 3))], 1)


@pytest.fixture
def colours(monkeypatch):
    """A second network, and smaller features and fewer samples, to save time."""
    frechet = distances.frechet_distance
    monkeypatch.setitem(evaluate.FEATURE_NETWORKS, "colours", Colours)
    monkeypatch.setattr(distances, "frechet_distance", lambda x, y: frechet(x[:, :16], y[:, :16]))
    monkeypatch.setattr(evaluate, "DIVERSITY_SAMPLES", (4, 2))
    monkeypatch.setattr(Colours, "images", 0)


@pytest.fixture
def measure(run):
    """Evaluate the run, and return what metrics.json holds."""

    def evaluate_with(*arguments):
        assert command.main([str(run), *SAMPLING, *arguments]) == 0
        return json.loads((run / "metrics.json").read_text())

    return evaluate_with


@pytest.mark.slow
def test_extra_metrics_measure_the_same_samples(run, measure, colours, capsys):
    facts = model_card.training_facts("28 images", 1.0) | {"model": str(run / "pipeline")}
    (run / model_card.TRAINING_FACTS).write_text(json.dumps(facts))
    plain = measure()
    assert not (run / "README.md").exists(), "a card would declare an unfinished run finished"
    (run / "README.md").write_text("a card")
    assert set(plain["by_seed"]["0"]["distances"]) == {FEATURE_NETWORK}
    assert "frechet" not in plain["by_seed"]["0"]["distances"][FEATURE_NETWORK]
    assert "more" not in plain
    capsys.readouterr()
    found = measure("--more", "--features", "colours")
    by_network = found["by_seed"]["0"].pop("distances")
    del plain["by_seed"]["0"]["distances"]
    assert found["by_seed"]["0"] == plain["by_seed"]["0"]
    assert set(by_network) == {FEATURE_NETWORK, "colours"}
    for by in by_network.values():
        assert by["frechet"]["n"] == 14
        assert by["frechet"]["value"] > by["frechet"]["real"] > 0
        assert by["kid"]["n"] == 28
    more = found["more"]
    assert set(more["errors"]) == {"timesteps", "train", "held_out"}
    assert set(more["diversity"]) == {"1"}
    bits = {name: by["value"] for name, by in more["bits_per_dimension"].items()}
    assert bits["model"] == pytest.approx(bits["prior"] + bits["steps"] + bits["decoder"])
    assert bits["model"] > bits["png"]
    assert all(by["n"] == 6 for by in more["bits_per_dimension"].values())
    text = capsys.readouterr().out
    for words in (f"KID ({FEATURE_NETWORK})", "KID (colours)", "Fréchet distance (", "bits/dim"):
        assert words in text
    section = model_card.metrics_section(json.loads((run / "metrics.json").read_text()))
    assert section in text
    assert section in (run / "README.md").read_text()
    assert measure()["more"] == more, "what still holds was lost"
    tiny_unet(sample_size=16, seed=1).save_pretrained(run / "pipeline" / "unet")
    assert "more" not in measure(), "it is of other weights"


def test_feature_distances_cache_what_is_known_of_real_images(run, colours, tmp_path, monkeypatch):
    _config, _extractor, references, _pipe = evaluate.load_run(run)
    frechet = distances.frechet_distance
    pairs = []

    def counted(x, y):
        pairs.append(len(x))
        return frechet(x, y)

    def measure():
        return evaluate.feature_distances("colours", references, references.images, tmp_path)

    monkeypatch.setattr(distances, "frechet_distance", counted)
    first = measure()
    assert Colours.images == 56
    assert pairs == [14, 14]
    assert first.frechet.value == pytest.approx(first.frechet.real), "the samples are real images"
    assert measure() == first
    assert Colours.images == 56 + 28
    assert len(pairs) == 3
    references.images[0, 0, 0, 0] ^= 1
    measure()
    assert Colours.images == 56 + 28 + 56, "other images have other statistics"


def test_clip_score_is_of_samples_and_real_images(measure, tmp_path, capsys):
    clip = tiny_clip(tmp_path / "tiny-clip")
    found = measure("--clip", str(clip))["by_seed"]["0"]["clip"]
    assert found["model"] == "tiny-clip"
    assert found["samples"]["n"] == found["real"]["n"] == 28
    assert "CLIP score (tiny-clip)" in capsys.readouterr().out


@pytest.mark.slow
def test_extra_metrics_of_a_stock_scheduler_use_our_equations(run, measure, colours, capsys):
    """A base of an adapter samples by its own scheduler, which has no equations."""

    def save_with(scheduler):
        pipe = TextToImagePipeline.from_pretrained(run / "pipeline")
        pipe.scheduler = scheduler(pipe.scheduler)
        pipe.save_pretrained(run / "pipeline")

    def values():
        more = measure("--more")["more"]
        return more["errors"]["train"]["x_0"], more["bits_per_dimension"]["model"]["value"]

    save_with(lambda scheduler: DDIMScheduler.from_config(scheduler.config))
    by_stock = values()
    assert command.main([str(run), "--from-real", "500", "--steps", "2"]) == 2
    assert "DDIMScheduler" in capsys.readouterr().err
    save_with(lambda scheduler: build_scheduler(DiffusionConfig(), scheduler))
    assert by_stock == values()
