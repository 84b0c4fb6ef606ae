"""Colour fonts draw the same emoji in another style."""

import json

import numpy as np
import pytest
from PIL import Image

from pipeline.cli import emoji
from pipeline.data.emoji import styles, writer


@pytest.mark.skipif(not NOTO.is_file(), reason="Noto Color Emoji is not installed here")
def test_emoji_font_draws_the_same_emoji_in_its_style(tmp_path):
    plain = writer.write_emoji(tmp_path / "plain", "shapes", size=32)
    styled = writer.write_emoji(
        tmp_path / "styled", "shapes", size=32, font=NOTO, style="in noto style"
    )
    rows = [
        [
            json.loads(line)
            for line in (folder / "train" / "metadata.jsonl").read_text().splitlines()
        ]
        for folder in (plain, styled)
    ]
    assert [row["caption"] for row in rows[1]] == [
        f"{row['caption']} in noto style" for row in rows[0]
    ]
    for row in rows[0]:
        a, b = (
            np.asarray(Image.open(folder / "train" / row["file_name"]))
            for folder in (plain, styled)
        )
        assert a.shape == b.shape == (32, 32, 3) and (a != b).any()
        if row["factors"]["color"] != "white":
            inside = [image.min(2) < 235 for image in (a, b)]
            assert (inside[0] & inside[1]).sum() > 0.75 * (inside[0] | inside[1]).sum(), row[
                "caption"
            ]
    assert writer.read_manifest(styled) != writer.read_manifest(plain)


@pytest.mark.skipif(not NOTO.is_file(), reason="Noto Color Emoji is not installed here")
def test_has_glyph_is_false_for_several_glyphs():
    font = styles.EmojiFont(NOTO)
    assert font.draws("\U0001f431") and font.draws(
        "\U0001f469\u200d\U0001f692"
    )  # a cat face, a woman firefighter
    assert not font.draws("\U0001f431\U0001f431") and not font.draws("\U000e0041")


def test_emoji_font_refuses_other_files(tmp_path, capsys):
    (tmp_path / "font.ttf").write_text("no font")
    assert emoji.main([str(tmp_path / "out"), "--font", str(tmp_path / "font.ttf")]) == 2
    assert "cannot be used, expected a font with colour bitmaps" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
