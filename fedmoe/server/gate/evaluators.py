"""Which evaluators a verdict waits for: a few per token; one that sends no scores for three sets is dropped.

An invented name costs its inventor's token a place, and nobody else; a set waits for it a few times at most.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

from fedmoe.runtime.errors import RefusedError
from fedmoe.server.gate.candidates import Evaluator

# Evaluators that are remembered, and those of one token that have not scored anything yet.
_MOST = 256
_MOST_UNPROVEN = 16
#: Sets on end that wait for an evaluator that does not score them; from then on none does until it scores one.
PATIENCE = 3


@dataclass(frozen=True, slots=True)
class _EvaluatorRecord:
    """When an evaluator was last heard of and with which token, whether it ever scored, and sets it missed on end."""

    at: float
    token: str
    proven: bool = False
    missed: int = 0


class Evaluators:
    """The evaluators that were heard of; not safe to use from several threads at once."""

    def __init__(self) -> None:
        self._heard: dict[Evaluator, _EvaluatorRecord] = {}
        self._missed_by_token: Counter[str] = Counter()

    def hear(self, evaluator: Evaluator, token: str, now: float, seconds: float) -> None:
        """Take note of one; `seconds` is how long a silent one counts. Refuses where only active ones are known."""
        record = self._heard.get(evaluator)
        if record is None:
            self._make_room(token, now, seconds)
        self._heard[evaluator] = replace(record or _EvaluatorRecord(now, token), at=now, token=token)

    def score(self, evaluator: Evaluator, token: str, now: float, seconds: float) -> None:
        """Take note of one that scored a set."""
        self.hear(evaluator, token, now, seconds)
        if not self._heard[evaluator].proven:
            del self._missed_by_token[token]  # new names of this token do score
        self._heard[evaluator] = _EvaluatorRecord(now, token, proven=True)

    def miss(self, evaluators: Iterable[Evaluator]) -> None:
        """Count a missed set for each of these evaluators."""
        tokens = set[str]()
        for evaluator in evaluators:
            record = self._heard[evaluator]
            self._heard[evaluator] = replace(record, missed=record.missed + 1)
            if not record.proven:
                tokens.add(record.token)
        self._missed_by_token.update(tokens)

    def awaited(self, experts: Collection[str]) -> dict[Evaluator, float]:
        """When those were last heard of whose scores a set of these experts waits for."""
        return {
            evaluator: record.at
            for evaluator, record in self._heard.items()
            if evaluator[1] in experts and record.missed < PATIENCE
            # A new name does not help a token whose names did not score.
            if record.proven or self._missed_by_token[record.token] < PATIENCE
        }

    def active(self, now: float, seconds: float) -> list[Evaluator]:
        """Those heard of in the last `seconds`, in name order."""
        return sorted(evaluator for evaluator, record in self._heard.items() if now - record.at < seconds)

    def _make_room(self, token: str, now: float, seconds: float) -> None:
        unproven = [evaluator for evaluator, record in self._heard.items() if not record.proven]
        own = [evaluator for evaluator in unproven if self._heard[evaluator].token == token]
        if len(own) >= _MOST_UNPROVEN:
            del self._heard[min(own, key=lambda evaluator: self._heard[evaluator].at)]
        if len(self._heard) < _MOST:
            return
        silent = [evaluator for evaluator, record in self._heard.items() if now - record.at >= seconds]
        for evaluator in silent or unproven[:1]:
            del self._heard[evaluator]
        if len(self._heard) >= _MOST:
            raise RefusedError("busy", f"{_MOST} evaluators are at work.", "Retry later.")
