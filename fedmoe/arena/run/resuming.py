"""Settings that a resumed run may change: those that decide how long, how often or where."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import cast

from pydantic import ValidationError

from fedmoe.arena.config import ArenaConfig
from fedmoe.arena.run.checkpoint import Json
from fedmoe.arena.run.options import RunError

_MAY_CHANGE = frozenset(
    {
        *("evaluation.episodes", "evaluation.every", "checkpoint.every", "checkpoint.keep"),
        *("engine.url", "engine.python", "engine.rows", "federation.url", "policies.max_rank"),
        *("learning.micro_batch_tokens", "learning.max_prompt_tokens", "learning.python", "learning.device"),
        *("engine.actors", "engine.gpus_per_actor"),
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
    differences = config_differences(_completed(saved), now)
    differences.pop("phases", None)
    refused = [words for name, words in differences.items() if name not in _MAY_CHANGE]
    changed = [words for name, words in differences.items() if name in _MAY_CHANGE]
    if _phases(before) != _phases(after):
        words = f"phases: {_phases(before)} in the checkpoint, {_phases(after)} now"
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
    except ValidationError:  # of a later version, or of none: what differs is reported as it is
        return saved


def config_differences(saved: Json, now: Json) -> dict[str, str]:
    """How a configuration differs from that of a checkpoint: the dotted key, and both values in words."""
    before, after = (dict(_leaves(values, "")) for values in (saved, now))
    both = {name: (before.get(name, "absent"), after.get(name, "absent")) for name in sorted(before | after)}
    return {name: f"{name}: {old} in the checkpoint, {new} now" for name, (old, new) in both.items() if old != new}


def _leaves(values: Json, prefix: str) -> Iterator[tuple[str, str]]:
    """The dotted keys of a configuration with their values as JSON."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.dumps(value, ensure_ascii=False)


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


def _phases(phases: Sequence[_Phase]) -> str:
    return ", ".join(f"{phase['mode']} {phase['iterations']}" for phase in phases)
