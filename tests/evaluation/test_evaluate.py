"""An evaluation measures what a run samples, and resumes where it was interrupted."""

import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from tiny import tiny_autoencoder, tiny_unet

from pipeline.cli import evaluate as command
from pipeline.data.image_ops import as_float
from pipeline.diffusion.exact_denoiser import ExactDenoiser
from pipeline.diffusion.text_to_image import TextToImagePipeline
from pipeline.evaluation import evaluate, samples
from pipeline.evaluation.feature_extractor import FEATURE_NETWORK
from pipeline.evaluation.retrieval import EvaluationError
from pipeline.models.loading import load_pipeline
from pipeline.runs.folder import RunFolder

SAMPLING = ["--steps", "2", "--batch", "16"]


def test_measure_samples_ranks_real_images_first(feature_extractor, references):
    def measure(images):
        rows = torch.arange(len(references.captions))
        return evaluate.measure_samples(feature_extractor, references, images, rows, 0.1, 4)

    found = measure(references.images)
    assert found.train.recall_at_1.value == found.held_out.recall_at_1.value == 1
    assert found.seam_ratio == pytest.approx(1)
    sizes = {name: recall.recall_at_1.n for name, recall in found.grids.items()}
    assert sizes == {"circles": 2, "hearts": 2, "squares": 2}
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(256, references.images.shape, generator=generator, dtype=torch.uint8)
    of_noise = measure(noise).distances[FEATURE_NETWORK].kid.value
    # Below 0 by the bias of pairs of an image with itself.
    assert found.distances[FEATURE_NETWORK].kid.value < 0 < of_noise


def test_evaluate_resumes_and_chooses_the_best_w(run, references, monkeypatch, capsys):
    """The samples that choose w are the real images at w = 1, so w = 1 is chosen."""
    calls = []
    generate = TextToImagePipeline.__call__

    def counted(self, prompts, **options):
        calls.append((options["w"], options["seed"], len(prompts)))
        if len(calls) == interrupt_at:
            raise KeyboardInterrupt
        if calls[-1][:2] == (1, 1000_000_000):
            rows = [references.captions.index(prompt) for prompt in prompts]
            return SimpleNamespace(images=references.images[rows] / 255)
        return generate(self, prompts, **options)

    monkeypatch.setattr(TextToImagePipeline, "__call__", counted)
    arguments = [str(run), "--w", "0", "1", "--seeds", "0", "3", "--choose-on", "5", *SAMPLING]
    interrupt_at = 3
    assert command.main(arguments) == 130
    assert calls == [(0, 1000_000_000, 5), (1, 1000_000_000, 5), (1, 0, 16)]
    calls.clear()
    interrupt_at = None
    assert command.main(arguments) == 0
    # All captions, then open prompts, of both seeds; the choice is cached.
    seeds = [0, 16, 0, 16, 3_000_000, 3_000_016, 3_000_000, 3_000_016]
    assert [seed for _, seed, _ in calls] == seeds
    first = json.loads((run / "metrics.json").read_text())
    calls.clear()
    assert command.main(arguments) == 0
    assert not calls
    assert json.loads((run / "metrics.json").read_text()) == first
    assert first["w"] == 1
    assert first["by_seed"]["0"] != first["by_seed"]["3"]
    assert first["references"]["chance"] == {"recall@1": 1 / 28, "recall@5": 5 / 28}
    assert "held-out combinations: recall@1" in capsys.readouterr().out
    # Five columns of the 20 prompts.
    assert Image.open(run / "images" / "free.png").size == (825, 660)


def test_evaluate_lets_a_seed_report_that_chooses_nothing(run):
    assert command.main([str(run), "--w", "1", *SAMPLING, "--seeds", "1000"]) == 0
    assert list(json.loads((run / "metrics.json").read_text())["by_seed"]) == ["1000"]


def test_evaluate_measures_a_model_with_an_autoencoder(run):
    """Its decoder returns images channels last, which safetensors does not save."""
    pipe = load_pipeline(run)
    pipe.register_modules(vae=tiny_autoencoder(), unet=tiny_unet(channels=4))
    pipe.save_pretrained(run / "pipeline")
    assert command.main([str(run), "--w", "1", *SAMPLING]) == 0
    assert json.loads((run / "metrics.json").read_text())["by_seed"]["0"]["train"]


@pytest.mark.parametrize(
    ("arguments", "offending"),
    [
        (["--clip", "none/such"], "none/such"),
        (["--features", "inception-v3"], "inception-v3"),
        (["--w", "1", "--choose-on", "9"], "one --w"),
        (["--w", "1", "--choose-seed", "7"], "one --w"),
        (["--seeds", "1000"], "1000"),
        (["--from-real", "9", "--seeds", "5"], "seeds"),
        (["--from-real", "9", "--more"], "more"),
        (["--from-real", "9", "--w", "0", "1"], "got 2"),
    ],
)
def test_evaluate_refuses_before_the_first_sample(run, capsys, monkeypatch, arguments, offending):
    monkeypatch.setattr(samples, "generate_samples", lambda *_args: pytest.fail("it samples"))
    assert command.main([str(run), *arguments]) == 2
    assert offending in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "offending"),
    [
        (["--choose-on", "0"], "got 0"),
        (["--steps", "-1"], "got -1"),
        (["--seed", "3"], "--seed"),
        (["--features", "vgg"], "vgg"),
    ],
)
def test_build_parser_refuses_bad_arguments(run, capsys, arguments, offending):
    with pytest.raises(SystemExit) as exit_code:
        command.main([str(run), *arguments])
    assert exit_code.value.code == 2
    assert offending in capsys.readouterr().err


def test_load_run_refuses_an_unfinished_run(tmp_path, capsys):
    RunFolder(tmp_path / "new").create()
    assert command.main([str(tmp_path / "new")]) == 2
    assert str(tmp_path / "new") in capsys.readouterr().err


def test_denoise_real_images_is_as_good_as_the_chain_below(run, references, feature_extractor):
    """The exact denoiser returns the image that it still sees, and any image where it sees none."""
    *_, pipe = evaluate.load_run(run)
    pipe.unet = ExactDenoiser(as_float(references.train), pipe.scheduler)
    rows = torch.arange(references.n_train)

    def denoise(t, **options):
        parts = (feature_extractor, references, pipe, rows)
        return evaluate.denoise_real_images(*parts, t, w=0.0, seed=0, steps=50, **options)

    low_t, low = denoise(19)
    high_t, high = denoise(999)
    assert (low_t, high_t) == (19, 999)
    assert low.recall_at_1.value == 1
    assert high.recall_at_1.value < 0.5
    assert denoise(999, batch=5) == (999, high)
    with pytest.raises(EvaluationError, match="50 steps has no timestep up to 5"):
        denoise(5)


def test_evaluate_from_real_prints_every_timestep(run, capsys):
    arguments = ["--from-real", "999", "19", "--w", "0", "--choose-on", "4"]
    assert command.main([str(run), *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["from t = 999", "from t = 19"]


def test_update_metrics_replaces_those_of_another_model(tmp_path, capsys):
    evaluate.update_metrics(tmp_path, "abc-def", w=1.0)
    found = evaluate.update_metrics(tmp_path, "abc-def", num_inference_steps=5)
    assert (found.w, found.num_inference_steps) == (1.0, 5)
    assert not capsys.readouterr().err
    found = evaluate.update_metrics(tmp_path, "abc-def-float32", w=2.0)
    assert (found.w, found.num_inference_steps) == (2.0, None)
    assert str(tmp_path / "metrics.json") in capsys.readouterr().err
    evaluate.update_metrics(tmp_path, "another", w=2.0)
    assert not capsys.readouterr().err
