"""Workers that really train."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fedmoe.simulation.config import SimulationConfig, TrainingWork
from fedmoe.simulation.fleet import draw_fleet
from fedmoe.simulation.report import make_report
from fedmoe.simulation.run import run_simulation
from fedmoe.simulation.texts import texts, topic_shares
from fedmoe.simulation.training import TrainingFleet

CONFIG = SimulationConfig.model_validate(
    {
        "seconds": 42.0,
        "work": {"kind": "training", "evaluate_every": 20.0, "texts": 12, "held_out_texts": 8, "rank": 2},
        "fleet": {"workers": 4, "experts": 2, "slowness": [1, 2]},
        "schemes": [{"name": "own", "kind": "asynchronous"}, {"name": "rounds", "kind": "rounds"}],
    }
)


@pytest.fixture(scope="module")
def work() -> TrainingFleet:
    assert isinstance(CONFIG.work, TrainingWork)
    return TrainingFleet(CONFIG.work, CONFIG.seed, CONFIG.fleet.experts)


def test_the_held_out_loss_falls_and_the_same_seed_gives_the_same_report(work: TrainingFleet) -> None:
    size = work.manifest.layout.size
    first, second = (make_report(CONFIG, size, run_simulation(CONFIG, work)) for _ in range(2))
    assert first == second
    schemes: Any = first["schemes"]
    for scheme in schemes:
        losses = [loss for _, loss, _, _ in scheme["curve"]]
        assert [seconds for seconds, *_ in scheme["curve"]] == [0.0, 20.0, 40.0]
        assert losses[-1] < losses[0] - 0.3
    assert schemes[0]["curve"][0][1] == schemes[1]["curve"][0][1]
    assert first["work"] == "training"


def test_steps_are_those_of_the_projects_own_training(work: TrainingFleet) -> None:
    profile = draw_fleet(CONFIG.fleet, 42.0, 0)[0]
    together, apart = work.worker(profile), work.worker(profile)
    start = together.weights()
    learned = together.train(4)
    parts = [apart.train(1), apart.train(3)]
    np.testing.assert_array_equal(together.weights(), apart.weights())
    assert not np.array_equal(together.weights(), start)
    assert learned.steps == 4
    assert learned.tokens == parts[0].tokens + parts[1].tokens > 0
    assert 3 < learned.info["loss"] < 9


def test_workers_of_an_expert_start_alike_and_have_texts_of_their_own() -> None:
    shares = [topic_shares(0, worker, 4, 0.5) for worker in (0, 2)]
    assert shares[0] != shares[1]
    assert sum(shares[0]) == pytest.approx(1.0)
    assert texts(0, 0, shares[0], 10, 0) == texts(0, 0, shares[0], 10, 0) != texts(0, 0, shares[0], 10, 1)
    even = [topic_shares(0, worker, 4, 1e6) for worker in range(3)]
    assert max(abs(share - 0.25) for each in even for share in each) < 0.01
