"""Metrics survive JSON, old files are read, and the text says what was measured."""

import json
from pathlib import Path

import pytest

from pipeline.config import Config
from pipeline.hub.model_card import eval_results, metrics_section
from pipeline.runs.results import Kid, Metrics, Proportion, Sweep, SweepPoint

SHIPPED = Path(__file__).parents[2] / "pretrained" / "emoji" / "metrics.json"
OLD_NAMES = {"recall@1": "first", "recall@5": "first_five", "images": "pictures"}


def old_keys(tree):
    """A metrics.json with the keys of earlier versions."""
    if not isinstance(tree, dict):
        return tree
    value = (
        "share"
        if "k" in tree
        else "mean"
        if {"interval", "n"} == tree.keys() - {"value"}
        else "value"
    )
    names = OLD_NAMES | {"value": value}
    return {names.get(key, key): old_keys(inner) for key, inner in tree.items()}


def test_to_json_and_from_json_are_inverse():
    tree = json.loads(SHIPPED.read_text())
    metrics = Metrics.from_json(tree)
    assert json.loads(json.dumps(metrics.to_json())) == tree
    assert metrics.by_seed[0].train.recall_at_1.n == 1528
    assert {"recall@1", "recall@5"} < tree["by_seed"]["0"]["train"].keys()


def test_from_json_reads_the_keys_of_older_files():
    tree = json.loads(SHIPPED.read_text())
    old = old_keys(tree)
    assert {"first", "first_five"} < old["by_seed"]["0"]["train"].keys()
    assert "share" in old["by_seed"]["0"]["train"]["first"]
    assert "mean" in old["more"]["bits_per_dimension"]["png"]
    assert Metrics.from_json(old) == Metrics.from_json(tree)


def test_from_json_refuses_another_shape():
    with pytest.raises(ValueError, match="by_seed"):
        Metrics.from_json({"model": "x", "by_seed": {"0": {"train": 1}}})


def test_str_of_a_proportion_has_its_interval():
    assert str(Proportion(0.25, (0.2, 0.3), 100, 400)) == "25.0% (20% to 30% of 400)"


def test_str_of_metrics_has_every_part():
    text = str(Metrics.from_json(json.loads(SHIPPED.read_text())))
    assert "seed 0: training captions: recall@1 84.5% (83% to 86% of 1528), recall@5 95.9%" in text
    for words in ("hearts: recall@1", "KID (efficientnet-lite0) 0.0366", "chance: recall@1 0.06%"):
        assert words in text
    assert "mean squared error of eps (training and held-out images): t = 50 0.1860 and 0." in text


def test_str_of_a_sweep_has_a_line_a_point():
    recall = Proportion(0.5, (0.4, 0.6), 5, 10)
    common = {"recall_at_1": recall, "recall_at_5": recall, "kid": Kid(1.0, 0.1, (0.8, 1.2), 10)}
    base = SweepPoint(at={"w": "1", "eta": "0"}, calls=4, **common)
    point = SweepPoint(at="0", calls=2, **common)
    metrics = Metrics("x", sweep=Sweep("net", 10, 0, base, {"w": [point]}))
    _title, first, second = str(metrics).splitlines()
    assert first.startswith("  w = 1, eta = 0: KID (net) 1.0000 ± 0.1000, recall@1 50.0%")
    assert second.startswith("  w = 0: KID (net)")
    assert second.endswith("2 calls")
    assert Metrics.from_json(json.loads(json.dumps(metrics.to_json()))) == metrics
    assert metrics_section(metrics.to_json()) == str(metrics)


def test_eval_results_are_recalls_of_both_splits():
    found = eval_results(Config(), json.loads(SHIPPED.read_text()))
    values = {(result.dataset_split, result.metric_name): result.metric_value for result in found}
    assert values["train", "recall@1, train captions, w = 1"] == 0.8449
    assert values["held_out", "recall@5, held-out captions, w = 1"] == 0.5948
    assert len(found) == 4
    assert eval_results(Config(), {}) == []
