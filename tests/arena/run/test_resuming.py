"""With which other settings a run may go on."""

from __future__ import annotations

import pytest

from fedmoe.arena.config import ArenaConfig
from fedmoe.arena.run.options import RunError
from fedmoe.arena.run.resuming import accepted_changes, config_differences


def settings(*phases: tuple[str, int], **more: object) -> dict[str, object]:
    listed = [{"mode": mode, "iterations": iterations} for mode, iterations in phases]
    values: dict[str, object] = ArenaConfig.model_validate({"phases": listed, **more}).model_dump(mode="json")
    return values


SAVED = settings(("competitive", 4), ("mixed", 6))


def test_equal_settings_change_nothing() -> None:
    assert accepted_changes(SAVED, settings(("competitive", 4), ("mixed", 6)), 5, "it") == []


@pytest.mark.parametrize(
    ("done", "phases"),
    [
        (10, [("competitive", 4), ("mixed", 20)]),
        (10, [("competitive", 4), ("mixed", 6), ("cooperative", 1)]),
        (5, [("competitive", 4), ("mixed", 2)]),
        (4, [("competitive", 4), ("cooperative", 6)]),
        (2, [("competitive", 3)]),
    ],
)
def test_iterations_to_come_are_free(done: int, phases: list[tuple[str, int]]) -> None:
    (told,) = accepted_changes(SAVED, settings(*phases), done, "it")
    assert told.startswith("phases: competitive 4, mixed 6 in the checkpoint, competitive ")


@pytest.mark.parametrize(
    ("done", "phases"),
    [
        (5, [("competitive", 5), ("mixed", 6)]),
        (5, [("competitive", 4), ("cooperative", 6)]),
        (2, [("mixed", 10)]),
        (8, [("competitive", 4), ("mixed", 3)]),
        (5, [("competitive", 10)]),
    ],
)
def test_what_was_done_cannot_be_changed(done: int, phases: list[tuple[str, int]]) -> None:
    with pytest.raises(RunError, match=r"phases: competitive 4, mixed 6 in the checkpoint, .* now. Set these back"):
        accepted_changes(SAVED, settings(*phases), done, "it")


def test_every_setting_that_may_not_change_is_named_with_both_values() -> None:
    other = settings(
        ("competitive", 4), ("mixed", 6), seed=1, learning={"learning_rate": 1e-3}, checkpoint={"every": 7}
    )
    with pytest.raises(RunError) as refused:
        accepted_changes(SAVED, other, 5, "runs/it")
    assert "learning.learning_rate: 0.0005 in the checkpoint, 0.001 now; seed: 0 in the checkpoint, 1 now" in str(
        refused.value
    )
    assert "checkpoint.every" not in str(refused.value)


def test_evaluation_checkpoint_and_limits_may_change() -> None:
    other = settings(
        *(("competitive", 4), ("mixed", 6)),
        evaluation={"episodes": 200, "every": 2},
        checkpoint={"every": 2, "keep": 9},
        learning={"max_prompt_tokens": 2048, "micro_batch_tokens": 512, "device": "cpu"},
        engine={"actors": 4, "gpus_per_actor": 0.5},
    )
    changed = [words.split(":")[0] for words in accepted_changes(SAVED, other, 5, "it")]
    assert changed == [
        *("checkpoint.every", "checkpoint.keep", "engine.actors", "engine.gpus_per_actor"),
        *("evaluation.episodes", "evaluation.every"),
        *("learning.device", "learning.max_prompt_tokens", "learning.micro_batch_tokens"),
    ]


def test_another_configuration_is_told_key_by_key() -> None:
    before = {"task": "reasoning:chain_sum", "seed": 7}
    now = {"seed": 8, "task": "reasoning:chain_sum", "policies": {"solver": {"rank": 8}}}
    assert config_differences(before, now) == {
        "policies.solver.rank": "policies.solver.rank: absent in the checkpoint, 8 now",
        "seed": "seed: 7 in the checkpoint, 8 now",
    }
    assert config_differences(before, {"seed": 7, "task": "reasoning:chain_sum"}) == {}
    assert config_differences({"names": ("a", "b"), "on": 1}, {"names": ["a", "b"], "on": True}) == {
        "on": "on: 1 in the checkpoint, true now"
    }
