"""The long test of several coordinators: killed, stopped and cut off under load, and all that clients saw is checked.

    python tests/e2e/replica_campaign.py --seed 1 --kills 50 --pauses 10 --partitions 10 --results FILE.json
    python tests/e2e/replica_campaign.py --takeovers 20 --every 30 --results FILE.json
    python tests/e2e/replica_campaign.py --rates 4 --every 10 --results FILE.json

Three replicas on a real PostgreSQL and a real S3 server (moto). The first form counts disturbances with a lease of one
second: replicas are killed at random moments and named places, owners stopped (SIGSTOP) and cut off from the database
by a proxy that holds every byte, each for less or more than a lease, replicas restarted one after the other. Four
clients record every push and pull; `push_histories` checks the records against the model and the journal, and a fresh
process replays all of it. The second form measures with the default lease: how long nobody is answered after an owner
was killed, and how much lands while one is killed again and again, beside an undisturbed time. The third compares one
replica with three, without disturbance: updates a second and CPU seconds an update.
The seed fixes what is done and in which order; how far the load has come by then depends on the machine.
"""

from __future__ import annotations

import argparse
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parents[2]
if __name__ == "__main__":
    sys.path[1:1] = [str(ROOT / "tests"), str(ROOT / "benchmarks")]

import numpy as np  # noqa: E402  # found beside this file
import psutil  # noqa: E402
from crash_load import EXPERTS, Told, gather, register  # noqa: E402
from postgres_server import PostgresServer  # noqa: E402
from replica_house import Replica, ReplicaHouse, RotatingPusher, open_house  # noqa: E402

from fedmoe.config import CoordinatorConfig  # noqa: E402

#: What an operator gets who sets none.
LEASE = float(CoordinatorConfig.model_fields["lease_seconds"].default)
_PLACES = ("push.stored", "commit.before", "journal.before_commit", "journal.committed", "commit.published")


@dataclass(frozen=True)
class Plan:
    """How often what is done to the replicas; everything else follows from `seed`."""

    seed: int
    kills: int = 0
    pauses: int = 0
    partitions: int = 0
    restarts: int = 0
    lease: float = 1.0


@dataclass
class Outcome:
    """What was done, what the clients saw, and what was wrong with it."""

    done: Counter[str] = field(default_factory=Counter)
    told: Told = field(default_factory=lambda: Told([], [], {}))
    faults: list[str] = field(default_factory=list)
    terms: int = 0

    def to_json(self) -> dict[str, object]:
        pushes = self.told.pushes
        return {
            "done": dict(sorted(self.done.items())),
            "terms": self.terms,
            "pushes": len(pushes),
            "acknowledged": sum(bool(push.answers) for push in pushes),
            "never_answered": sum(not push.answers and not push.refused for push in pushes),
            "sent_again": sum(push.attempts > 1 for push in pushes),
            "reads": len(self.told.reads),
            "faults": self.faults,
        }


@dataclass
class Campaign:
    """Replicas under load, and what is done to them."""

    plan: Plan
    house: ReplicaHouse
    outcome: Outcome = field(default_factory=Outcome)

    def run(self) -> Outcome:
        """Disturb them under load; ends with all stopped and everything checked."""
        plan, house = self.plan, self.house
        self.moments = random.Random(plan.seed)
        house.start()
        register(house.urls[0], *EXPERTS)
        actions: list[Callable[[], None]] = [
            *([self._kill] * plan.kills),
            *([self._pause] * plan.pauses),
            *([self._cut_off] * plan.partitions),
            *([self._restart_all] * plan.restarts),
        ]
        self.moments.shuffle(actions)
        stop = threading.Event()
        self.pushers = house.start_pushers(stop, chunked=2)
        try:
            for number, act in enumerate(actions):
                self._until_more(self.moments.randint(1, 10))
                act()
                if number % 10 == 9:
                    print(f"{number + 1} of {len(actions)}", dict(self.outcome.done), flush=True)
            self._until_more(20)
        finally:
            stop.set()
            told = gather(self.pushers)
        self.outcome.told = told
        owner = house.owners.look()
        self.outcome.terms = owner.term if owner else 0
        self.outcome.faults += house.faults(told)
        return self.outcome

    def _victim(self) -> Replica:
        """The owner as a rule, now and then another replica."""
        owner = self.house.owner()
        if owner is None or self.moments.random() < 0.2:
            return self.moments.choice(list(self.house.replicas.values()))
        return self.house.replicas[owner.replica]

    def _kill(self) -> None:
        """End a replica at once, or have one die at a named place of an update's way, and start it again."""
        victim = self._victim()
        if self.moments.random() < 0.4:
            self._kill_at_a_place(victim)
            return
        time.sleep(self.moments.uniform(0.0, 0.1))
        self._end(victim)
        time.sleep(self.moments.choice([0.0, 0.0, 2.0]) * self.plan.lease)
        victim.start()

    def _kill_at_a_place(self, victim: Replica) -> None:
        """The next life of another replica ends by itself, if it comes so far as the owner; so the owner goes first."""
        others = [replica for replica in self.house.replicas.values() if replica is not victim]
        doomed = self.moments.choice(others)
        place = self.moments.choice(_PLACES)
        self._end(doomed)
        doomed.start(f"{place}={self.moments.randint(1, 10)}")
        self._end(victim)
        self._until_more(self.moments.randint(10, 30), seconds=8.0)
        victim.start()
        if not doomed.lives:
            self.outcome.done["kills"] += 1
            self.outcome.done["of them at a named place"] += 1
            doomed.start()

    def _end(self, victim: Replica) -> None:
        victim.kill()
        self.outcome.done["kills"] += 1

    def _pause(self) -> None:
        victim, seconds = self._victim(), self.moments.choice([0.3, 1.5, 3.0]) * self.plan.lease
        victim.send(signal.SIGSTOP)
        time.sleep(seconds)
        victim.send(signal.SIGCONT)
        self.outcome.done["pauses"] += 1

    def _cut_off(self) -> None:
        victim, seconds = self._victim(), self.moments.choice([0.5, 1.5, 4.0]) * self.plan.lease
        victim.database.hold()
        time.sleep(seconds)
        victim.database.release(lose=self.moments.random() < 0.5)
        self.outcome.done["partitions"] += 1

    def _restart_all(self) -> None:
        for replica in self.house.replicas.values():
            try:
                status = replica.stop() if replica.lives else 0
            except subprocess.TimeoutExpired:
                self.outcome.faults.append(f"{replica.name} did not stop: {replica.log.read_text()[-3000:]}")
                replica.kill()
            else:
                if status != 0:
                    self.outcome.faults.append(f"{replica.name} ended with status {status}")
            replica.start()
        self.outcome.done["rolling restarts"] += 1

    def _until_more(self, pushes: int, seconds: float = 40.0) -> None:
        """Wait until the clients have had so many more answers; a standstill is a fault."""
        enough, until = acknowledged(self.pushers) + pushes, time.monotonic() + seconds
        while acknowledged(self.pushers) < enough:
            if time.monotonic() > until:
                if seconds > 30:
                    self.outcome.faults.append(f"nothing landed for {seconds:g} s")
                    print(self.house.logs(), flush=True)
                return
            time.sleep(0.01)


def acknowledged(pushers: list[RotatingPusher]) -> int:
    """How many pushes were answered so far."""
    return sum(len(pusher.pushes) for pusher in pushers)


def measure(house: ReplicaHouse, takeovers: int, every: float) -> dict[str, object]:
    """Kill the owner `takeovers` times, every so many seconds; an undisturbed time of a quarter comes first."""
    house.start()
    register(house.urls[0], *EXPERTS)
    stop = threading.Event()
    pushers = house.start_pushers(stop)
    try:
        _until(lambda: acknowledged(pushers) > 50)
        quiet = _landed_in(pushers, takeovers * every / 4)
        began, count, kills = time.monotonic(), acknowledged(pushers), []
        for number in range(takeovers):
            kills.append(_kill_owner(house))
            time.sleep(max(0.0, began + (number + 1) * every - time.monotonic()))
        disturbed = (acknowledged(pushers) - count) / (time.monotonic() - began)
    finally:
        stop.set()
        told = gather(pushers)
    answered = sorted(answer.at for push in told.pushes for answer in push.answers)
    gaps = [_silence(answered, killed) for killed in kills]
    return {
        "lease_seconds": LEASE,
        "takeovers": takeovers,
        "every_seconds": every,
        "silence_seconds": {name: round(float(np.percentile(gaps, at)), 2) for name, at in _PERCENTILES},
        "updates_per_second": {"undisturbed": round(quiet, 1), "disturbed": round(disturbed, 1)},
        "goodput": round(disturbed / quiet, 3),
        "acknowledged": sum(bool(push.answers) for push in told.pushes),
        "faults": house.faults(told),
    }


def compare_rates(server: PostgresServer, rounds: int, seconds: float) -> dict[str, object]:
    """Tiny updates of eight clients to one replica and to three, in turns: updates a second, CPU seconds an update."""
    measured: dict[int, list[tuple[float, float]]] = {1: [], 3: []}
    for number in range(rounds):
        for count in sorted(measured, reverse=bool(number % 2)):
            with tempfile.TemporaryDirectory() as folder, open_house(Path(folder), server, count, lease=LEASE) as house:
                measured[count].append(_rate_of(house, seconds))
    rates, costs = (
        {count: statistics.median(row[place] for row in rows) for count, rows in measured.items()} for place in (0, 1)
    )
    ratios = [three[1] / one[1] for one, three in zip(measured[1], measured[3], strict=True)]
    return {
        "rounds": rounds,
        "clients": 8,
        "updates_per_second": {f"{count} replicas": round(rate, 1) for count, rate in rates.items()},
        "cpu_seconds_an_update": {f"{count} replicas": round(cost, 4) for count, cost in costs.items()},
        "cpu_ratio": {
            "median": round(statistics.median(ratios), 2),
            "min": round(min(ratios), 2),
            "max": round(max(ratios), 2),
        },
        "faults": [],
    }


def _rate_of(house: ReplicaHouse, seconds: float) -> tuple[float, float]:
    """Updates a second, and CPU seconds of all replicas an update."""
    house.start()
    register(house.urls[0], *EXPERTS)
    stop = threading.Event()
    pushers = house.start_pushers(stop, 8)
    try:
        _until(lambda: acknowledged(pushers) > 50)
        processes = [psutil.Process(replica.process.pid) for replica in house.replicas.values() if replica.process]
        before, count = _cpu_seconds(processes), acknowledged(pushers)
        rate = _landed_in(pushers, seconds)
        return rate, (_cpu_seconds(processes) - before) / (acknowledged(pushers) - count)
    finally:
        stop.set()
        gather(pushers)


def _cpu_seconds(processes: Sequence[psutil.Process]) -> float:
    return sum(float(times.user + times.system) for times in (process.cpu_times() for process in processes))


_PERCENTILES = (("p50", 50), ("p90", 90), ("p99", 99), ("max", 100))


def _kill_owner(house: ReplicaHouse) -> float:
    """Kill the owner and start it again at once; when it was killed."""
    owner = house.owner()
    assert owner is not None, house.logs()
    victim = house.replicas[owner.replica]
    killed = time.monotonic()
    victim.kill()
    victim.start()
    return killed


def _silence(answered: list[float], killed: float) -> float:
    """The longest time without an answer to anybody in the seconds after a kill."""
    near = [killed, *(at for at in answered if killed < at)]
    return max(after - before for before, after in pairwise(near[:200]))


def _landed_in(pushers: list[RotatingPusher], seconds: float) -> float:
    began, count = time.monotonic(), acknowledged(pushers)
    time.sleep(seconds)
    return (acknowledged(pushers) - count) / (time.monotonic() - began)


def _until(reached: Callable[[], bool], seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < until, "the load did not begin"
        time.sleep(0.02)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--pauses", type=int, default=0)
    parser.add_argument("--partitions", type=int, default=0)
    parser.add_argument("--restarts", type=int, default=0, help="rolling restarts of all replicas")
    parser.add_argument("--takeovers", type=int, default=0, help="measure so many takeovers with the default lease")
    parser.add_argument("--rates", type=int, default=0, help="compare one replica with three in so many rounds")
    parser.add_argument("--every", type=float, default=30.0, help="seconds between two of them, or of one round")
    parser.add_argument("--results", type=Path, help="a JSON file to add this run to")
    given = parser.parse_args()
    begun, server = time.monotonic(), PostgresServer.make()
    report: dict[str, object]
    try:
        with tempfile.TemporaryDirectory() as folder:
            if given.rates:
                report = {"measured": "rates", **compare_rates(server, given.rates, given.every)}
            elif given.takeovers:
                with open_house(Path(folder), server, lease=LEASE) as house:
                    report = {"measured": "takeovers", **measure(house, given.takeovers, given.every)}
            else:
                plan = Plan(given.seed, given.kills, given.pauses, given.partitions, given.restarts)
                with open_house(Path(folder), server, lease=plan.lease) as house:
                    report = {"seed": given.seed, "lease_seconds": plan.lease, **Campaign(plan, house).run().to_json()}
    finally:
        server.remove()
    report = {"seconds": round(time.monotonic() - begun, 1)} | report
    print(report)
    if given.results:
        from lib.harness import add_run

        add_run(given.results, report)
    sys.exit(1 if report["faults"] else 0)


if __name__ == "__main__":
    main()
