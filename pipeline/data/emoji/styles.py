"""Drawing styles of emoji: Twemoji files, colour fonts, and the packages of eight more styles."""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from pipeline.data.emoji.catalogue import EmojiError

# The one size of colour emoji fonts with bitmaps, such as Noto Color Emoji.
BITMAP_SIZE = 109


@dataclass(frozen=True)
class Package:
    """A package in one version, with the digest of its archive and its licence."""

    name: str
    version: str
    sha256: str
    licence: str
    attribution: str

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"

    def describe(self) -> dict[str, str]:
        """Return what a manifest says of a package."""
        return {
            "source": str(self),
            "sha256": self.sha256,
            "licence": self.licence,
            "attribution": self.attribution,
        }


FLUENT = "Fluent Emoji, (c) Microsoft Corporation, MIT"
NOTO = "Noto Emoji, (c) Google, Apache 2.0"
EMOJITWO = "EmojiTwo, (c) Emoji One and the EmojiTwo contributors, CC-BY 4.0"
# Style -> where its drawings come from. Captions use the style's name: "fox, 3d style".
STYLES = {
    "twemoji": Package(
        "@iconify-json/twemoji",
        "1.2.5",
        "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
        "CC-BY-4.0",
        "Twemoji, (c) Twitter, Inc and other contributors, CC-BY 4.0",
    ),
    "3d": Package(
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
        "MIT",
        FLUENT,
    ),
    "flat": Package(
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        "MIT",
        FLUENT,
    ),
    "ink": Package(
        "@iconify-json/fluent-emoji-high-contrast",
        "1.2.6",
        "0b92d48c90d2200bd499e3cdd09a127ca6a8c8ddefd34c35eb5a1e4994012ae0",
        "MIT",
        FLUENT,
    ),
    "noto": Package(
        "@iconify-json/noto",
        "1.2.9",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
        "Apache-2.0",
        NOTO,
    ),
    "blob": Package(
        "@iconify-json/noto-v1",
        "1.2.5",
        "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37",
        "Apache-2.0",
        NOTO,
    ),
    "classic": Package(
        "@iconify-json/emojione",
        "1.2.3",
        "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e",
        "CC-BY-4.0",
        EMOJITWO,
    ),
    "silhouette": Package(
        "@iconify-json/emojione-monotone",
        "1.2.1",
        "40b90004bafb406b59266155ef9b7e1dd67bf2947fc8db8d07388776f4d0d04e",
        "CC-BY-4.0",
        EMOJITWO,
    ),
    "openmoji": Package(
        "@iconify-json/openmoji",
        "1.2.29",
        "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5",
        "CC-BY-SA-4.0",
        "OpenMoji, (c) OpenMoji contributors, CC-BY-SA 4.0: derived images are share-alike",
    ),
}
# Without OpenMoji: work derived from it must carry its licence.
DEFAULT_STYLES = tuple(style for style in STYLES if style != "openmoji")
# Drawn in black alone, so there is nothing to recolour.
BLACK_STYLES = ("ink", "silhouette")
# English tags of emoji, such as "happy" for a smiling face.
TAGS = Package(
    "emojibase-data",
    "17.0.0",
    "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
    "MIT",
    "Emojibase, (c) Miles Johnson, MIT",
)


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
