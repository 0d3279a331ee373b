"""Tasks by name: `reasoning:chain_sum`, `committee:chain_sum`, `textarena:KuhnPoker-v0`, and those of plug-ins."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import entry_points

from fedmoe.arena.tasks.reasoning import NO_OPTIONS, Option, ReasoningProblems, ReasoningTask
from fedmoe.arena.tasks.task import Task, TaskError

#: What a kind of task is made with: the part of the name after the colon, and the options.
TaskFactory = Callable[[str, Mapping[str, Option]], Task]

#: The entry-point group of plug-ins; an entry's name is the kind, its object a TaskFactory.
ENTRY_POINT_GROUP = "fedmoe.tasks"


def _reasoning(dataset: str, options: Mapping[str, Option]) -> Task:
    return ReasoningTask(dataset, options)


def _committee(dataset: str, options: Mapping[str, Option]) -> Task:
    from fedmoe.arena.tasks.committee import CommitteeTask

    return CommitteeTask(ReasoningProblems(dataset, options))


def _textarena(env_id: str, options: Mapping[str, Option]) -> Task:
    from fedmoe.arena.tasks.textarena_games import TextArenaTask

    if options:
        raise TaskError(f"textarena games have no options, got {', '.join(options)}; variants are ids of their own")
    return TextArenaTask(env_id)


_BUILT_IN: Mapping[str, TaskFactory] = {"committee": _committee, "reasoning": _reasoning, "textarena": _textarena}


def task_kinds() -> tuple[str, ...]:
    """The kinds there are: the built-in ones and those of installed plug-ins."""
    return tuple(sorted({*_BUILT_IN, *(entry.name for entry in entry_points(group=ENTRY_POINT_GROUP))}))


def make_task(name: str, options: Mapping[str, Option] = NO_OPTIONS) -> Task:
    """The task called `<kind>:<which>`.

    Raises TaskError: no such kind, an option that the task does not have, or a kind that two packages offer.
    """
    kind, colon, which = name.partition(":")
    if not colon or not which:
        raise TaskError(f"a task is named <kind>:<which>, got {name!r}; kinds: {', '.join(task_kinds())}")
    return _factory(kind)(which, options)


def _factory(kind: str) -> TaskFactory:
    plugged = tuple(entry_points(group=ENTRY_POINT_GROUP, name=kind))
    built_in = _BUILT_IN.get(kind)
    if len(plugged) + (built_in is not None) > 1:
        origins = ", ".join(entry.value for entry in plugged)
        raise TaskError(f"more than one task kind is called {kind!r}: {origins}; uninstall one of them")
    if built_in:
        return built_in
    if not plugged:
        raise TaskError(f"there is no task kind {kind!r}; there are: {', '.join(task_kinds())}")
    factory: TaskFactory = plugged[0].load()
    return factory
