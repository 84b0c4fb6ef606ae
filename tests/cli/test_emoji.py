"""`direct-jump emoji` writes a dataset and reports what it wrote."""

import re
from pathlib import Path

from datasets_on_disk import read_rows

from pipeline.cli import emoji


def test_emoji_main_reports_what_it_wrote(tmp_path, capsys):
    target = str(tmp_path / "a")
    assert emoji.main([target, "--set", "shapes", "--size", "32"]) == 0
    assert re.findall(r" (\d+) ", capsys.readouterr().out.removeprefix(target)) == ["22", "6"]
    assert emoji.main([target, "--set", "shape"]) == 2
    assert "emoji; emoji-varied; emoji-small; shapes" in capsys.readouterr().err
    assert emoji.main([target, "--categories", "People & Body", "--skin-tones", "--size", "8"]) == 0
    reported = int(capsys.readouterr().out.split(": ")[1].split()[0])
    assert reported == len(read_rows(Path(target), "train")) > 1000
