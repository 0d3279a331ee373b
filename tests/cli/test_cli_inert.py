from __future__ import annotations

import pytest

from fedmoe.cli.output import guarded, say, show_table
from fedmoe.runtime.errors import RefusedError

ESCAPES = "\x1b]0;title\x07\x1b[2J\x9b31m\u202e"


def test_what_others_wrote_moves_no_cursor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    show_table(f"title {ESCAPES}", ("name",), [(f"row {ESCAPES}",)])
    say(f"note {ESCAPES}")
    said = capsys.readouterr().out
    assert "\\x1b]0;title\\x07" in said
    assert all(character.isprintable() or character == "\n" for character in said)


def test_an_error_moves_no_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    def fails(arguments: list[str], standalone_mode: bool) -> int:
        raise RefusedError("forbidden", f"said the coordinator {ESCAPES}")

    with pytest.raises(SystemExit):
        guarded(fails, [])
    said = capsys.readouterr().err
    assert all(character.isprintable() or character == "\n" for character in said)
    assert "\\x1b[2J" in said
