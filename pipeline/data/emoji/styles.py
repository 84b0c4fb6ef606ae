"""Drawing styles of emoji: Twemoji files and colour fonts."""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from pipeline.data.emoji.catalogue import EmojiError

# The one size of colour emoji fonts with bitmaps, such as Noto Color Emoji.
BITMAP_SIZE = 109


def load_rgba(path: Path) -> Image.Image:
    """Return an image file as RGBA."""
    with Image.open(path) as image:
        return image.convert("RGBA")


class EmojiFont:
    """A colour emoji font with bitmaps: another drawing of the same emoji."""

    def __init__(self, path: str | Path) -> None:
        try:
            self.font = ImageFont.truetype(str(path), BITMAP_SIZE)
        except OSError as error:
            raise EmojiError(
                f"Cannot use the font {path}: {error}. Give one with colour bitmaps of size "
                f"{BITMAP_SIZE}, such as Debian's fonts-noto-color-emoji."
            ) from error
        self.width = self.font.getlength("\U0001f600")

    def has_glyph(self, emoji: str) -> bool:
        """Return whether the font draws an emoji as one image.

        A sequence that it does not know becomes several glyphs or none.
        """
        left, top, right, bottom = self.font.getbbox(emoji)
        return self.font.getlength(emoji) == self.width and right > left and bottom > top

    def draw(self, emoji: str) -> Image.Image:
        """Return one emoji as RGBA, centred in the smallest square around it."""
        canvas = Image.new("RGBA", (2 * BITMAP_SIZE, 2 * BITMAP_SIZE), (255, 255, 255, 0))
        ImageDraw.Draw(canvas).text((0, 0), emoji, font=self.font, embedded_color=True)
        glyph = canvas.crop(canvas.getbbox())
        side = max(glyph.size)
        square = Image.new("RGBA", (side, side), (255, 255, 255, 0))
        square.alpha_composite(glyph, ((side - glyph.width) // 2, (side - glyph.height) // 2))
        return square
