"""Fonts for text in figures: for letters of any script where this machine has one, else escapes."""

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


class Fonts:
    """Finds the fonts that figures need beside matplotlib's default, as letters are asked for."""

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
        """Return letters that no font found so far has, without invisible marks."""
        return {
            letter
            for letter in text
            if letter != "\n" and not unseen(letter) and not any(has(font, letter) for font in self._fonts)
        }

    def shown(self, text: str) -> str:
        """Escape the letters of `text` that no font here has, and control characters."""
        lacking = set(self.lacking(text))
        if letters := [each for each in lacking if unicodedata.category(each)[0] != "C"]:
            self.warn_once(f"Some letters in pictures are escaped, for no font here has them. {advice(letters)}")
        return "".join(escaped(each) if each in lacking else each for each in text)

    def warn_once(self, message: str) -> None:
        """Warn once of what fonts lack, however many figures and letters there are."""
        if not self._told:
            self._told = True
            warnings.warn(message)

    def prepare(self, figure: Figure) -> None:
        """Give every text in `figure` the fonts that it needs, and escape the letters that no font has."""
        for text in figure.findobj(Text):
            assert isinstance(text, Text)
            text.set_text(self.shown(text.get_text()))
            if self.families and not text.get_text().isascii():
                text.set_fontfamily([*text.get_fontfamily(), *self.families])


FONTS = Fonts()


def class_names(names: Mapping[int, str]) -> dict[int, str]:
    """Map category ids to names for figures: "class ID", with a warning, where no font has a name's letters."""
    lacking = {id_: FONTS.lacking(name) for id_, name in names.items()}
    nameless = [id_ for id_, letters in lacking.items() if letters]
    if nameless:
        told = [f"class {id_} is {names[id_]}" for id_ in nameless[:NAMED_AT_MOST]]
        more = f" and {len(nameless) - len(told)} more" if len(nameless) > len(told) else ""
        FONTS.warn_once(
            f"No font here has the letters of these class names, so pictures have numbers: {', '.join(told)}{more}. "
            + advice(chain.from_iterable(lacking.values()))
        )
    return {id_: f"class {id_}" if lacking[id_] else name for id_, name in names.items()}


def one_line(text: str) -> str:
    return text.replace("\n", "\\n")


def best_font(letters: set[str]) -> FT2Font | None:
    """Find the installed font that has most of `letters`; upright ones of normal weight come first."""
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
    """Yield installed outline fonts, without those that draw every letter as a box."""
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
    """Tell whether `letter` is invisible: a joiner, a direction mark or a variation selector."""
    return unicodedata.category(letter) == "Cf" or "\ufe00" <= letter <= "\ufe0f"


def escaped(letter: str) -> str:
    """Escape as Python does; a byte of a file name that is no letter, as that byte."""
    code = ord(letter)
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else letter.encode("unicode_escape").decode()


def advice(letters: Iterable[str]) -> str:
    wide = any(unicodedata.east_asian_width(letter) == "W" and letter.isalpha() for letter in letters)
    return f"Install a font that has them, as with: sudo apt install {'fonts-noto-cjk' if wide else 'fonts-noto-core'}."
