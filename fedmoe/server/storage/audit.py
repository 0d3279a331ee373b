"""The audit log: one JSON object per line, chained by hashes, rotated by size.

A file of its own beside the journal, apart from the service log. It is bounded: a full file is set aside under the
number of its first line, and only the newest of those stay. Every line has a number `n` and `chain`, the sha256 of the
chain before it and of the line itself, so that a line that was changed, moved or taken out is found. Whoever can write
the folder can also write a new chain; what was noted elsewhere (`head`) shows that.
"""

from __future__ import annotations

import hashlib
import json
import os
import queue
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import structlog

_log = structlog.get_logger("fedmoe.audit")

AUDIT_FILE = "audit.jsonl"
#: Under this key of `meta` the journal holds where the audit log was when somebody last looked.
AUDIT_HEAD = "audit_head"
_BEGINNING = "0" * 64
_MOST_BYTES = 8 << 20
_MOST_FILES = 4
_MOST_WAITING = 10_000
_MOST_BREAKS = 20

Fact = str | int | float | bool | None


@dataclass(frozen=True, slots=True)
class AuditHead:
    """The last line of an audit log: its number and its chain."""

    n: int = 0
    chain: str = _BEGINNING

    def __str__(self) -> str:
        return f"{self.n} {self.chain}"

    @classmethod
    def of_text(cls, text: str | None) -> AuditHead:
        number, _, chain = (text or "").partition(" ")
        return cls(int(number), chain) if number.isdecimal() and len(chain) == len(_BEGINNING) else cls()


@dataclass(frozen=True, slots=True)
class AuditCheck:
    """What a file holds: its last line, and what is wrong with it, in words."""

    head: AuditHead
    breaks: tuple[str, ...]


def line_of(before: AuditHead, facts: Mapping[str, Fact]) -> tuple[bytes, AuditHead]:
    """The next line of a log, and the head after it."""
    numbered = {"n": before.n + 1, **facts}
    chain = _chain(before.chain, numbered)
    # JSON escapes all other control characters.
    line = json.dumps(numbered | {"chain": chain}).replace("\x7f", "\\u007f")
    return line.encode() + b"\n", AuditHead(before.n + 1, chain)


def check_lines(lines: Iterable[bytes], noted: AuditHead) -> AuditCheck:
    """Follow the chain of a file; `noted` is a head of before, which it must hold or come after."""
    breaks: list[str] = []
    head: AuditHead | None = None
    for place, line in enumerate(lines, 1):
        entry = _entry(line)
        if entry is None:
            breaks.append(f"line {place} cannot be read")
            continue
        number, chain, facts = entry
        if head is not None and (number != head.n + 1 or chain != _chain(head.chain, facts)):
            breaks.append(f"line {place} (n {number}) does not follow n {head.n}")
        elif head is None and number == 1 and chain != _chain(_BEGINNING, facts):
            breaks.append("line 1 was changed")
        if number == noted.n and chain != noted.chain:
            breaks.append(f"line {place} (n {number}) is not the one that was noted")
        head = AuditHead(number, chain)
    if noted.n and (head is None or head.n < noted.n):
        breaks.append(
            f"lines up to n {noted.n} were written, those after n {head.n if head else 0} are not in the file"
        )
        head = noted
    return AuditCheck(head or AuditHead(), tuple(breaks[:_MOST_BREAKS]))


def check_file(folder: Path, noted: AuditHead) -> AuditCheck:
    """Check the file that is written to now; one that was never there is in order.

    What is no file, as a pipe that would be waited for, is not read.
    """
    lines: list[bytes] = []
    if (folder / AUDIT_FILE).is_file():
        with suppress(FileNotFoundError), (folder / AUDIT_FILE).open("rb") as file:
            lines = file.readlines()
    return check_lines(lines, noted)


class AuditLog:
    """Writes the audit log from a thread of its own, so that no request waits for the disk.

    `noted` is the head that was noted when it was last closed; what is wrong with the file at opening is logged, and
    written as a line. `clock` gives seconds since 1970.
    """

    def __init__(
        self,
        folder: Path,
        clock: Callable[[], float],
        noted: AuditHead,
        most_bytes: int = _MOST_BYTES,
        most_files: int = _MOST_FILES,
    ) -> None:
        self._folder = folder
        self._path = folder / AUDIT_FILE
        self._clock = clock
        self._most_bytes, self._most_files = most_bytes, most_files
        check = check_file(folder, noted)
        # The folder that was opened, whatever takes its name later: another coordinator's log is not to be written to.
        self._folder_descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        self._head = check.head
        self._descriptor = -1
        self._size = 0
        self._lost = 0
        self._waiting: queue.SimpleQueue[Mapping[str, Fact] | None] = queue.SimpleQueue()
        for reason in check.breaks:
            _log.error("audit_chain_broken", file=str(self._path), reason=reason)
            self.write(what="audit_chain_broken", detail=reason)
        self._thread = threading.Thread(target=self._run, name="fedmoe-audit", daemon=True)
        self._thread.start()

    @property
    def head(self) -> AuditHead:
        """The last line that was written."""
        return self._head

    def write(self, **facts: Fact) -> None:
        """Note something; returns at once. Where the disk is too slow for so many, how many are lost is noted."""
        if self._waiting.qsize() >= _MOST_WAITING:
            self._lost += 1
            return
        at = datetime.fromtimestamp(self._clock(), UTC).isoformat(timespec="milliseconds")
        self._waiting.put({"at": at, **facts})

    def close(self) -> None:
        """Write what waits, and release the file."""
        self._waiting.put(None)
        self._thread.join()
        if self._descriptor >= 0:
            os.close(self._descriptor)
        os.close(self._folder_descriptor)

    def _run(self) -> None:
        while (facts := self._waiting.get()) is not None:
            try:
                self._write(facts)
            except OSError as error:
                if not self._lost:
                    _log.error("audit_not_written", file=str(self._path), reason=str(error))
                self._lost += 1

    def _write(self, facts: Mapping[str, Fact]) -> None:
        self._follow_the_file()
        if self._lost:
            facts = {**facts, "lost_before": self._lost}
        line, head = line_of(self._head, facts)
        if self._size and self._size + len(line) > self._most_bytes:
            self._set_aside()
        written = os.write(self._descriptor, line)
        self._size += written
        if written < len(line):
            raise OSError(f"only {written} of {len(line)} bytes were taken")
        self._head, self._lost = head, 0

    def _follow_the_file(self) -> None:
        """Open the file, again if somebody moved, removed or cut it meanwhile, and say so then."""
        reason = self._what_happened()
        if reason is None:
            return
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1  # so that nothing is closed twice if it cannot be opened again
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
        self._descriptor = os.open(AUDIT_FILE, flags, 0o600, dir_fd=self._folder_descriptor)
        self._size = os.fstat(self._descriptor).st_size
        if self._size and os.pread(self._descriptor, 1, self._size - 1) != b"\n":
            self._size += os.write(self._descriptor, b"\n")  # half a line spoils itself only
        if reason:
            _log.warning("audit_file_reopened", file=str(self._path), reason=reason, after_n=self._head.n)
            line, self._head = line_of(self._head, {"what": "audit_file_reopened", "detail": reason})
            self._size += os.write(self._descriptor, line)

    def _what_happened(self) -> str | None:
        """None: it is the file that is open; empty: none is open yet."""
        if self._descriptor < 0:
            return ""
        mine = os.fstat(self._descriptor)
        try:
            there = os.stat(AUDIT_FILE, dir_fd=self._folder_descriptor)
        except FileNotFoundError:
            return "it was moved or removed"
        if (there.st_dev, there.st_ino) != (mine.st_dev, mine.st_ino):
            return "another file took its place"
        return "it was cut" if there.st_size < self._size else None

    def _set_aside(self) -> None:
        with self._path.open("rb") as file:
            entry = _entry(file.readline())
        os.rename(self._path, self._folder / f"audit-{entry[0] if entry is not None else 0:012d}.jsonl")
        older = sorted(self._folder.glob("audit-*.jsonl"))
        for oldest in older[: max(0, len(older) - self._most_files)]:
            oldest.unlink(missing_ok=True)
        os.close(self._descriptor)
        self._descriptor = -1
        self._follow_the_file()


def _entry(line: bytes) -> tuple[int, str, dict[str, object]] | None:
    """A line's number, chain and the rest; None for what is no line of ours."""
    try:
        facts = json.loads(line)
        chain = facts.pop("chain")
        number = facts["n"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return (number, chain, facts) if isinstance(number, int) and isinstance(chain, str) else None


def _chain(before: str, facts: Mapping[str, object]) -> str:
    return hashlib.sha256(f"{before} {json.dumps(facts)}".encode()).hexdigest()
