"""The ladder ends in the shipped recipe, resumes, and compares with the better peer."""

import json
from pathlib import Path

import pytest

from benchmarks import ladder
from pipeline import config


def test_overrides_end_in_the_shipped_recipe(tmp_path, capsys):
    names = ("steps", "keep", "log_every", "save_every", "validate_every")
    free = ("name", "output", "sample.every", *(f"train.{name}" for name in names))
    shipped = config.load_file(ladder.CONFIG)
    last = list(ladder.RUNGS)[-1]
    loaded, _ = config.load(ladder.training_command(last, 0, tmp_path, 560)[1:])
    assert config.differences(shipped, loaded, free) == []
    ladder.main(["--dry-run"])
    printed = capsys.readouterr().out
    assert all(f"\n{rung}: " in "\n" + printed for rung in ladder.RUNGS)
    assert "33 runs of 20 minutes: 11.0 hours" in printed


def test_minutes_to_goal_interpolate_between_checks():
    assert ladder.minutes_to_goal([(2.0, 0.2), (4.0, 0.6)]) == pytest.approx(3.0)
    assert ladder.minutes_to_goal([(2.0, 0.2), (4.0, 0.39)]) is None


def test_run_once_skips_a_known_result(tmp_path, monkeypatch):
    def result(images, minutes, recall, taken):
        found = {"images": images, "minutes": minutes, "recall@5": recall}
        return found | {"held_out": 0.1, "taken": taken}

    results = {0: result(320, 7.0, 0.5, 20), 1: result(640, None, 0.3, 21)}
    checkpoints = []

    def run_rung(rung, seed, args):
        checkpoints.append(args.folder / f"{rung}-s{seed}" / "checkpoints")
        (checkpoints[-1] / "10").mkdir(parents=True)
        return results.pop(seed)

    monkeypatch.setattr(ladder, "run_rung", run_rung)
    output = ["--folder", str(tmp_path), "--output", str(tmp_path / "b.md")]
    arguments = ["--rungs", "muon", "--seeds", "0", "1", *output]
    ladder.main(arguments)
    assert not results
    for path in checkpoints:
        assert not path.exists()
        assert path.parent.exists()
    saved = json.loads((tmp_path / ladder.RESULTS).read_text())
    other = {"machine": "another"}
    saved += [one | {"rung": "bf16", "way": one["way"] | other} for one in saved]
    (tmp_path / ladder.RESULTS).write_text(json.dumps(saved))
    ladder.main(arguments)
    text = (tmp_path / "b.md").read_text()
    row = "| 0, 1 | 480 | 20, 21 | 7.0, not in 20 | 40% (30% to 50%) | 10% (10% to 10%) |"
    assert row in text
    assert "| bf16 |" not in text


def test_goal_line_compares_the_last_rung_with_the_better_peer(tmp_path, monkeypatch):
    recalls = {"x_0": 0.9, "muon": 0.4, f"{ladder.PEER}-64": 0.05, f"{ladder.PEER}-32": 0.1}

    def result(rung):
        return {"images": 16, "minutes": None, "recall@5": recalls[rung], "held_out": None}

    monkeypatch.setattr(ladder, "run_rung", lambda rung, seed, args: result(rung))
    monkeypatch.setattr(
        ladder, "run_peer", lambda width, seed, args: result(f"{ladder.PEER}-{width}")
    )
    monkeypatch.setattr(ladder, "peer_file", lambda folder: folder)
    output = ["--folder", str(tmp_path), "--output", str(tmp_path / "b.md")]
    ladder.main(["--seeds", "0", *output, "--rungs", *reversed(recalls)])
    text = (tmp_path / "b.md").read_text()
    assert f"- muon's recall@5 over {ladder.PEER}-32's: 4.00, the goal is ≥ 2: **met**." in text
    assert "| width 32, captions as classes, in pixels | 0 | 16 | ? | not in 20 | 10% | - |" in text


def test_peer_file_is_required_before_anything_runs(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(ladder, "run_rung", lambda rung, seed, args: started.append(rung))
    folders = ["--folder", str(tmp_path), "--peers", str(tmp_path)]
    output = ["--output", str(tmp_path / "b.md")]
    with pytest.raises(SystemExit, match=str(tmp_path)):
        ladder.main([*folders, *output, "--rungs", "muon", f"{ladder.PEER}-32"])
    assert not started


def test_read_results_reads_the_published_results():
    path = Path(__file__).parents[2] / "docs" / ladder.RESULTS
    assert all(0 <= result["recall@5"] <= 1 for result in ladder.read_results(path))
