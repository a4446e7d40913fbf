"""Letters and signs of many scripts, drawn with matplotlib's fonts: images that need no download.

Digits, and every character that looks like one, are left out: what is trained on glyphs has seen neither
the images nor the classes of a digit data set.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from limbeck.data.images import Dataset, Pixels, Splits, from_arrays
from limbeck.errors import DataError

TRAIN_STYLES = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSans-BoldOblique",
    "DejaVuSansMono",
    "DejaVuSansMono-Oblique",
    "DejaVuSansMono-BoldOblique",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSerif-BoldItalic",
    "STIXGeneral",
    "STIXGeneralBol",
    "STIXGeneralItalic",
    "STIXGeneralBolIta",
)
TEST_STYLES = ("DejaVuSansMono-Bold", "DejaVuSerif-Italic")

_SCRIPTS = ("LATIN", "GREEK", "COPTIC", "CYRILLIC", "ARMENIAN", "GEORGIAN")
_DIGITS = "0123456789"
_THUMB = 14  # side of the thumbnails on which look-alikes are found
_INK = 0.8  # share of the side that a glyph's longer extent takes


@dataclass(frozen=True, kw_only=True)
class Glyphs(Dataset):
    """A few hundred characters in 14 font styles to train on and 2 other styles to test on, bright on dark.

    A character is a class. Kept are letters of six scripts and symbols that all DejaVu text fonts have,
    without accents, whose drawing is neither like that of a digit nor like that of a kept character.

    Attributes:
        side: height and width in pixels.
        alike: two characters are one from this share of common ink on (intersection over union, 0..1).
        digit_like: a character is left out from this share of common ink with a digit on.
    """

    side: int = 40
    alike: float = 0.68
    digit_like: float = 0.45

    def load(self) -> Splits:
        """Both splits; see ``Dataset.load``."""
        characters = _distinct(_candidates(), self.alike, self.digit_like)
        names = [f"{char} {unicodedata.name(char).lower()}" for char in characters]
        parts = []
        for part, styles in (("train", TRAIN_STYLES), ("test", TEST_STYLES)):
            images, labels = _draw_all(characters, styles, self.side)
            parts.append(
                from_arrays(
                    f"glyphs {part}",
                    images,
                    labels,
                    names,
                    licence="fonts: Bitstream Vera / DejaVu (free, public domain changes) and STIX (OFL 1.1)",
                    source="drawn with the fonts that matplotlib ships",
                )
            )
        return Splits(*parts)


def _font_file(style: str) -> Path:
    import matplotlib

    path = Path(matplotlib.get_data_path(), "fonts", "ttf", f"{style}.ttf")
    if not path.is_file():
        raise DataError(f"font {path.name} is not in {path.parent}: install matplotlib's own wheel from PyPI")
    return path


@cache
def _characters_of(style: str) -> frozenset[str]:
    """The characters that a font can draw."""
    from matplotlib.ft2font import FT2Font

    return frozenset(map(chr, FT2Font(str(_font_file(style))).get_charmap()))


def _candidates() -> list[str]:
    """Characters of every DejaVu style, letters first: by script, then symbols, each in Unicode order."""
    styles = [s for s in TRAIN_STYLES + TEST_STYLES if s.startswith("DejaVu")]
    common = frozenset.intersection(*(_characters_of(style) for style in styles))
    letters = [char for char in sorted(common) if unicodedata.category(char) in ("Lu", "Ll", "Lo")]
    symbols = [char for char in sorted(common) if unicodedata.category(char) in ("Sm", "So")]
    plain = [char for char in letters + symbols if not unicodedata.decomposition(char)]
    script = {char: unicodedata.name(char, "").split(" ")[0] for char in plain}
    in_scripts = sorted((c for c in plain if script[c] in _SCRIPTS), key=lambda c: _SCRIPTS.index(script[c]))
    return in_scripts + [char for char in plain if char in symbols]


def _distinct(candidates: Sequence[str], alike: float, digit_like: float) -> list[str]:
    """The candidates that look neither like a digit nor like a candidate before them."""
    digits = np.stack(
        [_draw(digit, _font(style, _THUMB), _THUMB) for style in TRAIN_STYLES for digit in _DIGITS]
    )
    font = _font(TRAIN_STYLES[0], _THUMB)
    kept: list[str] = []
    seen = np.zeros((len(candidates), _THUMB, _THUMB), np.uint8)
    for char in candidates:
        drawing = _draw(char, font, _THUMB)
        if not drawing.any() or _overlap(digits, drawing).max() >= digit_like:
            continue
        if not kept or _overlap(seen[: len(kept)], drawing).max() < alike:
            seen[len(kept)] = drawing
            kept.append(char)
    return kept


def _overlap(drawings: Pixels, drawing: Pixels) -> npt.NDArray[np.float64]:
    """Common ink over all ink of each of ``drawings`` [N, H, W] with ``drawing`` [H, W]: [N] in 0..1."""
    common = np.minimum(drawings, drawing).sum(axis=(1, 2))
    overlap: npt.NDArray[np.float64] = common / np.maximum(drawings, drawing).sum(axis=(1, 2))
    return overlap


def _draw_all(
    characters: Sequence[str], styles: Sequence[str], side: int
) -> tuple[Pixels, npt.NDArray[np.int64]]:
    """Every character in every style that has it: uint8 [N, side, side], int64 [N]."""

    def pairs() -> Iterator[tuple[Pixels, int]]:
        for style in styles:
            font, have = _font(style, side), _characters_of(style)
            for label, char in enumerate(characters):
                if char in have:
                    yield _draw(char, font, side), label

    images, labels = zip(*pairs(), strict=True)
    return np.stack(images), np.array(labels, dtype=np.int64)


def _font(style: str, side: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(_font_file(style)), size=2 * side, layout_engine=ImageFont.Layout.BASIC)


def _draw(char: str, font: ImageFont.FreeTypeFont, side: int) -> Pixels:
    """One character, centred, its longer extent at a fixed share of ``side``: uint8 [side, side]."""
    left, top, right, bottom = (round(edge) for edge in font.getbbox(char))
    canvas = Image.new("L", (max(right - left, 1), max(bottom - top, 1)))
    ImageDraw.Draw(canvas).text((-left, -top), char, fill=255, font=font)
    ink = canvas.getbbox()
    framed = Image.new("L", (side, side))
    if ink is None:
        return np.asarray(framed)
    drawing = canvas.crop(ink)
    factor = _INK * side / max(drawing.size)
    width, height = (max(1, round(extent * factor)) for extent in drawing.size)
    small = drawing.resize((width, height), Image.Resampling.BOX)
    framed.paste(small, ((side - width) // 2, (side - height) // 2))
    return np.asarray(framed)
