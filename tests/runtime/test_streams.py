"""Whatever is printed can be printed: on any encoding, and with nobody left to read it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SAMPLE = "东京 😀 Grüße \ud83d"


def python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, *([] if code == "" else ["-c", code]), *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, timeout=120)


PRINTS = """
import sys
from fedmoe.runtime.streams import printing_safely
with printing_safely():
    print({!a})
    print({!a}, file=sys.stderr)
"""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "gbk", "utf-8"])
def test_what_an_encoding_lacks_is_escaped(encoding: str) -> None:
    done = python(PRINTS.format(SAMPLE, SAMPLE), PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    expected = SAMPLE.encode(encoding, errors="backslashreplace")
    assert (done.stdout.strip(), done.stderr.strip()) == (expected, expected)


def test_the_c_locale_is_no_end(tmp_path: Path) -> None:
    done = python(PRINTS.format(SAMPLE, SAMPLE), LANG="C", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert done.returncode == 0, done.stderr
    assert b"\\u4e1c\\u4eac" in done.stdout


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_tables_and_reports_of_commands_are_printed(encoding: str, tmp_path: Path) -> None:
    code = "from fedmoe.runtime.streams import printing_safely\nfrom fedmoe.cli.output import show_table\n"
    code += "with printing_safely(): show_table('东京', ('列', 'b'), [('…', 1)])"
    done = python(code, PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    assert b"\\u4e1c" in done.stdout
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": SAMPLE}) + "\n{broken 东\n")
    checked = python("", "-m", "fedmoe", "data", "check", str(tmp_path / "x.jsonl"), PYTHONIOENCODING=encoding)
    assert b"Traceback" not in checked.stderr


def test_a_closed_output_is_nothing_to_die_of() -> None:
    command = f"exec {sys.executable} -m fedmoe --version >&- 2>&-"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def run_into_a_closed_pipe(command: list[str]) -> tuple[int, bytes]:
    """Status and standard error of a program whose standard output nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(command, cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, timeout=120)
    finally:
        os.close(writing)
    return done.returncode, done.stderr


LONG = """
import sys
from fedmoe.runtime.streams import printing_safely
with printing_safely():
    for line in range(200_000):
        print("a line of text", line)
"""


@pytest.mark.parametrize("code", [LONG, "from fedmoe.cli import main; main(['--help'])"])
def test_a_reader_that_leaves_ends_the_program_without_a_word(code: str) -> None:
    assert run_into_a_closed_pipe([sys.executable, "-c", code]) == (141, b"")


def test_another_broken_pipe_is_still_an_error() -> None:
    code = (
        "from fedmoe.runtime.streams import printing_safely\nwith printing_safely(): raise BrokenPipeError('another')"
    )
    done = python(code)
    assert done.returncode == 1
    assert b"BrokenPipeError: another" in done.stderr


def test_an_exit_status_stays_what_it_was() -> None:
    code = "from fedmoe.runtime.streams import printing_safely\nwith printing_safely(): print('x'); raise SystemExit(7)"
    assert python(code).returncode == 7


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a full device")
def test_an_output_that_cannot_take_more_is_one_line() -> None:
    buffered = os.environ | {"PYTHONUNBUFFERED": ""}
    for code in (
        "from fedmoe.cli import main; main(['--version'])",
        "from fedmoe.runtime.streams import printing_safely\nimport sys\nwith printing_safely(): sys.stdout.write('x')",
    ):
        with open("/dev/full", "wb") as full:
            done = subprocess.run(
                [sys.executable, "-c", code], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, timeout=120, env=buffered
            )
        assert done.returncode == 1
        assert done.stderr.decode().strip().startswith("error: ")
        assert done.stderr.decode().strip().endswith("No space left on device")
        assert len(done.stderr.decode().strip().splitlines()) == 1
