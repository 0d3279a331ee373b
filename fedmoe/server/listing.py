"""The list of experts as JSON, cached: only entries that changed since the last list are written again.

Only how long ago a worker was heard of differs each time, and is put into its place.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from fedmoe.experts import ExpertModel
from fedmoe.server.statistics.contributors import Contributors
from fedmoe.wire.contract.experts import ExpertInfo

# What stands for a time in a prepared entry: no name or text holds it, since a quote in these is escaped.
_PLACE = '"seconds_ago":-1.0'
_FRESH_SECONDS = 1.0


class _EntryKey(NamedTuple):
    """What an entry was written of; the same things again give the same entry."""

    expert: ExpertModel
    heard: int
    prompts: str | None
    held_out: bool
    warnings: tuple[str, ...] | None

    def same(self, other: _EntryKey) -> bool:
        return self[0] is other[0] and self[1:] == other[1:]


@dataclass(frozen=True, slots=True)
class _Entry:
    """An expert as JSON in parts, between which the times belong: seconds since 1970 when each worker was heard of."""

    of: _EntryKey
    parts: tuple[str, ...]
    times: tuple[float, ...]

    def written(self, now: float) -> str:
        pieces = [self.parts[0]]
        for at, part in zip(self.times, self.parts[1:], strict=True):
            pieces += [f'"seconds_ago":{max(0.0, now - at):.3f}', part]
        return "".join(pieces)


@dataclass(frozen=True, slots=True)
class _Page:
    """The list that was written last: of what, each entry, and when the oldest of them was."""

    of: list[_EntryKey]
    texts: list[str]
    at: float


class ExpertEntries:
    """The newest entry of every expert; safe to use from any thread."""

    def __init__(self, roster: Contributors) -> None:
        self._roster = roster
        self._kept: dict[tuple[str, tuple[bool, bool]], _Entry] = {}
        self._pages: dict[tuple[bool, bool], _Page] = {}
        self._lock = threading.Lock()

    def written(
        self,
        experts: Iterable[ExpertModel],
        prompts: dict[str, str],
        now: float,
        held_out: bool = False,
        warning: Callable[[str, str], str] | None = None,
    ) -> str:
        """The experts as a JSON array, in the order given; `prompts` are tags of prompt statistics by first name.

        What says how long ago something was is a second old at most.
        """
        of = [self._of(one, prompts.get(one.name), held_out, warning) for one in experts]
        form = (held_out, warning is not None)
        with self._lock:
            page = self._pages.get(form)
        if page is None or len(page.of) != len(of) or not 0 <= now - page.at < _FRESH_SECONDS:
            page = _Page(of, [self._entry(one).written(now) for one in of], now)
        else:
            texts = list(page.texts)
            for place, (before, one) in enumerate(zip(page.of, of, strict=True)):
                if not one.same(before):
                    texts[place] = self._entry(one).written(now)
            page = _Page(of, texts, page.at)
        with self._lock:
            self._pages[form] = page
        return f"[{','.join(page.texts)}]"

    def _of(
        self, expert: ExpertModel, prompts: str | None, held_out: bool, warning: Callable[[str, str], str] | None
    ) -> _EntryKey:
        warnings = None if warning is None else self._roster.warnings(expert.name, warning)
        return _EntryKey(expert, self._roster.changes(expert.name), prompts, held_out, warnings)

    def _entry(self, key: _EntryKey) -> _Entry:
        expert, form = key.expert, (key.held_out, key.warnings is not None)
        with self._lock:
            cached = self._kept.get((expert.name, form))
        if cached is not None and cached.of.same(key):
            return cached
        info = self.info(expert, key.prompts, 0.0, key.held_out, key.warnings)
        times = tuple(self._roster.heard_at(expert.name, worker.worker) for worker in info.workers)
        waiting = [worker.model_copy(update={"seconds_ago": -1.0}) for worker in info.workers]
        text = info.model_copy(update={"workers": waiting}).model_dump_json()
        entry = _Entry(key, tuple(text.split(_PLACE)), times)
        with self._lock:
            self._kept[expert.name, form] = entry
        return entry

    def info(
        self,
        expert: ExpertModel,
        prompts: str | None,
        now: float,
        held_out: bool = False,
        warnings: tuple[str, ...] | None = None,
    ) -> ExpertInfo:
        """One expert as a listing shows it; `warnings` are of its workers in name order, None for no flags at all."""
        said = None if warnings is None else iter(warnings)
        warning = None if said is None else lambda _expert, _worker: next(said, "")
        return ExpertInfo(
            name=expert.title,
            version=expert.version,
            rank=expert.manifest.layout.rank,
            alpha=expert.manifest.alpha,
            parameters=expert.manifest.layout.size,
            base=expert.manifest.base.name,
            digest=expert.digest,
            workers=self._roster.workers(expert.name, now, held_out, warning),
            prompts=prompts,
            formerly=[name for name in dict.fromkeys((expert.name, *expert.names)) if name != expert.title],
            retired=expert.retired,
        )
