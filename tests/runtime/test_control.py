"""The control file: what changes while a run goes on (E16)."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from fedmoe.runtime.memory import Control, ControlFile, parse_control


def test_a_control_file_is_read_once_each_time_it_changes(tmp_path: Path) -> None:
    file = ControlFile(tmp_path)
    for number in (1, 2):
        (tmp_path / "new").write_text(json.dumps({"max_batch": number}))
        os.replace(tmp_path / "new", file.path)
        assert file.changed() == Control(max_batch=number)
        assert file.changed() is None
    file.path.unlink()
    assert file.changed() is None
    file.path.write_text('{"max_batch": 2}')
    assert file.changed() == Control(max_batch=2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("", "not JSON"),
        ("[1]", "JSON object is needed, got list"),
        ('{"memory_limit": 3}', r"unknown keys \['memory_limit'\]; known are"),
        ('{"memory_limit_gb": "8"}', "memory_limit_gb must be a positive number"),
        ('{"memory_limit_gb": true}', "memory_limit_gb must be"),
        ('{"memory_limit_gb": 0}', "got 0"),
        ('{"memory_limit_gb": NaN}', "got nan"),
        ('{"memory_limit_gb": 1e400}', "got inf"),
        ('{"max_batch": 1.5}', "max_batch must be a positive whole number"),
        ('{"max_batch": 0}', "got 0"),
        ('{"max_batch": true}', "got True"),
        ('{"max_batch": 4, "memory_limit_gb": -1}', "got -1"),
    ],
)
def test_a_wrong_control_file_changes_nothing_and_is_named_once(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        parse_control(text)
    file = ControlFile(tmp_path)
    file.path.write_text(text)
    with capture_logs() as lines:
        assert file.changed() is None
        assert file.changed() is None
    assert [line["event"] for line in lines] == ["control_file_ignored"]


@given(st.text(max_size=40) | st.binary(max_size=40).map(lambda data: data.decode("latin-1")))
def test_no_text_breaks_the_reader_of_the_control_file(text: str) -> None:
    try:
        assert isinstance(parse_control(text), Control)
    except ValueError:
        return
