"""Crash markers: which body was being processed when the process died; one that was in three crashes is refused.

A small file is written before a body is decoded and removed once it was answered. Files that a start finds are of
bodies that were in flight when the process ended; the count of such ends is kept in them. It need not survive a power
cut: that is no body's fault.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import structlog

#: A body that was in flight at so many ends of the process is not processed again.
MOST_CRASHES = 3
# What nobody sent again for so long is forgotten.
_KEPT_SECONDS = 7 * 86400.0
_NAME = re.compile("[0-9a-f]{64}")
_log = structlog.get_logger("fedmoe.coordinator")


@dataclass(frozen=True, slots=True)
class InFlightBody:
    """A body that is processed: the sha256 of its bytes, and whose it is."""

    digest: str
    expert: str
    worker: str
    sequence: int
    size: int


class CrashMarkers:
    """The markers in a folder; None keeps none."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._crashes: dict[str, int] = {}
        self._running: Counter[str] = Counter()
        self._lock = threading.Lock()
        if folder is not None:
            folder.mkdir(exist_ok=True, mode=0o700)
            self._read(folder)

    def _read(self, folder: Path) -> None:
        for path in sorted(folder.iterdir()):
            if not _NAME.fullmatch(path.name):
                continue
            try:
                marker = json.loads(path.read_bytes())
            except ValueError:
                marker = None
            marker = marker if isinstance(marker, dict) else {}
            crashes, running = int(marker.get("crashes", 0)), bool(marker.get("running", True))
            if not running and time.time() - path.stat().st_mtime > _KEPT_SECONDS:
                path.unlink()
                continue
            self._crashes[path.name] = crashes + running
            if running:
                marker |= {"crashes": crashes + 1, "running": False}
                path.write_text(json.dumps(marker))
                shown = {key: marker[key] for key in ("expert", "worker", "sequence", "size") if key in marker}
                _log.warning("was_in_flight", **shown, digest=path.name[:12], crashes=crashes + 1)

    def suspicion(self, digest: str) -> str:
        """Why these bytes must not be processed, in words; empty if they may be."""
        crashes = self._crashes.get(digest, 0)
        if crashes < MOST_CRASHES:
            return ""
        return f"the coordinator was killed {crashes} times while it processed these bytes, so they were not read again"

    @contextmanager
    def processing(self, body: InFlightBody) -> Iterator[None]:
        """Mark a body while it is processed; one under suspicion is not, and keeps its count."""
        if self._folder is None or self.suspicion(body.digest):
            yield
            return
        path = self._folder / body.digest
        with self._lock:
            self._running[body.digest] += 1
            marker = asdict(body) | {"crashes": self._crashes.get(body.digest, 0), "running": True}
            try:
                path.write_text(json.dumps(marker))
            except OSError as error:
                # Whether the disk is full is for those to say who need it; without a marker a crash is not counted.
                _log.warning("not_marked", digest=body.digest[:12], reason=error.strerror)
        try:
            yield
        finally:  # the body was answered, whatever the answer
            with self._lock:
                self._running[body.digest] -= 1
                self._running = +self._running
                if body.digest not in self._running:
                    self._crashes.pop(body.digest, None)
                    path.unlink(missing_ok=True)

    def forget(self, digest: str) -> None:
        """Drop the crash count of bytes that were processed after all."""
        if self._folder is not None and self._crashes.pop(digest, 0):
            (self._folder / digest).unlink(missing_ok=True)
