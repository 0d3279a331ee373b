"""The list of experts as JSON, cached: only entries that changed since the last list are written again.

Only how long ago a worker was heard of differs each time, and is put into its place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

from fedmoe.experts import ExpertModel
from fedmoe.server.statistics.contributors import Contributors
from fedmoe.wire.contract.experts import ExpertInfo

# What stands for a time in a prepared entry: no name or text holds it, since a quote in these is escaped.
_PLACE = '"seconds_ago":-1.0'
_FRESH_SECONDS = 1.0


class _EntryKey(NamedTuple):
    """What an entry is written of, with the warnings of its workers in name order; the same again gives the same."""

    expert: ExpertModel
    heard: int
    prompts: str | None
    held_out: bool
    warnings: tuple[str, ...] | None

    def same(self, other: _EntryKey) -> bool:
        return self[0] is other[0] and self[1:] == other[1:]


class _Entry:
    """An expert as JSON in parts, between which the times belong: seconds since 1970 when each worker was heard of."""

    def __init__(self, key: _EntryKey, parts: list[str], times: list[float]) -> None:
        self.key = key
        self._parts = parts
        self._times = times
        # The text that was written last, and when; one value, since threads exchange it.
        self._last = ("", -math.inf)

    def written(self, now: float) -> str:
        """The expert as JSON; what says how long ago something was is a second old at most."""
        text, at = self._last
        if not 0 <= now - at < _FRESH_SECONDS:
            pieces = [self._parts[0]]
            for heard_at, part in zip(self._times, self._parts[1:], strict=True):
                pieces += [f'"seconds_ago":{max(0.0, now - heard_at):.3f}', part]
            text = "".join(pieces)
            self._last = (text, now)
        return text


class ExpertEntries:
    """The newest entry of every expert; safe to use from any thread, since each entry is replaced whole."""

    def __init__(self, roster: Contributors) -> None:
        self._roster = roster
        # By whether held-out losses, and whether flags, are asked for; then by expert.
        self._entries: dict[tuple[bool, bool], dict[str, _Entry]] = {}

    def written(
        self,
        experts: Iterable[ExpertModel],
        prompts: dict[str, str],
        now: float,
        held_out: bool = False,
        warning: Callable[[str, str], str] | None = None,
    ) -> str:
        """The experts as a JSON array, in the order given; `prompts` are tags of prompt statistics by first name."""
        entries = self._entries.setdefault((held_out, warning is not None), {})
        texts: list[str] = []
        for expert in experts:
            name = expert.name
            warnings = None if warning is None else self._roster.warnings(name, warning)
            key = _EntryKey(expert, self._roster.changes(name), prompts.get(name), held_out, warnings)
            entry = entries.get(name)
            if entry is None or not entry.key.same(key):
                entry = entries[name] = self._entry(key)
            texts.append(entry.written(now))
        return f"[{','.join(texts)}]"

    def _entry(self, key: _EntryKey) -> _Entry:
        expert = key.expert
        info = self._info(key, 0.0)
        times = [self._roster.heard_at(expert.name, worker.worker) for worker in info.workers]
        waiting = [worker.model_copy(update={"seconds_ago": -1.0}) for worker in info.workers]
        text = info.model_copy(update={"workers": waiting}).model_dump_json()
        return _Entry(key, text.split(_PLACE), times)

    def info(self, expert: ExpertModel, prompts: str | None, now: float) -> ExpertInfo:
        """One expert as a listing shows it, without held-out losses and flags."""
        return self._info(_EntryKey(expert, 0, prompts, False, None), now)

    def _info(self, key: _EntryKey, now: float) -> ExpertInfo:
        expert, in_order = key.expert, iter(key.warnings or ())
        warning = None if key.warnings is None else lambda _expert, _worker: next(in_order, "")
        return ExpertInfo(
            name=expert.title,
            version=expert.version,
            rank=expert.manifest.layout.rank,
            alpha=expert.manifest.alpha,
            parameters=expert.manifest.layout.size,
            base=expert.manifest.base.name,
            digest=expert.digest,
            workers=self._roster.workers(expert.name, now, key.held_out, warning),
            prompts=key.prompts,
            formerly=[name for name in dict.fromkeys((expert.name, *expert.names)) if name != expert.title],
            retired=expert.retired,
        )
