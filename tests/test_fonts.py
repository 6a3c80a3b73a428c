"""Text of any script in figures: the fonts that are found for it, and what stands there where there is none."""

from pathlib import Path

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder  # type: ignore[import-untyped]
from fontTools.pens.ttGlyphPen import TTGlyphPen  # type: ignore[import-untyped]
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.text import Text

from detr_fast.evaluation import fonts, plots
from detr_fast.evaluation.fonts import Fonts, class_names
from detr_fast.evaluation.pictures import Picture, draw_detections

CHINESE = "\u7ec4\u7ec7\u94b3"
QUIET = pytest.mark.filterwarnings("error")


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Fonts:
    """What a machine with matplotlib's own fonts has, before anything was told."""
    own = [each for each in fontManager.ttflist if "mpl-data" in each.fname]
    monkeypatch.setattr(fontManager, "ttflist", own)
    monkeypatch.setattr(fonts, "findSystemFonts", list)
    new = Fonts()
    monkeypatch.setattr(fonts, "FONTS", new)
    monkeypatch.setattr(plots, "FONTS", new)
    return new


def write_font(path: Path, letters: str, family: str) -> str:
    """A font in which each of `letters` is a square."""
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((0, 700), (700, 700), (700, 0)):
        pen.lineTo(corner)
    pen.closePath()
    names = [".notdef", *(f"uni{ord(letter):04X}" for letter in letters)]
    font = FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder(names)
    font.setupCharacterMap({ord(letter): f"uni{ord(letter):04X}" for letter in letters})
    font.setupGlyf(dict.fromkeys(names, pen.glyph()))
    font.setupHorizontalMetrics(dict.fromkeys(names, (800, 0)))
    font.setupHorizontalHeader(ascent=800, descent=-200)
    font.setupNameTable({"familyName": family, "styleName": "Regular"})
    font.setupOS2(sTypoAscender=800)
    font.setupPost()
    font.save(path)
    return str(path)


def drawn(title: str, names: tuple[str, ...], path: Path) -> None:
    boxes = np.array([[4.0, 8, 30, 40]] * len(names)).reshape(-1, 4)
    image = np.full((64, 64, 3), 90, dtype=np.uint8)
    draw_detections([Picture(image, title, boxes=boxes, names=names, scores=[0.5] * len(names))], path)


def test_without_a_font_classes_are_numbers_and_one_warning_says_which(alone: Fonts, tmp_path: Path) -> None:
    with pytest.warns(UserWarning) as told:
        shown = class_names({1: CHINESE, 3: "cat", 7: "\u76f4\u526a"})
        for number in range(2):
            drawn(f"{CHINESE}.jpg", tuple(shown.values()), tmp_path / f"{number}.png")
    assert shown == {1: "class 1", 3: "cat", 7: "class 7"}
    (message,) = (str(each.message) for each in told)
    assert f"class 1 is {CHINESE}, class 7 is" in message and "fonts-noto-cjk" in message


@QUIET
def test_an_installed_font_is_found_and_used(alone: Fonts, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also one that was installed after matplotlib had made its list; of several, the one with most letters."""
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    paths = [
        write_font(tmp_path / "few.ttf", CHINESE[:1], "Few"),
        write_font(tmp_path / "most.ttf", CHINESE, "Most"),
        str(tmp_path / "broken.ttf"),
    ]
    monkeypatch.setattr(fonts, "findSystemFonts", lambda: paths)
    assert class_names({1: CHINESE}) == {1: CHINESE}
    assert alone.families == ["Most"]
    figure = Figure()
    figure.text(0, 0, f"a {CHINESE}")
    plots.save_figure(figure, tmp_path / "figure.png")
    (text,) = (each for each in figure.findobj(Text) if isinstance(each, Text) and each.get_text())
    assert text.get_fontfamily()[-1] == "Most"


@QUIET
@pytest.mark.parametrize(
    "name", ["caf\udce9.jpg", "a\nb\tc.jpg", "\x1b[31m.jpg", "$x_{", "e\u0301\u200d\ufe0f", "\u0634\u0643\u0644"]
)
def test_any_name_is_drawn_without_a_warning(alone: Fonts, name: str, tmp_path: Path) -> None:
    drawn(name, (name,), tmp_path / "figure.png")


def test_what_is_no_letter_is_escaped(alone: Fonts) -> None:
    assert alone.shown("caf\udce9 \t$x$\n\u2212") == "caf\\xe9 \\t$x$\n\u2212"
    with pytest.warns(UserWarning, match="escaped.*fonts-noto-cjk"):
        assert alone.shown("\u7ec4.jpg") == "\\u7ec4.jpg"
