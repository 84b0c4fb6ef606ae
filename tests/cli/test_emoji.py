"""`direct-jump emoji` writes a dataset and reports what it wrote."""

import re
from pathlib import Path

from datasets_on_disk import read_rows
from emoji_packages import use_tiny_styles

from pipeline.cli import emoji
from pipeline.data.emoji import monsters


def test_emoji_main_reports_what_it_wrote(tmp_path, capsys):
    target = str(tmp_path / "a")
    assert emoji.main([target, "--set", "shapes", "--size", "32"]) == 0
    assert re.findall(r" (\d+) ", capsys.readouterr().out.removeprefix(target)) == ["22", "6"]
    assert emoji.main([target, "--set", "shape"]) == 2
    assert "emoji; emoji-varied; emoji-small; shapes" in capsys.readouterr().err
    assert emoji.main([target, "--categories", "People & Body", "--skin-tones", "--size", "8"]) == 0
    reported = int(capsys.readouterr().out.split(": ")[1].split()[0])
    assert reported == len(read_rows(Path(target), "train")) > 1000


def test_emoji_main_writes_styles(tmp_path, capsys, monkeypatch):
    use_tiny_styles(tmp_path / "cache", monkeypatch)
    target = str(tmp_path / "a")
    assert emoji.main([target, "--styles", "--size", "8"]) == 0
    train, test = re.findall(r" (\d+) ", capsys.readouterr().out.removeprefix(target))
    assert int(train) == len(read_rows(Path(target), "train")) > 8
    assert int(test) == len(read_rows(Path(target), "test")) == 5
    assert emoji.main([target, "--styles", "3D"]) == 2
    assert "'3D'" in capsys.readouterr().err
    assert emoji.main([target, "--styles", "--size", "0"]) == 2
    assert "got 0" in capsys.readouterr().err


def test_emoji_main_refuses_styles_of_a_selection(tmp_path, capsys):
    options = ["--set", "shapes", "--skin-tones"]
    assert emoji.main([str(tmp_path / "a"), "--styles", "3d", *options]) == 2
    assert "--set, --skin-tones" in capsys.readouterr().err
    assert emoji.main([str(tmp_path / "a"), "--set", "monsters", "--style", "flat"]) == 2
    assert "--style." in capsys.readouterr().err


def test_emoji_main_writes_monsters(tmp_path, capsys, monkeypatch):
    eyes = {"one eye": "mono"}
    monkeypatch.setattr(
        monsters, "PARTS", monsters.PARTS | {"eyes": eyes, "mood": {"sad": "frown"}}
    )
    target = str(tmp_path / "a")
    assert emoji.main([target, "--set", "monsters"]) == 0
    train, test = re.findall(r" (\d+) ", capsys.readouterr().out.removeprefix(target))
    assert int(train) == len(read_rows(Path(target), "train")) > 150
    assert int(test) == len(read_rows(Path(target), "test")) == 240 - int(train)
