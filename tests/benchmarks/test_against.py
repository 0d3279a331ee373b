"""How two builds are compared: the same work is asked of both in turns, and a revision that is not there is refused."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def programs_import_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    # What pins threads would start the tests anew.
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, "1")


def test_work_is_done_a_line_and_its_digest_given_at_the_end() -> None:
    from lib.against_work import serve

    done: list[int] = []
    answers = io.StringIO()
    serve((done.append, lambda: "d" * 8), io.StringIO("run\nrun\nend\n"), answers)
    first, second, last = map(json.loads, answers.getvalue().splitlines())
    assert done == [0, 1]
    assert min(first["cpu"], second["cpu"]) >= 0
    assert last == {"digest": "d" * 8}


def test_modules_are_found_by_the_name_that_the_revision_has(tmp_path: Path) -> None:
    from lib.against_work import module

    with pytest.raises(SystemExit, match=r"has none of lib\.arena_step, arena_step; name a revision that has"):
        module(tmp_path, "lib.arena_step", "arena_step")
    assert module(ROOT, "lib.nonsense", "lib.against_work").__name__ == "lib.against_work"


def test_both_sides_take_turns_and_a_ratio_is_of_a_pair() -> None:
    from bench_against import compared

    order: list[str] = []

    def side(name: str, seconds: float) -> float:
        order.append(name)
        return seconds * (len(order) > 2)

    found = compared(
        {
            "before": (lambda: side("before", 2.0), lambda: "same"),
            "now": (lambda: side("now", 1.0), lambda: "same"),
        },
        2,
    )
    assert order == ["now", "before", "before", "now", "now", "before"]
    assert found["ratio"] == {"median": 0.5, "minimum": 0.5, "maximum": 0.5}
    assert (found["pairs"], found["same_result"]) == (2, True)


def test_a_revision_that_is_not_there_is_refused() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "bench_against.py"), "--against", "nonsense"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "--against nonsense" in done.stderr
    assert "name a commit of this repository" in done.stderr
