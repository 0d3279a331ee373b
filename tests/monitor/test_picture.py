"""Names in any script are readable in charts where the machine has a font; where it has none, one line says so."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from matplotlib import font_manager, get_data_path
from matplotlib.figure import Figure
from structlog.testing import capture_logs

from fedmoe.monitor import picture
from fedmoe.monitor.picture import CHINESE_FONTS, Font, png, shown_by, stand_ins

#: A font with mathematical letters that matplotlib brings, and letters of which its text font lacks at least one.
STIX = str(Path(get_data_path()) / "fonts" / "ttf" / "STIXGeneral.ttf")
LETTER = "ᵊ⅓𝞉"


def coverage(files: dict[str, str]) -> object:
    return lambda file, characters: characters & frozenset(files[file])


def test_fonts_made_for_chinese_come_first_and_as_few_as_are_needed() -> None:
    files = {"a": "模式x", "b": "模式千问", "c": "千", "d": "😀"}
    fonts = [Font("Abc", "a"), Font("SimHei", "b"), Font("Noto Sans CJK SC", "c"), Font("Emoji", "d")]
    found = stand_ins("模千", fonts, coverage(files))  # type: ignore[arg-type]
    assert found == (["Noto Sans CJK SC", "SimHei"], frozenset())
    assert stand_ins("x😀", fonts, coverage(files)) == (["Abc", "Emoji"], frozenset())  # type: ignore[arg-type]
    assert stand_ins("한", fonts, coverage(files)) == ([], frozenset("한"))  # type: ignore[arg-type]


def test_no_font_is_named_twice() -> None:
    assert len(set(CHINESE_FONTS)) == len(CHINESE_FONTS)


def test_a_font_of_boxes_shows_nothing() -> None:
    known = {font.family for font in picture.installed_fonts()}
    assert "DejaVu Sans" in known
    assert not any("Last Resort" in family for family in known)


def test_a_file_that_is_no_font_shows_nothing(tmp_path: Path) -> None:
    (tmp_path / "bad.ttf").write_bytes(b"no font")
    assert shown_by(str(tmp_path / "bad.ttf"), frozenset("a")) == frozenset()


@pytest.fixture
def without_fonts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine with the fonts that matplotlib brings for text, and none else."""
    monkeypatch.setattr(picture, "installed_fonts", list)
    monkeypatch.setattr(font_manager, "findSystemFonts", list)
    picture._advise.cache_clear()
    picture._find_new_fonts.cache_clear()
    yield
    picture._advise.cache_clear()
    picture._find_new_fonts.cache_clear()


def figure(text: str) -> Figure:
    made = Figure(figsize=(4, 2))
    axes = made.add_subplot()
    axes.bar([0, 1], [1, 2], label=text)
    axes.set_xticks([0, 1], [text, f"{text} two"])
    axes.set_title(text)
    axes.legend()
    return made


def test_without_a_font_one_line_says_what_to_install(without_fonts: None) -> None:
    with capture_logs() as logs, warnings.catch_warnings():
        warnings.simplefilter("error")
        assert png(figure("合作 한국어")).startswith(b"\x89PNG")
        png(figure("竞争"))
    assert [line["event"] for line in logs] == ["no_font_for_charts"]
    assert "apt-get install fonts-noto-cjk" in logs[0]["fix"]


def test_what_the_usual_font_has_needs_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picture, "installed_fonts", lambda: pytest.fail("it looked for fonts"))
    with capture_logs() as logs:
        png(figure("Grüße, Привет, a → b …"))
    assert logs == []


def test_a_font_that_is_installed_shows_its_characters(without_fonts: None, monkeypatch: pytest.MonkeyPatch) -> None:
    text = next(one for one in LETTER if shown_by(STIX, frozenset(one)) and not _shown_by_default(one))
    with capture_logs():
        boxes = png(figure(text))
    monkeypatch.setattr(picture, "installed_fonts", lambda: [Font("STIXGeneral", STIX)])
    with capture_logs() as logs:
        letters = png(figure(text))
    assert logs == []
    assert letters != boxes


def _shown_by_default(character: str) -> bool:
    own = font_manager.findfont("DejaVu Sans")
    return bool(shown_by(own, frozenset(character)))


def test_a_font_installed_after_matplotlib_looked_is_found(
    without_fonts: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    new = tmp_path / "new.ttf"
    new.write_bytes(Path(STIX).read_bytes())
    (tmp_path / "bad.ttf").write_bytes(b"no font")
    known = list(font_manager.fontManager.ttflist)
    monkeypatch.setattr(font_manager.fontManager, "ttflist", known)
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [str(tmp_path / "bad.ttf"), str(new)])
    with capture_logs():
        png(figure("合"))
    assert [one.fname for one in known[-1:]] == [str(new)]


def test_other_warnings_of_drawing_are_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(self: object, buffer: object, **settings: object) -> None:
        warnings.warn("something else", UserWarning, stacklevel=1)

    monkeypatch.setattr("matplotlib.backends.backend_agg.FigureCanvasAgg.print_png", draw)
    with pytest.warns(UserWarning, match="something else"):
        png(figure("a"))
