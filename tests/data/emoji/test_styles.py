"""Colour fonts draw the same emoji in another style."""

from pathlib import Path

import numpy as np
import pytest
from datasets_on_disk import read_rows
from PIL import Image

from pipeline.data.emoji import styles, writer
from pipeline.data.emoji.catalogue import EmojiError

# Of Debian's fonts-noto-color-emoji.
NOTO = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
needs_noto = pytest.mark.skipif(not NOTO.is_file(), reason="Noto Color Emoji is not installed")


@needs_noto
def test_emoji_font_draws_the_same_emoji_in_its_style(tmp_path):
    plain = writer.write_emoji(tmp_path / "plain", "shapes", size=32)
    styled = writer.write_emoji(
        tmp_path / "styled", "shapes", size=32, font=NOTO, style="in noto style"
    )
    rows = read_rows(plain, "train")
    captions = [f"{row['caption']} in noto style" for row in rows]
    assert [row["caption"] for row in read_rows(styled, "train")] == captions
    for row in rows:
        a = np.asarray(Image.open(plain / "train" / row["file_name"]))
        b = np.asarray(Image.open(styled / "train" / row["file_name"]))
        assert a.shape == b.shape == (32, 32, 3)
        assert (a != b).any()
        if row["factors"]["color"] != "white":
            inside_a = a.min(2) < 235
            inside_b = b.min(2) < 235
            overlap = (inside_a & inside_b).sum() / (inside_a | inside_b).sum()
            assert overlap > 0.75, row["caption"]
    assert writer.read_manifest(styled) != writer.read_manifest(plain)


@needs_noto
def test_has_glyph_is_false_for_several_glyphs():
    font = styles.EmojiFont(NOTO)
    cat = "\U0001f431"
    woman_firefighter = "\U0001f469\u200d\U0001f692"
    assert font.has_glyph(cat)
    assert font.has_glyph(woman_firefighter)
    assert not font.has_glyph(cat + cat)
    assert not font.has_glyph("\U000e0041")


def test_emoji_font_refuses_other_files(tmp_path):
    (tmp_path / "font.ttf").write_text("no font")
    with pytest.raises(EmojiError, match=r"font\.ttf"):
        writer.write_emoji(tmp_path / "out", font=tmp_path / "font.ttf")
    assert not (tmp_path / "out").exists()
