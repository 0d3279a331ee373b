"""The disk report at start: growth of the state directory, and how long the disk lasts."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import structlog

from fedmoe.experts import ExpertModel
from fedmoe.federation.events import UpdateAccepted
from fedmoe.server.storage.folder_blobs import FolderBlobStore
from fedmoe.server.storage.journal import Journal
from fedmoe.server.storage.released_bytes import newest_updates
from fedmoe.server.upkeep.retention import RetentionBound

_log = structlog.get_logger("fedmoe.disk")

#: What a worker is assumed to do until updates have arrived: its default interval, in float32.
ASSUMED_SECONDS = 10.0
_BYTES = 4
_HOUR = 3600.0
_LOOKED_AT = 64


@dataclass(frozen=True, slots=True)
class Growth:
    """Bytes of an update, seconds between two of one worker, how many workers there are, and what that rests on."""

    update: float
    seconds: float
    workers: int
    basis: str

    @property
    def an_hour(self) -> float:
        """Bytes an hour and worker."""
        return self.update * _HOUR / self.seconds


def growth(
    parameters: int, min_sync_interval: float, newest: Iterable[UpdateAccepted], sizes: Mapping[str, int]
) -> Growth:
    """What to expect of the `newest` updates, oldest first, whose blobs have these `sizes`; else what is assumed.

    `parameters` are those of the largest expert.
    """
    seen = [update for update in newest if update.digest in sizes]
    gaps = _gaps(seen)
    if gaps:
        workers = {(update.expert, update.worker) for update in seen}
        size = statistics.fmean(sizes[update.digest] for update in seen)
        return Growth(size, statistics.median(gaps), len(workers), f"as the last {len(seen)} updates")
    seconds = max(ASSUMED_SECONDS, min_sync_interval)
    return Growth(parameters * _BYTES, seconds, 1, f"assumed: float32 and an update every {seconds:g} s")


def _gaps(updates: list[UpdateAccepted]) -> list[float]:
    """Seconds between two updates that followed each other, of every worker of every expert."""
    times: dict[tuple[str, str], list[float]] = {}
    for update in updates:
        times.setdefault((update.expert, update.worker), []).append(update.at)
    return [later - earlier for moments in times.values() for earlier, later in pairwise(moments) if later > earlier]


@dataclass(frozen=True, slots=True)
class DiskReport:
    """Says in the log how long the disk lasts; called with the experts there are."""

    journal: Journal
    blobs: FolderBlobStore
    min_sync_interval: float
    kept: RetentionBound

    def __call__(self, experts: Iterable[ExpertModel]) -> None:
        newest = newest_updates(self.journal, _LOOKED_AT)
        sizes = {update.digest: self.blobs.size(update.digest) for update in newest}
        there = {digest: size for digest, size in sizes.items() if size}
        largest = max(expert.manifest.layout.size for expert in experts)
        estimate = growth(largest, self.min_sync_interval, newest, there)
        free = shutil.disk_usage(self.blobs.folder).free
        _log.info("disk", says=disk_line(estimate, free, self.kept.most), kept_gb=self.kept.gb, kept_by=self.kept.basis)


def disk_line(estimate: Growth, free: int, most: int) -> str:
    """The line: bytes an update, an hour and worker, and the hours until the disk, or the bytes to keep, are full."""
    hours = free / (estimate.an_hour * estimate.workers)
    workers = "one worker" if estimate.workers == 1 else f"{estimate.workers} workers"
    kept = most / (estimate.an_hour * estimate.workers)
    return (
        f"{_size(estimate.update)} an update, {_size(estimate.an_hour)} an hour and worker, {_size(free)} free = "
        f"{_long(hours)} of {workers} ({estimate.basis}); the newest {_size(most)} of updates are kept, "
        f"{_long(kept)} of {workers}"
    )


def _size(count: float) -> str:
    power = next((power for power in range(4) if count / 1000**power < 999.5), 4)
    return f"{count / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def _long(hours: float) -> str:
    if hours < 1:
        return f"{hours * 60:.2g} min"
    return f"{hours:.2g} h" if hours < 72 else f"{hours / 24:.3g} days"
