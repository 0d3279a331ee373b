"""Tasks by name, and those of plug-ins."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import EntryPoint, EntryPoints

import pytest

from fedmoe.arena.tasks.reasoning import Option, ReasoningTask
from fedmoe.arena.tasks.registry import make_task
from fedmoe.arena.tasks.task import Task, TaskError
from fedmoe.runtime import plugins


def plugged(which: str, options: Mapping[str, Option]) -> Task:
    return ReasoningTask(which, options)


def install(monkeypatch: pytest.MonkeyPatch, *kinds: str) -> None:
    found = EntryPoints(EntryPoint(kind, f"{__name__}:plugged", "fedmoe.tasks") for kind in kinds)
    monkeypatch.setattr(plugins, "entry_points", lambda **wanted: found.select(**wanted))


@pytest.mark.parametrize("name", ["reasoning:gcd", "committee:gcd", "textarena:TicTacToe-v0"])
def test_the_built_in_kinds_are_made_by_name(name: str) -> None:
    assert make_task(name).name == name


def test_options_reach_the_task() -> None:
    with pytest.raises(TaskError, match="no option 'terms'"):
        make_task("committee:chain_sum", {"terms": 2})
    with pytest.raises(TaskError, match="textarena games have no options, got rounds"):
        make_task("textarena:KuhnPoker-v0", {"rounds": 2})


@pytest.mark.parametrize("name", ["gcd", "reasoning:", ":gcd", "", "chess:gcd"])
def test_other_names_are_refused_with_what_there_is(name: str) -> None:
    with pytest.raises(TaskError, match="committee, reasoning, textarena"):
        make_task(name)


def test_a_plug_in_is_found_by_its_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "mine")
    with pytest.raises(TaskError, match="committee, mine, reasoning"):
        make_task("gcd")
    assert make_task("mine:gcd", {"max_numbers": 3}).name == "reasoning:gcd"


@pytest.mark.parametrize("kinds", [("reasoning",), ("mine", "mine")])
def test_two_kinds_of_one_name_are_refused(monkeypatch: pytest.MonkeyPatch, kinds: tuple[str, ...]) -> None:
    install(monkeypatch, *kinds)
    with pytest.raises(TaskError, match="exists more than once"):
        make_task(f"{kinds[0]}:gcd")
