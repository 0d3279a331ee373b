"""Refusals in the coordinator's answers as errors, and when to try again."""

from __future__ import annotations

import time

from fedmoe.runtime.errors import RefusedError
from fedmoe.wire.answer import Answer, CoordinatorUnavailableError
from fedmoe.wire.contract.messages import PROBLEM, SAFETENSORS
from fedmoe.wire.foreign_answers import foreign, seconds_asked
from fedmoe.wire.pulled_weights import PulledExpert
from fedmoe.wire.replies import parsed_problem
from fedmoe.wire.unreachable import clock_difference

# Answers of a coordinator under load that a later try may not get.
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504, 507})
_LONGEST_WAIT = 60.0
#: Refusals of a coordinator whose history is another than that of the base: only it may be at an earlier version.
ANOTHER_HISTORY = frozenset({"unknown_version", "other_history"})


class TooStaleError(RefusedError):
    """The update is older than the coordinator takes; `newest` is the version to go on from, if it came along."""

    newest: PulledExpert | None = None


def raise_for_refusal(answer: Answer) -> None:
    """Raise the error that an answer is; nothing for a success, or a refusal that comes with weights."""
    if answer.status in (200, 202, 204, 304) or (answer.status == 409 and answer.type == SAFETENSORS):
        return
    if answer.type != PROBLEM:
        raise foreign(answer)
    problem = parsed_problem(answer)
    if answer.status in _PASSING:
        seconds = seconds_asked(answer)
        raise CoordinatorUnavailableError(f"{problem.code}: {problem.detail} {problem.fix}".strip(), seconds)
    kind = TooStaleError if problem.code == "too_stale" else RefusedError
    facts = dict(problem.model_extra or {})
    clocks = clock_difference(facts.get("coordinator_time"), time.time()) if answer.status == 401 else ""
    error = kind(problem.code, f"{problem.detail} {clocks}".strip(), problem.fix)
    error.facts = facts
    raise error


def wait_hint(error: Exception) -> bool | float:
    """Whether to try again, and how long to wait if the server said so."""
    if not isinstance(error, CoordinatorUnavailableError):
        return False
    return min(error.retry_after, _LONGEST_WAIT) if error.retry_after is not None else True
