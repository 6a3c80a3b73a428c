"""Text in figures: fonts for the letters of any script, where this machine has one, and else something legible."""

import unicodedata
import warnings
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain

from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, findSystemFonts, fontManager
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text

NO_LETTERS = "Last Resort"
"""Begins the name of a font that has a box for every letter."""
NAMED_AT_MOST = 10


class Lettering:
    """The fonts that figures need beside matplotlib's usual one, found as letters are asked for."""

    def __init__(self) -> None:
        self.families: list[str] = []
        self._fonts = [FT2Font(findfont(FontProperties()))]
        self._absent: set[str] = set()
        self._told = False

    def lacking(self, text: str) -> str:
        """Return the letters of `text`, each once, that no font here has."""
        new = {letter for letter in self._missing(text) if letter not in self._absent}
        while new and (font := best_font(new)):
            self._fonts.append(font)
            self.families.append(font.family_name)
            new = set(self._missing("".join(new)))
        self._absent |= new
        return "".join(sorted(self._missing(text)))

    def _missing(self, text: str) -> set[str]:
        """Return letters that no font taken so far has; marks that are not seen by themselves are none."""
        return {
            letter
            for letter in text
            if letter != "\n" and not unseen(letter) and not any(has(font, letter) for font in self._fonts)
        }

    def shown(self, text: str) -> str:
        """Return `text` with escapes for letters that no font here has, and for what is no letter."""
        lacking = set(self.lacking(text))
        if letters := [each for each in lacking if unicodedata.category(each)[0] != "C"]:
            self.tell(f"Some letters in pictures are escaped, for no font here has them. {advice(letters)}")
        return "".join(escaped(each) if each in lacking else each for each in text)

    def tell(self, message: str) -> None:
        """Warn once of what fonts lack, however many figures and letters there are."""
        if not self._told:
            self._told = True
            warnings.warn(message)

    def prepare(self, figure: Figure) -> None:
        """Give every text in `figure` the fonts that it needs, and take from it what none has."""
        for text in figure.findobj(Text):
            assert isinstance(text, Text)
            text.set_text(self.shown(text.get_text()))
            if self.families and not text.get_text().isascii():
                text.set_fontfamily([*text.get_fontfamily(), *self.families])


LETTERING = Lettering()


def class_names(names: Mapping[int, str]) -> dict[int, str]:
    """Return by category id what figures call the classes: their names, or "class ID" for those whose letters no font
    here has, of which a warning tells once."""
    lacking = {id_: LETTERING.lacking(name) for id_, name in names.items()}
    nameless = [id_ for id_, letters in lacking.items() if letters]
    if nameless:
        told = [f"class {id_} is {names[id_]}" for id_ in nameless[:NAMED_AT_MOST]]
        more = f" and {len(nameless) - len(told)} more" if len(nameless) > len(told) else ""
        LETTERING.tell(
            f"No font here has the letters of these class names, so pictures have numbers: {', '.join(told)}{more}. "
            + advice(chain.from_iterable(lacking.values()))
        )
    return {id_: f"class {id_}" if lacking[id_] else name for id_, name in names.items()}


def one_line(text: str) -> str:
    return text.replace("\n", "\\n")


def best_font(letters: set[str]) -> FT2Font | None:
    """Return the installed font that has most of `letters`, an upright one of normal weight before others."""
    ranked = [
        ((count, font.style_flags == 0, "Sans" in font.family_name), str(font.fname), font)
        for font in installed_fonts()
        if (count := sum(has(font, letter) for letter in letters))
    ]
    if not ranked:
        return None
    _, path, font = max(ranked, key=lambda each: each[:2])
    if path not in {entry.fname for entry in fontManager.ttflist}:  # installed after matplotlib had made its list
        fontManager.addfont(str(path))
    return font


def installed_fonts() -> Iterator[FT2Font]:
    """Yield the fonts that can be drawn with: outlines, and not of boxes alone."""
    listed = (entry.fname for entry in fontManager.ttflist)
    for path in sorted({*listed, *findSystemFonts()}):
        try:
            font = FT2Font(path)
        except (OSError, RuntimeError):  # gone since, or broken
            continue
        if font.scalable and not font.family_name.startswith(NO_LETTERS):
            yield font


def has(font: FT2Font, letter: str) -> bool:
    return font.get_char_index(ord(letter)) != 0


def unseen(letter: str) -> bool:
    """Tell whether it is a joiner, a mark of direction or a selector of a variant."""
    return unicodedata.category(letter) == "Cf" or "\ufe00" <= letter <= "\ufe0f"


def escaped(letter: str) -> str:
    """Escape as Python does; a byte of a file name that is no letter, as that byte."""
    code = ord(letter)
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else letter.encode("unicode_escape").decode()


def advice(letters: Iterable[str]) -> str:
    wide = any(unicodedata.east_asian_width(letter) == "W" and letter.isalpha() for letter in letters)
    return f"Install a font that has them, as with: sudo apt install {'fonts-noto-cjk' if wide else 'fonts-noto-core'}."
