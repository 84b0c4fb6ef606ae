"""Drawing styles of emoji: Twemoji files and colour fonts."""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from pipeline.data.emoji.catalogue import EmojiError

BITMAP_SIZE = (
    109  # the one size that colour emoji fonts with bitmaps have, Noto Color Emoji among them
)


def load_rgba(path: Path) -> Image.Image:
    """One picture, RGBA."""
    with Image.open(path) as picture:
        return picture.convert("RGBA")


def resize_on_white(picture: Image.Image, size: int) -> Image.Image:
    """An RGBA picture on white, RGB, size x size."""
    white = Image.new("RGBA", picture.size, "white")
    return (
        Image.alpha_composite(white, picture)
        .convert("RGB")
        .resize((size, size), Image.Resampling.LANCZOS)
    )


def render(path: Path, size: int) -> Image.Image:
    """One picture on white, RGB, size x size."""
    return resize_on_white(load_rgba(path), size)


class EmojiFont:
    """A colour emoji font with bitmaps: another drawing of the same emoji."""

    def __init__(self, path: str | Path):
        try:
            self.font = ImageFont.truetype(str(path), BITMAP_SIZE)
        except OSError as error:
            raise EmojiError(
                f"{path} cannot be used, expected a font with colour bitmaps of size {BITMAP_SIZE}, such as Debian's "
                f"fonts-noto-color-emoji: {error}"
            ) from error
        self.width = self.font.getlength("\U0001f600")

    def draws(self, emoji: str) -> bool:
        """Has the font one picture for an emoji? A sequence that it does not know comes out as several, or as nothing."""
        left, top, right, bottom = self.font.getbbox(emoji)
        return self.font.getlength(emoji) == self.width and right > left and bottom > top

    def draw(self, emoji: str) -> Image.Image:
        """One emoji, RGBA, as large as it fits in a square."""
        canvas = Image.new("RGBA", (2 * BITMAP_SIZE, 2 * BITMAP_SIZE), (255, 255, 255, 0))
        ImageDraw.Draw(canvas).text((0, 0), emoji, font=self.font, embedded_color=True)
        picture = canvas.crop(canvas.getbbox())
        square = Image.new("RGBA", (max(picture.size),) * 2, (255, 255, 255, 0))
        square.alpha_composite(picture, tuple((square.width - side) // 2 for side in picture.size))
        return square
