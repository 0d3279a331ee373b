"""With which other settings a run may go on: those that change how long, how often or where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from pydantic import ValidationError

from fedmoe.arena.config import ArenaConfig
from fedmoe.arena.run.checkpoint_parts import Json, config_differences
from fedmoe.arena.run.options import RunError

_MAY_CHANGE = frozenset(
    {
        *("evaluation.episodes", "evaluation.every", "checkpoint.every", "checkpoint.keep"),
        *("engine.url", "engine.python", "engine.rows", "federation.url", "policies.max_rank"),
        *("learning.micro_batch_tokens", "learning.max_prompt_tokens"),
        *("episodes.per_iteration", "episodes.megabytes"),
    }
)
_Phase = Mapping[str, object]


def accepted_changes(saved: Json, now: Json, done: int, where: str) -> list[str]:
    """Which settings differ from those of the checkpoint `where` after `done` iterations, in words.

    Phases that are over must be as they were, and the one that has begun keeps its mode; how long it and what follows
    takes is free. Raises RunError naming every other setting that differs, with both values and what to do.
    """
    before, after = (cast(Sequence[_Phase], values.get("phases", ())) for values in (saved, now))
    found = config_differences(_without_phases(_completed(saved)), _without_phases(now))
    refused = [words for name, words in found.items() if name not in _MAY_CHANGE]
    changed = [words for name, words in found.items() if name in _MAY_CHANGE]
    if _shown(before) != _shown(after):
        words = f"phases: {_shown(before)} in the checkpoint, {_shown(after)} now"
        (changed if _goes_on(before, after, done) else refused).append(words)
    if refused:
        raise RunError(
            f"{where} was made with another configuration, after {done} iterations: {'; '.join(refused)}. Set these "
            "back, or begin anew with --fresh or another --out; iterations to come, evaluation, checkpoint and limits "
            "may change"
        )
    return changed


def _completed(saved: Json) -> Json:
    """The settings of a checkpoint with those that were not there yet when it was made, at their defaults."""
    try:
        return ArenaConfig.model_validate(saved).model_dump(mode="json")
    except ValidationError:  # of a later version, or of none: what differs is told as it is
        return saved


def _goes_on(before: Sequence[_Phase], after: Sequence[_Phase], done: int) -> bool:
    """Whether both have the same phases up to iteration `done`, and the second is not over before it."""
    end = 0
    for was, now in zip(before, after, strict=False):
        if was["mode"] != now["mode"]:
            return False
        end += cast(int, was["iterations"])
        if done <= end:
            return end - cast(int, was["iterations"]) + cast(int, now["iterations"]) >= done
        if was["iterations"] != now["iterations"]:
            return False
    return False


def _without_phases(values: Json) -> dict[str, object]:
    return {name: value for name, value in values.items() if name != "phases"}


def _shown(phases: Sequence[_Phase]) -> str:
    return ", ".join(f"{phase['mode']} {phase['iterations']}" for phase in phases)
