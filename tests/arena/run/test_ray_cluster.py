"""What a Ray cluster must have for the actors, and where they and the learner go; without Ray."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import fedmoe.arena.run.ray_cluster as ray_cluster_module
from fedmoe.arena.config import ArenaConfig
from fedmoe.arena.run.engines import place_run
from fedmoe.arena.run.options import RunError, RunOptions
from fedmoe.arena.run.ray_cluster import ActorNeeds, gpus_beside, ray_cluster
from fedmoe.inference.engine import EngineError


@pytest.mark.parametrize(
    ("needs", "resources", "missing"),
    [
        (ActorNeeds(4, 2, 0.0), {"CPU": 8.0}, ""),
        (ActorNeeds(4, 2, 0.0), {"CPU": 7.0, "GPU": 9.0}, "4 x 2 CPUs, it has 7"),
        (ActorNeeds(8, 1, 1.0), {"CPU": 64.0}, "8 x 1 GPUs, it has 0"),
        (ActorNeeds(3, 1, 1 / 3), {"CPU": 3.0, "GPU": 1.0}, ""),
        (ActorNeeds(3, 1, 0.5), {"CPU": 2.0, "GPU": 1.0}, "3 x 1 CPUs, it has 2; 3 x 0.5 GPUs, it has 1"),
    ],
)
def test_what_a_cluster_is_short_of(needs: ActorNeeds, resources: dict[str, float], missing: str) -> None:
    assert needs.missing(resources) == missing


@pytest.mark.parametrize(
    ("learner", "visible", "left"),
    [
        (None, [], []),
        (None, ["0", "1"], ["0", "1"]),
        (0, ["0", "1", "2"], ["1", "2"]),
        (1, ["4", "7"], ["4"]),
        (0, ["3"], ["3"]),
    ],
)
def test_actors_get_the_gpus_beside_the_learner(learner: int | None, visible: list[str], left: list[str]) -> None:
    assert gpus_beside(learner, visible) == left


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    switches = ("RAY_USAGE_STATS_ENABLED", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "RAY_worker_niceness")
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", *switches):
        monkeypatch.setenv(name, "")
    with (
        pytest.raises(EngineError, match=r"not installed; run: pip install 'fedmoe\[ray\]'"),
        ray_cluster(None, ActorNeeds(1, 1, 0.0), []),
    ):
        pass


class SlowStart:
    """Starts at the given attempt."""

    def __init__(self, starts_at: int) -> None:
        self.starts_at, self.attempts = starts_at, 0

    def __call__(self) -> None:
        self.attempts += 1
        if self.attempts < self.starts_at:
            raise Exception("The current node timed out during startup.")  # as Ray does


def test_a_cluster_that_starts_slowly_is_started_again_and_at_last_given_up_in_words() -> None:
    slow, slower = SlowStart(3), SlowStart(4)
    ray_cluster_module._started(slow)
    assert slow.attempts == 3
    with pytest.raises(EngineError, match=r"no Ray cluster could be started here, .*timed out during startup"):
        ray_cluster_module._started(slower)


def config(**engine: object) -> ArenaConfig:
    return ArenaConfig.model_validate({"engine": engine, "learning": {"device": "cpu"}})


def test_the_learner_is_where_the_configuration_or_the_command_says() -> None:
    rollout, learner, plan = place_run(config(actors=3), RunOptions(Path("run")))
    assert (rollout.type, learner.type) == ("cpu", "cpu")
    assert plan == "rollouts by 3 Ray actors with 0 GPUs each, learning on cpu"
    elsewhere = ArenaConfig.model_validate({"learning": {"device": "cuda:99"}})
    with pytest.raises(RuntimeError, match="cuda:99 was asked for"):
        place_run(elsewhere, RunOptions(Path("run")))
    assert place_run(elsewhere, RunOptions(Path("run"), learner_device="cpu"))[1].type == "cpu"


@pytest.mark.parametrize(
    ("gpus", "device"), [(0.0, "cuda:0"), (1.0, "cpu"), (1.0, "cuda:1")], ids=["no-gpu", "gpu-cpu", "gpu"]
)
def test_a_rollout_device_beside_actors_is_refused(gpus: float, device: str) -> None:
    with pytest.raises(RunError, match=r"Ray places those of \[engine\] actors: leave it out and set gpus_per_actor"):
        place_run(config(actors=2, gpus_per_actor=gpus), RunOptions(Path("run"), rollout_device=device))


def test_the_cpu_as_rollout_device_is_what_actors_without_gpus_have() -> None:
    assert place_run(config(actors=2), RunOptions(Path("run"), rollout_device="cpu"))[0].type == "cpu"
