"""The table of tasks by name: `reasoning:chain_sum`, `committee:chain_sum`, `textarena:KuhnPoker-v0`, plug-ins."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fedmoe.arena.tasks.committee import CommitteeTask
from fedmoe.arena.tasks.reasoning import NO_OPTIONS, Option, ReasoningProblems, ReasoningTask
from fedmoe.arena.tasks.task import Task, TaskError
from fedmoe.runtime.plugins import PluginGroup

#: What a kind of task is made with: the part of the name after the colon, and the options.
TaskFactory = Callable[[str, Mapping[str, Option]], Task]


def _textarena(env_id: str, options: Mapping[str, Option]) -> Task:
    from fedmoe.arena.tasks.textarena_games import TextArenaTask

    if options:
        raise TaskError(f"textarena games have no options, got {', '.join(options)}; variants are ids of their own")
    return TextArenaTask(env_id)


_PLUGINS: PluginGroup[TaskFactory] = PluginGroup(
    "fedmoe.tasks",
    "task kind",
    TaskError,
    {
        "committee": lambda dataset, options: CommitteeTask(ReasoningProblems(dataset, options)),
        "reasoning": ReasoningTask,
        "textarena": _textarena,
    },
)


def make_task(name: str, options: Mapping[str, Option] = NO_OPTIONS) -> Task:
    """The task called `<kind>:<which>`.

    Raises TaskError: no such kind, an option that the task does not have, or a kind that two packages offer.
    """
    kind, colon, which = name.partition(":")
    if not colon or not which:
        raise TaskError(f"a task is named <kind>:<which>, got {name!r}; kinds: {', '.join(_PLUGINS.names())}")
    return _PLUGINS.get(kind)(which, options)
