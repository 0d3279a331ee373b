"""Several coordinators of one federation: killed, stopped, cut off and restarted, nothing is lost or doubled."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest
from crash_load import register
from forks import run
from postgres_server import PostgresServer
from replica_campaign import Campaign, Plan
from replica_house import ReplicaHouse, open_house
from support import EPOCH, make_body

from fedmoe.wire.client import CoordinatorClient, CoordinatorUnavailableError
from fedmoe.wire.contract.messages import UpdateHeader

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


def push(url: str, sequence: int) -> int:
    """Push an update from version 0 until it is answered; the version it made."""
    header = UpdateHeader(expert="python", worker="w1", epoch=EPOCH, sequence=sequence, base_version=0)
    deadline = time.monotonic() + 60
    with CoordinatorClient(url, timeout=15, attempts=1) as client:
        while True:
            try:
                return client.push(header, make_body(sequence)).result.version
            except CoordinatorUnavailableError:
                assert time.monotonic() < deadline
                time.sleep(0.05)


def until(reached: Callable[[], object], house: ReplicaHouse) -> None:
    deadline = time.monotonic() + 60
    while not reached():
        assert time.monotonic() < deadline, house.logs()
        time.sleep(0.05)


def test_an_owner_that_was_stopped_finds_its_term_over_and_passes_requests_on(
    tmp_path: Path, postgres: PostgresServer
) -> None:
    with open_house(tmp_path, postgres, 2) as house:
        house.start()
        register(house.urls[0], "python")
        owner = house.owner_after(0)
        paused = house.replicas[owner.replica]
        (other,) = (replica for replica in house.replicas.values() if replica is not paused)
        assert push(other.url, 0) == 1

        paused.send(signal.SIGSTOP)
        successor = house.owner_after(owner.term)
        assert (successor.replica, push(other.url, 1)) == (other.name, 2)
        paused.send(signal.SIGCONT)

        # It knows nothing of version 2, and would make another one of this.
        assert push(paused.url, 2) == 3
        until(lambda: paused.logged("owner_lost"), house)
        shown = run("-m", "fedmoe", "replicas", "--coordinator-url", paused.url)
        assert shown.returncode == 0
        assert other.name in shown.stdout
        assert [replica.stop() for replica in house.replicas.values()] == [0, 0]


def test_an_owner_cut_off_from_its_database_says_so_and_goes_on_with_its_term(
    tmp_path: Path, postgres: PostgresServer
) -> None:
    with open_house(tmp_path, postgres, 1) as house:
        (replica,) = house.replicas.values()
        house.start()
        register(replica.url, "python")
        term = house.owner_after(0).term
        assert push(replica.url, 0) == 1

        replica.database.hold()
        until(lambda: replica.logged("owner_suspended"), house)
        ready = httpx2.get(f"{replica.url}/readyz", trust_env=False)
        assert ready.status_code == 503
        assert "the database does not answer" in ready.json()["reason"]
        refused = httpx2.get(f"{replica.url}/federation", trust_env=False, timeout=60)
        assert refused.json()["code"] == "no_owner"
        assert "the database does not answer" in refused.json()["detail"]

        replica.database.release(lose=False)
        assert push(replica.url, 1) == 2
        assert house.owner_after(0).term == term
        assert replica.stop() == 0


def test_a_database_that_lacks_what_was_acknowledged_makes_no_owner_unless_that_is_accepted(
    tmp_path: Path, postgres: PostgresServer
) -> None:
    with open_house(tmp_path, postgres, 1) as house:
        (replica,) = house.replicas.values()
        house.start()
        register(replica.url, "python")
        assert push(replica.url, 0) == 1
        assert replica.stop() == 0
        house.owners.close()
        older = postgres.copy_of(house.url)
        replica.start()
        assert push(replica.url, 1) == 2
        assert replica.stop() == 0

        postgres.replace(house.url, older)
        replica.start()
        until(lambda: replica.logged("owner_failed"), house)
        assert "does not hold the newest journal" in str(replica.logged("owner_failed")[0]["reason"])
        replica.kill()

        replica.arguments = [*replica.arguments, "--accept-older-journal"]
        replica.start()
        assert push(replica.url, 2) == 2
        assert replica.stop() == 0
