"""PNG, SVG and PDF files of matplotlib figures, with fonts that have the characters of their text.

Names of models, modes and tasks come from users. matplotlib draws boxes for what its font lacks; here installed fonts
stand in for such characters, and where none can, one line says what to install.
"""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from matplotlib import font_manager, rc_context
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text

from fedmoe.runtime.logs import warn

#: Fonts with Chinese that systems come with, those made for reading on screens first; others are tried after them.
CHINESE_FONTS = (
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Source Han Sans SC", "Source Han Sans CN"),
    *("Microsoft YaHei", "PingFang SC", "Hiragino Sans GB", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "SimHei"),
    *("Heiti SC", "STHeiti", "DengXian", "Arial Unicode MS", "Droid Sans Fallback", "Noto Serif CJK SC", "SimSun"),
)
ADVICE = (
    "some characters are drawn as boxes; install a font that has them: apt-get install fonts-noto-cjk (Debian, "
    "Ubuntu), dnf install google-noto-sans-cjk-fonts (Fedora), or any .ttf or .otf with Chinese in ~/.fonts; then "
    "draw again"
)
_MISSING = re.compile(r"Glyph \d+ .* missing from font")


@dataclass(frozen=True, slots=True)
class Font:
    """An installed font: the family's name and its file."""

    family: str
    file: str


def png(figure: Figure) -> bytes:
    """The figure as a PNG file at its own resolution."""
    return picture(figure, "png")


def picture(figure: Figure, kind: Literal["png", "svg", "pdf"]) -> bytes:
    """The figure as a file, the same for the same figure; text stays text in SVG, and fonts are embedded in PDF."""
    buffer = io.BytesIO()
    settings = {"svg.fonttype": "none", "svg.hashsalt": "fedmoe", "pdf.fonttype": 42}
    undated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
    # That a stand-in has no bold is of no use to anybody.
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    with warnings.catch_warnings(record=True) as caught, rc_context(settings):
        warnings.simplefilter("always")
        show_all_characters(figure)
        _lay_out(figure)
        figure.savefig(buffer, format=kind, metadata=undated.get(kind))
    for warning in caught:
        # One for each character of each chart; what to do about them has been said once.
        if not _MISSING.match(str(warning.message)):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return buffer.getvalue()


def _lay_out(figure: Figure) -> None:
    """Lay the figure out once; one that is saved with a layout engine is drawn and laid out twice."""
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)
        figure.set_layout_engine(None)


def show_all_characters(figure: Figure) -> None:
    """Give every text of a figure the fonts its characters need; say so, once, where there are none."""
    texts = [text for text in figure.findobj(Text) if not text.get_text().isascii()]
    for text in texts:
        characters = frozenset(text.get_text()) - frozenset("\n")
        own = font_manager.findfont(text.get_fontproperties())
        lacking = characters - shown_by(own, characters)
        if not lacking:
            continue
        families, missing = stand_ins(lacking, installed_fonts(), shown_by)
        if missing:
            _find_new_fonts()
            families, missing = stand_ins(lacking, installed_fonts(), shown_by)
        text.set_fontfamily([*text.get_fontfamily(), *families])
        if missing:
            _advise()


def stand_ins(
    characters: Iterable[str],
    fonts: Sequence[Font],
    shown: Callable[[str, frozenset[str]], frozenset[str]],
) -> tuple[list[str], frozenset[str]]:
    """Families that together show `characters`, and the characters that none shows.

    `shown(file, characters)` says which of them a font has.
    """
    order = {family: place for place, family in enumerate(CHINESE_FONTS)}
    missing, families = frozenset(characters), list[str]()
    for font in sorted(fonts, key=lambda font: (order.get(font.family, len(order)), font.family, font.file)):
        if not missing:
            break
        if covered := shown(font.file, missing):
            families.append(font.family)
            missing -= covered
    return families, missing


@cache
def shown_by(file: str, characters: frozenset[str]) -> frozenset[str]:
    """Which of the characters a font file has; none when it cannot be read."""
    try:
        font = FT2Font(file)
        return frozenset(character for character in characters if font.get_char_index(ord(character)))
    except (OSError, RuntimeError):
        return frozenset()


def installed_fonts() -> list[Font]:
    """The upright, regular fonts that matplotlib knows, without the one whose every character is a box."""
    return [
        Font(entry.name, entry.fname)
        for entry in font_manager.fontManager.ttflist
        if entry.style == "normal" and str(entry.weight) != "bold" and not entry.name.startswith("Last Resort")
    ]


@cache
def _find_new_fonts() -> None:
    """Show matplotlib the fonts that were installed after it made its list, which it keeps for good."""
    files = {entry.fname for entry in font_manager.fontManager.ttflist}
    for file in font_manager.findSystemFonts():
        if file not in files:
            try:
                font_manager.fontManager.addfont(file)
            except (OSError, RuntimeError, NotImplementedError):  # no font that can be drawn with
                continue


@cache
def _advise() -> None:
    warn("no_font_for_charts", fix=ADVICE)
