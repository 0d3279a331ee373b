"""`fedmoe status --watch`: the status again and again, until Ctrl-C."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from builders import wait_until
from forks import Fork
from live import LiveServer


@pytest.mark.parametrize("as_json", [True, False])
def test_a_watched_status_is_printed_again_and_as_a_line_of_json_each(
    as_json: bool, server: LiveServer, tmp_path: Path
) -> None:
    out, errors = tmp_path / "out", tmp_path / "errors"
    arguments = ["-m", "fedmoe", "status", "--watch", "--coordinator-url", server.url]
    process = Fork([*arguments, *(["--json"] if as_json else [])], out, errors)
    try:
        again = "\n" if as_json else "Workers"
        wait_until(lambda: out.exists() and out.read_text().count(again) > 1, 120)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) in (0, 130)  # between two looks, or during one
    finally:
        process.kill()
    text = out.read_text()
    if as_json:
        assert all({"experts", "workers"} <= json.loads(line).keys() for line in text.splitlines()[:2])
    else:
        assert "\x1b" not in text  # the screen is cleared on terminals alone
