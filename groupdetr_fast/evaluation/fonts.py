"""How the names of classes are written in pictures: as they stand, in fonts that have their characters.

matplotlib comes with a font that has no Chinese, Japanese or Korean, among others.
"""

import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import get_data_path
from matplotlib.font_manager import fontManager
from matplotlib.ft2font import FT2Font

__all__ = ["in_one_font", "written"]

logger = logging.getLogger(__name__)

DEFAULT = str(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")  # which comes with matplotlib
INSTEAD = "□"  # of characters that no font has


def written(name: str) -> dict[str, Any]:
    """The properties of matplotlib's ``Text`` with which it writes a name as it stands, and no mathematics.

    Characters that no installed font has become squares, of which the log says so once.
    """
    fonts = {character: _font_of(character) for character in dict.fromkeys(name) if not character.isspace()}
    others = [font[0] for font in fonts.values() if font is not None and font[1] != DEFAULT]
    text = "".join(" " if each.isspace() else INSTEAD if fonts[each] is None else each for each in name)
    return {"text": text, "fontfamily": list(dict.fromkeys(["DejaVu Sans", *others])), "parse_math": False}


def in_one_font(names: Sequence[str]) -> tuple[list[str], str]:
    """Names, and the file of the one font that has the most of their characters, for what draws with one font.

    Characters that it does not have are squares.
    """
    used = {character for name in names for character in name if not character.isspace()}
    found = {font[1] for character in used if (font := _font_of(character)) is not None}
    best = max(sorted(found - {DEFAULT}), key=lambda file: len(_characters(file) & used), default=DEFAULT)
    if len(_characters(best) & used) <= len(_characters(DEFAULT) & used):
        best = DEFAULT
    has = _characters(best)
    return ["".join(" " if c.isspace() else c if c in has else INSTEAD for c in name) for name in names], best


@functools.cache
def _font_of(character: str) -> tuple[str, str] | None:
    """Name and file of a font that has a character: the default one, or else an installed one; None without one."""
    if character in _characters(DEFAULT):
        return "DejaVu Sans", DEFAULT
    fonts = sorted(fontManager.ttflist, key=lambda font: (font.style != "normal", "Sans" not in font.name, font.name))
    for font in fonts:
        if character in _characters(str(font.fname)):
            return font.name, str(font.fname)
    _say_that_characters_lack()
    return None


@functools.cache
def _say_that_characters_lack() -> None:
    logger.warning(
        "names of classes have characters that no font of this machine has: pictures have %s in their place until "
        "such a font is installed (for Chinese, Japanese and Korean, Noto Sans CJK)",
        INSTEAD,
    )


@functools.cache
def _characters(file: str) -> frozenset[str]:
    """What a font can draw: nothing if it has pictures in place of outlines, as some of emoji, or cannot be read."""
    try:
        font = FT2Font(file)
        return frozenset(map(chr, font.get_charmap())) if font.scalable else frozenset()
    except (OSError, RuntimeError):
        return frozenset()
