from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import structlog
from builders import wait_until

from fedmoe.server.storage import audit
from fedmoe.server.storage.audit import AuditHead, AuditLog, check_file, check_lines


def written(folder: Path, count: int, known: AuditHead | None = None, **options: int) -> AuditHead:
    log = AuditLog(folder, lambda: 1_000_000.0, known or AuditHead(), **options)
    for number in range(count):
        log.write(what="POST /rollback", outcome="ok", number=number)
    log.close()
    return log.head


def lines_of(folder: Path) -> list[bytes]:
    return (folder / "audit.jsonl").read_bytes().splitlines(keepends=True)


def test_every_line_is_numbered_and_chained_across_restarts(tmp_path: Path) -> None:
    head = written(tmp_path, 3)
    head = written(tmp_path, 2, head)
    found = [json.loads(line) for line in lines_of(tmp_path)]
    assert [line["n"] for line in found] == [1, 2, 3, 4, 5]
    assert found[0]["at"] == "1970-01-12T13:46:40.000+00:00"
    assert check_file(tmp_path, head) == audit.AuditCheck(head, ())
    assert AuditHead.of_text(str(head)) == head
    assert os.stat(tmp_path / "audit.jsonl").st_mode & 0o777 == 0o600


Harm = Callable[[list[bytes]], list[bytes]]
HARMS: dict[str, tuple[Harm, str]] = {
    "an edited digit": (lambda lines: [line.replace(b'"number": 2', b'"number": 7') for line in lines], "n 3"),
    "an edited first line": (lambda lines: [lines[0].replace(b"rollback", b"retract_"), *lines[1:]], "was changed"),
    "a line taken out": (lambda lines: [*lines[:2], *lines[3:]], "(n 4) does not follow n 2"),
    "two lines exchanged": (lambda lines: [lines[0], lines[2], lines[1], *lines[3:]], "does not follow"),
    "a line put in": (lambda lines: [*lines[:2], b'{"n": 3, "chain": "00"}\n', *lines[2:]], "does not follow"),
    "a cut tail": (lambda lines: lines[:3], "those after n 3 are not in the file"),
    "half a line": (lambda lines: [*lines[:4], lines[4][:20]], "line 5 cannot be read"),
    "no line at all": (lambda _: [], "those after n 0 are not in the file"),
    "noise": (lambda lines: [*lines[:4], b"\xff\x00\n", lines[4]], "line 5 cannot be read"),
    "another log": (lambda _: b"".join(other_log()).splitlines(keepends=True), "is not the one that was noted"),
}


def other_log() -> list[bytes]:
    head, lines = AuditHead(), []
    for _ in range(5):
        line, head = audit.line_of(head, {"what": "something else"})
        lines.append(line)
    return lines


@pytest.mark.parametrize("name", HARMS)
def test_a_break_of_the_chain_is_reported_at_the_next_start_and_the_log_goes_on_85(tmp_path: Path, name: str) -> None:
    harm, words = HARMS[name]
    head = written(tmp_path, 5)
    (tmp_path / "audit.jsonl").write_bytes(b"".join(harm(lines_of(tmp_path))))
    with structlog.testing.capture_logs() as told:
        later = written(tmp_path, 1, head)
    reasons = [line["reason"] for line in told if line["event"] == "audit_chain_broken"]
    assert any(words in reason for reason in reasons), reasons
    noted = [json.loads(line)["detail"] for line in lines_of(tmp_path) if b"audit_chain_broken" in line]
    assert noted == reasons
    assert json.loads(lines_of(tmp_path)[-1])["what"] == "POST /rollback"
    assert later.n > head.n


def test_a_log_that_is_in_order_reports_nothing(tmp_path: Path) -> None:
    with structlog.testing.capture_logs() as told:
        written(tmp_path, 2, written(tmp_path, 2))
        assert check_lines(iter(()), AuditHead()).breaks == ()
    assert told == []


@pytest.mark.parametrize("how", ["deleted", "rotated", "replaced", "cut"])
def test_a_file_that_was_deleted_or_rotated_is_opened_again_and_the_chain_goes_on_85(tmp_path: Path, how: str) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog(tmp_path, lambda: 0.0, AuditHead())
    log.write(what="before")
    wait_until(lambda: log.head.n == 1)
    if how == "deleted":
        path.unlink()
    elif how == "cut":
        os.truncate(path, 0)
    else:
        path.rename(tmp_path / "audit.jsonl.1")
        if how == "replaced":
            path.write_bytes(b"")
    with structlog.testing.capture_logs() as told:
        log.write(what="after")
        log.close()
    assert [line["event"] for line in told] == ["audit_file_reopened"]
    found = [json.loads(line) for line in lines_of(tmp_path)]
    assert [(line["n"], line["what"]) for line in found] == [(2, "audit_file_reopened"), (3, "after")]
    assert check_file(tmp_path, log.head).breaks == ()


def test_the_log_is_bounded_and_full_files_are_set_aside_under_their_first_line_85(tmp_path: Path) -> None:
    head = written(tmp_path, 200, most_bytes=2000, most_files=2)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert len(files) == 3
    assert head.n == 200
    assert all(path.stat().st_size <= 2000 for path in tmp_path.iterdir())
    numbers = [json.loads(line)["n"] for name in files[1:] for line in (tmp_path / name).read_bytes().splitlines()]
    older = [json.loads(line)["n"] for line in (tmp_path / files[0]).read_bytes().splitlines()]
    assert files[0] == f"audit-{older[0]:012d}.jsonl"
    assert sorted([*older, *numbers]) == list(range(min([*older, *numbers]), 201))
    assert check_file(tmp_path, head).breaks == ()


def test_what_the_disk_does_not_take_is_counted_and_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = AuditLog(tmp_path, lambda: 0.0, AuditHead())
    real, full = os.write, threading.Event()
    full.set()

    def write(descriptor: int, data: bytes) -> int:
        if full.is_set():
            raise OSError(28, "No space left on device")
        return real(descriptor, data)

    with structlog.testing.capture_logs() as told:
        monkeypatch.setattr(os, "write", write)
        for _ in range(3):
            log.write(what="lost")
        wait_until(lambda: log._lost == 3)
        full.clear()
        log.write(what="kept")
        log.close()
    assert [line["event"] for line in told] == ["audit_not_written"]
    (line,) = [json.loads(line) for line in lines_of(tmp_path)]
    assert (line["what"], line["n"], line["lost_before"]) == ("kept", 1, 3)
