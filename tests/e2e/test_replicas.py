"""Several coordinators of one federation: killed, stopped, cut off and restarted, nothing is lost or doubled."""

from __future__ import annotations

from pathlib import Path

import pytest
from postgres_server import PostgresServer
from replica_campaign import Campaign, Plan
from replica_house import open_house

pytestmark = pytest.mark.scale


@pytest.mark.parametrize("replicas", [2, 3])
def test_replicas_that_are_killed_stopped_cut_off_and_restarted_lose_and_double_nothing(
    replicas: int, tmp_path: Path, postgres: PostgresServer
) -> None:
    plan = Plan(seed=replicas, kills=4, pauses=2, partitions=2, restarts=1)
    with open_house(tmp_path, postgres, replicas) as house:
        outcome = Campaign(plan, house).run()
        assert outcome.faults == [], house.logs()
    assert outcome.done["kills"] >= 4
    assert outcome.terms > 3
    assert sum(bool(push.answers) for push in outcome.told.pushes) > 30
