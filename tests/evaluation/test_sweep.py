"""A sweep changes one parameter at a time, samples every point once, and resumes."""

import json

import pytest
from PIL import Image
from tiny import tiny_unet

from pipeline.cli import evaluate as evaluate_command
from pipeline.cli import sweep as command
from pipeline.config import load_file
from pipeline.diffusion.text_to_image import TextToImagePipeline
from pipeline.evaluation import sweep
from pipeline.evaluation.feature_extractor import FEATURE_NETWORK
from pipeline.evaluation.retrieval import EvaluationError
from pipeline.hub import model_card
from pipeline.runs.folder import RunFolder
from pipeline.runs.results import Kid, Proportion, Sweep, SweepPoint

WORDS = ["w=0,1", "steps=2,3", "eta=0,1", "interval=0:1,0.99:1", "weights=averaged,raw"]
BASE = ["--w", "1", "--steps", "2", "--on", "8", "--batch", "5"]


class Calls(list):
    interrupt_at = None


@pytest.fixture
def calls(monkeypatch):
    """The pipeline's calls; the list's `interrupt_at` interrupts that one."""
    made = Calls()
    generate = TextToImagePipeline.__call__

    def counted(self, prompts, **options):
        w = "interval" if callable(options["w"]) else options["w"]
        made.append((len(prompts), options["num_inference_steps"], options.get("eta"), w))
        if len(made) == made.interrupt_at:
            raise KeyboardInterrupt
        return generate(self, prompts, **options)

    monkeypatch.setattr(TextToImagePipeline, "__call__", counted)
    return made


@pytest.mark.slow
def test_sweep_resumes_and_measures_each_parameter(run, calls, capsys):
    RunFolder(run).create()
    raw = tiny_unet(sample_size=16, seed=1)
    RunFolder(run).save(5, lambda path: raw.save_pretrained(path / "unet"), keep=1)
    arguments = [str(run), *WORDS, *BASE]
    calls.interrupt_at = 5
    assert command.main(arguments) == 130
    assert calls == [(5, 2, 1, 1), (3, 2, 1, 1), (5, 2, 1, 0), (3, 2, 1, 0), (5, 3, 1, 1)]
    calls.clear()
    calls.interrupt_at = None
    capsys.readouterr()
    assert command.main(arguments) == 0
    points = [(3, 1, 1), (2, 0, 1), (2, 1, "interval"), (2, 1, 1)]
    assert calls == [(n, *point) for point in points for n in (5, 3)]
    calls.clear()
    output = capsys.readouterr()
    assert "6 points" in output.err
    assert "call/s" in output.err
    assert command.main(arguments) == 0
    assert not calls

    metrics = json.loads((run / "metrics.json").read_text())
    found = metrics["sweep"]
    base = found["base"]
    assert (found["captions"], found["features"]) == (8, FEATURE_NETWORK)
    settings = {"w": "1", "steps": "2", "eta": "1", "interval": "0:1", "weights": "averaged"}
    assert base["at"] == settings
    at = {name: {point["at"]: point for point in curve} for name, curve in found["curves"].items()}
    assert {name: ",".join(points) for name, points in at.items()} == dict(
        word.split("=") for word in WORDS
    )
    for name, value in settings.items():
        assert at[name][value] | {"at": 0} == base | {"at": 0}, "each curve goes through the base"
    all_points = [point for points in at.values() for point in points.values()]
    others = [point["kid"]["value"] for point in all_points if point["kid"] != base["kid"]]
    assert len(others) == len(set(others)) == 5, "each parameter changes the samples"
    places = (("w", "0"), ("w", "1"), ("steps", "3"), ("interval", "0.99:1"))
    assert [at[name][value]["calls"] for name, value in places] == [2, 4, 6, 3]

    line = f"interval = 0.99:1: KID ({FEATURE_NETWORK})"
    assert line in output.out
    assert Image.open(run / "images" / "sweep.png").size == (770, 550)
    facts = model_card.training_facts("", 1.0)
    config = load_file(run / "config.yaml")
    card = str(model_card.build_card(config, facts, ["sweep.png"], metrics=metrics))
    assert "![sweep](images/sweep.png)" in card
    assert line in card


def test_sweep_of_every_caption_reuses_the_evaluations_samples(run, calls):
    assert evaluate_command.main([str(run), "--w", "1", "--steps", "2"]) == 0
    before = json.loads((run / "metrics.json").read_text())
    calls.clear()
    assert command.main([str(run), "w=1", "--w", "1", "--steps", "2", "--on", "999"]) == 0
    found = json.loads((run / "metrics.json").read_text())
    assert not calls
    kid = before["by_seed"]["0"]["distances"][FEATURE_NETWORK]["kid"]
    assert found.pop("sweep")["base"]["kid"] == kid
    assert found == before


def test_plot_sweep_has_a_curve_a_parameter():
    def point(at, x, y):
        recall = Proportion(x, (x - 0.1, x + 0.2), 1, 2)
        kid = Kid(y, 0.1, (y - 0.2, y + 0.2), 2)
        return SweepPoint(at=at, recall_at_1=recall, recall_at_5=recall, kid=kid, calls=1)

    curves = {"w": [point("0", 0.2, 1.0), point("2", 0.6, 0.5)], "eta": [point("0", 0.4, 0.8)]}
    (ax,) = sweep.plot_sweep(Sweep("net", 2, 0, point({}, 0.6, 0.5), curves)).axes
    w, eta = ax.containers
    assert (w.get_label(), eta.get_label()) == ("w", "eta")
    assert w.lines[0].get_xydata().tolist() == [[0.2, 1.0], [0.6, 0.5]]
    across, up = w.lines[2]
    assert across.get_segments()[0][:, 0].tolist() == pytest.approx([0.1, 0.4])
    assert up.get_segments()[0][:, 1].tolist() == pytest.approx([1 - 0.196, 1 + 0.196])
    assert [text.get_text() for text in ax.texts] == ["0", "2", "0"]
    assert "KID (net)" in ax.get_ylabel()


@pytest.mark.parametrize(
    "words",
    [
        ["speed=1"],
        ["w=a"],
        ["w=inf"],
        ["w"],
        ["steps=0"],
        ["eta=2"],
        ["interval=0.9:0.3"],
        ["interval=1"],
        ["weights=best"],
        ["w=0", "w=1"],
    ],
)
def test_parse_sweep_refuses_what_it_cannot_read(words):
    with pytest.raises(EvaluationError, match=f"'{words[-1]}'"):
        sweep.parse_sweep(words)


@pytest.mark.parametrize(
    ("arguments", "offending"),
    [
        (["interval=0.3:0.9"], "w = 0"),
        (["weights=raw"], "weights=raw"),
        (["w=0,1", "--on", "3"], "--on 3 of 28"),
        (["steps=2000"], "2000"),
    ],
)
def test_sweep_refuses_before_the_first_sample(run, calls, capsys, arguments, offending):
    assert command.main([str(run), *arguments]) == 2
    assert offending in capsys.readouterr().err
    assert not calls


def test_sweep_refuses_an_eta_that_the_scheduler_does_not_take(run, calls, capsys):
    path = run / "pipeline" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"variance_type": "fixed_large"}))
    assert command.main([str(run), "eta=0,1"]) == 2
    assert "fixed_large" in capsys.readouterr().err
    assert not calls
