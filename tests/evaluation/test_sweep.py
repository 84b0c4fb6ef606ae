"""A sweep changes one knob at a time, draws every point once, and shows quality against alignment."""

import json

import pytest
from PIL import Image
from test_evaluate import folder, run, untrained  # noqa: F401
from tiny import tiny_unet

from pipeline.cli import evaluate
from pipeline.config import load_file
from pipeline.diffusion.text_to_image import TextToImagePipeline
from pipeline.evaluation import sweep
from pipeline.evaluation.feature_extractor import FEATURE_NETWORK
from pipeline.evaluation.retrieval import EvaluationError
from pipeline.hub import model_card
from pipeline.runs.folder import RunFolder

WORDS = ["w=0,1", "steps=2,3", "eta=0,1", "interval=0:1,0.99:1", "weights=averaged,raw"]
BASE = ["--w", "1", "--steps", "2", "--on", "8", "--batch", "5"]


@pytest.fixture
def calls(monkeypatch):
    """What the pipeline was asked for; the list's `stop_at` interrupts that call."""

    class Calls(list):
        stop_at = None

    made, draw = Calls(), TextToImagePipeline.__call__

    def counted(self, prompts, **options):
        w = "interval" if callable(options["w"]) else options["w"]
        made.append((len(prompts), options["num_inference_steps"], options.get("eta"), w))
        if len(made) == made.stop_at:
            raise KeyboardInterrupt
        return draw(self, prompts, **options)

    monkeypatch.setattr(TextToImagePipeline, "__call__", counted)
    return made


def test_a_sweep_goes_on_where_it_stopped_and_shows_each_knob(run, calls, capsys):
    RunFolder(run).create()
    RunFolder(run).save(
        5, lambda path: tiny_unet(sample_size=16, seed=1).save_pretrained(path / "unet"), keep=1
    )
    command, calls.stop_at = [str(run), "--sweep", *WORDS, *BASE], 5
    with pytest.raises(KeyboardInterrupt):
        evaluate.main(command)
    assert calls == [(5, 2, 1, 1), (3, 2, 1, 1), (5, 2, 1, 0), (3, 2, 1, 0), (5, 3, 1, 1)]
    calls.clear()
    calls.stop_at = None
    assert evaluate.main(command) == 0
    assert calls == [
        (n, *point)
        for point in [(3, 1, 1), (2, 0, 1), (2, 1, "interval"), (2, 1, 1)]
        for n in (5, 3)
    ]
    calls.clear()
    said = capsys.readouterr()
    assert "6 points" in said.err and "call/s" in said.err  # a bar with the time that is left
    assert evaluate.main(command) == 0
    assert not calls

    found = json.loads((run / "metrics.json").read_text())["sweep"]
    assert found["captions"] == 8 and found["features"] == FEATURE_NETWORK
    assert found["base"]["at"] == {
        "w": "1",
        "steps": "2",
        "eta": "1",
        "interval": "0:1",
        "weights": "averaged",
    }
    at = {
        knob: {point["at"]: point for point in points} for knob, points in found["curves"].items()
    }
    assert {knob: list(points) for knob, points in at.items()} == {
        "w": ["0", "1"],
        "steps": ["2", "3"],
        "eta": ["0", "1"],
        "interval": ["0:1", "0.99:1"],
        "weights": ["averaged", "raw"],
    }
    for knob, value in found["base"]["at"].items():
        assert {**at[knob][value], "at": 0} == {**found["base"], "at": 0}, (
            "each curve goes through the base"
        )
    others = [
        point
        for points in at.values()
        for point in points.values()
        if point["kid"] != found["base"]["kid"]
    ]
    assert len(others) == 5 and len({point["kid"]["value"] for point in others}) == 5, (
        "each knob changes what is drawn"
    )
    assert [
        at[k][v]["calls"]
        for k, v in (("w", "0"), ("w", "1"), ("steps", "3"), ("interval", "0.99:1"))
    ] == [2, 4, 6, 3]

    assert f"interval = 0.99:1: kid ({FEATURE_NETWORK})" in said.out
    assert Image.open(run / "images" / "sweep.png").size == (770, 550)
    metrics = json.loads((run / "metrics.json").read_text())
    shown = str(
        model_card.build_card(
            load_file(run / "config.yaml"),
            model_card.training_facts("", 1.0),
            ["sweep.png"],
            metrics=metrics,
        )
    )
    assert (
        "![sweep](images/sweep.png)" in shown
        and f"interval = 0.99:1: kid ({FEATURE_NETWORK})" in shown
    )


def test_a_sweep_of_every_caption_starts_from_what_is_drawn_already(run, calls):
    assert evaluate.main([str(run), "--w", "1", "--steps", "2"]) == 0
    before = json.loads((run / "metrics.json").read_text())
    calls.clear()
    assert (
        evaluate.main([str(run), "--sweep", "w=1", "--w", "1", "--steps", "2", "--on", "999"]) == 0
    )
    found = json.loads((run / "metrics.json").read_text())
    assert (
        not calls
        and found.pop("sweep")["base"]["kid"]
        == before["by_seed"]["0"]["distances"][FEATURE_NETWORK]["kid"]
    )
    assert found == before


def test_the_figure_has_a_curve_a_knob_with_its_points_named():
    point = lambda at, x, y: {
        "at": at,
        "first_five": {"share": x, "interval": [x - 0.1, x + 0.2]},
        "kid": {"value": y, "error": 0.1},
    }
    curves = {"w": [point("0", 0.2, 1.0), point("2", 0.6, 0.5)], "eta": [point("0", 0.4, 0.8)]}
    (ax,) = sweep.plot_sweep(
        {"features": "net", "base": point({}, 0.6, 0.5), "curves": curves}
    ).axes
    w, eta = ax.containers
    assert (w.get_label(), eta.get_label()) == ("w", "eta")
    assert w.lines[0].get_xydata().tolist() == [[0.2, 1.0], [0.6, 0.5]]
    (across, up) = w.lines[2]
    assert across.get_segments()[0][:, 0].tolist() == pytest.approx([0.1, 0.4])
    assert up.get_segments()[0][:, 1].tolist() == pytest.approx([1 - 0.196, 1 + 0.196])
    assert [text.get_text() for text in ax.texts] == [
        "0",
        "2",
        "0",
    ] and "kid (net)" in ax.get_ylabel()


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
def test_a_sweep_that_cannot_be_read_is_refused(words):
    with pytest.raises(EvaluationError, match=f"--sweep got '{words[-1]}', expected"):
        sweep.parse_sweep(words)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--sweep", "interval=0.3:0.9"], "at w = 0 there is none"),
        (["--sweep", "weights=raw"], "holds no checkpoint of a network"),
        (["--sweep", "w=1", "--w", "0", "1"], "expected one number that the sweep starts from"),
        (
            ["--sweep", "w=0,1", "--on", "3"],
            "3 captions would be drawn, --on 3 of 28, expected 4 or more",
        ),
        (["--sweep", "steps=2000"], "expected a whole number from 1 to 1000"),
    ],
)
def test_a_sweep_that_cannot_be_drawn_is_refused_before_it_begins(
    run, calls, capsys, arguments, message
):
    assert evaluate.main([str(run), *arguments]) == 2
    assert message in capsys.readouterr().err and not calls


def test_an_eta_that_the_scheduler_does_not_take_is_refused_before_anything_is_drawn(
    run, calls, capsys
):
    place = run / "pipeline" / "scheduler" / "scheduler_config.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | {"variance_type": "fixed_large"}))
    assert evaluate.main([str(run), "--sweep", "eta=0,1"]) == 2
    assert (
        "expected 1 with the scheduler's variance_type fixed_large" in capsys.readouterr().err
        and not calls
    )
