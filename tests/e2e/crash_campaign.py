"""The long test: a coordinator is killed again and again under load, and all that its clients saw is checked.

    python tests/e2e/crash_campaign.py --seed 1 --kills 250 --results benchmarks/results/crashes.json

Kills fall on random moments and on named places (`fedmoe.runtime.failpoints`); between them the process is
stopped and goes on (SIGSTOP, longer than clients wait), its clock jumps by up to two days, backups are taken and now
and then one is restored. Four clients record every push and pull; `push_histories` checks the records of each
incarnation against the model and the journal.
The seed fixes what is done and in which order; how far the load has come by then depends on the machine.
"""

from __future__ import annotations

import argparse
import random
import re
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
if __name__ == "__main__":
    sys.path[1:1] = [str(ROOT / "tests"), str(ROOT / "benchmarks")]

import numpy as np  # noqa: E402  # found beside this file
from crash_load import (  # noqa: E402
    EXPERTS,
    IN_FOLDER,
    Storage,
    Told,
    fold,
    gather,
    incarnation_at,
    pull,
    read_journal,
    register,
    start_pushers,
)
from eras import Eras  # noqa: E402
from forked_coordinator import ForkedCoordinator  # noqa: E402

#: Less than the longest stop, so that some pushes are answered to nobody.
CLIENT_TIMEOUT = 2.0


@dataclass(frozen=True)
class Plan:
    """What is done to the coordinator, and how often it is restored from a backup; everything follows from `seed`."""

    seed: int
    kills: int
    arguments: Sequence[str] = ()
    restores: float = 0.1
    storage: Storage = IN_FOLDER


@dataclass
class Outcome:
    """What was done, what the clients saw, and what was wrong with it."""

    done: Counter[str] = field(default_factory=Counter)
    told: Told = field(default_factory=lambda: Told([], [], {}))
    faults: list[str] = field(default_factory=list)

    @property
    def kills(self) -> int:
        return sum(count for what, count in self.done.items() if what.startswith("kills"))

    def to_json(self) -> dict[str, object]:
        pushes = self.told.pushes
        return {
            "kills": self.kills,
            "done": dict(sorted(self.done.items())),
            "pushes": len(pushes),
            "acknowledged": sum(bool(one.answers) for one in pushes),
            "never_answered": sum(not one.answers and not one.refused for one in pushes),
            "sent_again": sum(one.attempts > 1 for one in pushes),
            "of_another_history": sum(bool(one.turned_away) for one in pushes),
            "reads": len(self.told.reads),
            "faults": self.faults,
        }


def failpoints() -> list[str]:
    """The names of all places in the coordinator where it can be killed."""
    folder = ROOT / "fedmoe" / "server"
    sources = "".join(path.read_text() for path in sorted(folder.rglob("*.py")))
    places = set(re.findall(r"failpoints\.reached\(\"([\w.]+)\"\)", sources))
    return sorted(name for name in places if name.partition(".")[0] in ("push", "commit", "count", "snapshot"))


@dataclass
class Campaign:
    """One coordinator, and what is done to it."""

    plan: Plan
    coordinator: ForkedCoordinator
    outcome: Outcome = field(default_factory=Outcome)

    def run(self) -> Outcome:
        """Disturb it under load; ends with it stopped and everything checked."""
        self.moments = random.Random(self.plan.seed)
        self.coordinator.start()
        register(self.coordinator.url, *EXPERTS)
        self.eras = Eras(self.coordinator.state_dir, incarnation_at(self.coordinator.url), self.plan.storage)
        stop = threading.Event()
        pushers = self.pushers = start_pushers(self.coordinator.url, stop, timeout=CLIENT_TIMEOUT)
        try:
            while self.outcome.kills < self.plan.kills:
                self._disturb()
                self._kill_and_start()
        finally:
            stop.set()
            told = gather(pushers)
        self.outcome.told = told
        self._check()
        return self.outcome

    def _disturb(self) -> None:
        moments = self.moments
        if moments.random() < 0.2:
            self.coordinator.set_clock(moments.uniform(-2, 2) * 86400)
            self.outcome.done["clock jumps"] += 1
        if moments.random() < 0.2:
            self._pause(moments.choice([0.05, 0.3, 1.3 * CLIENT_TIMEOUT]))
        if moments.random() < 2 * self.plan.restores:
            self.outcome.done["backups"] += self.eras.back_up()
        # So much more load, however busy the machine is, and then some moment.
        self._until_more(moments.randint(0, 12))
        time.sleep(moments.uniform(0.0, 0.1))

    def _until_more(self, pushes: int, seconds: float = 20.0) -> None:
        """Wait until the clients are done with so many more pushes, or the coordinator is gone."""
        process, enough, until = self.coordinator.process, self._pushed() + pushes, time.monotonic() + seconds
        assert process is not None
        while self._pushed() < enough and process.poll() is None and time.monotonic() < until:
            time.sleep(0.005)

    def _pushed(self) -> int:
        return sum(len(pusher.pushes) for pusher in self.pushers)

    def _pause(self, seconds: float) -> None:
        process = self.coordinator.process
        assert process is not None
        if process.poll() is None:
            process.send_signal(signal.SIGSTOP)
            time.sleep(seconds)
            process.send_signal(signal.SIGCONT)
            self.outcome.done["stops"] += 1

    def _kill_and_start(self) -> None:
        """The next life may end by itself, at a named place, before or after it is killed from outside."""
        self.coordinator.kill()
        self.outcome.done["kills at random moments"] += 1
        while self.moments.random() < 0.4:
            place = self.moments.choice(failpoints())
            lives = self._lives(f"{place}={self.moments.randint(1, 30)}")
            self.outcome.done["kills at random moments" if lives else f"kills at {place}"] += 1
            self.coordinator.kill()
        if self.moments.random() < self.plan.restores:
            self.outcome.done["restores"] += self.eras.restore(self.moments)
        self.coordinator.start()

    def _lives(self, place: str) -> bool:
        """Whether a coordinator that dies at a place has not come there in a while."""
        coordinator = self.coordinator
        try:
            coordinator.start(place)
            assert coordinator.process is not None
            self._until_more(30)
            return coordinator.process.poll() is None
        except AssertionError:
            assert coordinator.process is not None
            if coordinator.process.poll() != -signal.SIGKILL:
                raise
        return False

    def _check(self) -> None:
        """History, weights and journal: before and after one more kill."""
        coordinator, told = self.coordinator, self.outcome.told
        before = pull(coordinator.url, EXPERTS)
        coordinator.kill()
        coordinator.start()
        after = pull(coordinator.url, EXPERTS)
        faults = self.outcome.faults
        if (status := coordinator.stop()) != 0:
            faults.append(f"the coordinator ended with status {status}")
        events = read_journal(coordinator.state_dir, self.plan.storage)
        faults += self.eras.faults(told)
        expected = fold(events, told.seeds)
        for name in EXPERTS:
            for moment, weights in (("before", before[name]), ("after", after[name])):
                if not np.array_equal(weights, expected[name]):
                    faults.append(f"{name} had other weights {moment} the last kill than its updates make")


def run(plan: Plan, folder: Path) -> Outcome:
    """Everything in `folder`, which is empty."""
    arguments = (*plan.storage.arguments, *plan.arguments)
    coordinator = ForkedCoordinator(folder / "state", arguments=arguments)
    try:
        return Campaign(plan, coordinator).run()
    finally:
        coordinator.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--keep-updates", type=int)
    parser.add_argument("--results", type=Path, help="a JSON file to add this run to")
    given = parser.parse_args()
    arguments = [] if given.keep_updates is None else ["--keep-updates", str(given.keep_updates)]
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        outcome = run(Plan(given.seed, given.kills, arguments), Path(folder))
    report = {"seed": given.seed, "arguments": arguments, "seconds": round(time.monotonic() - begun, 1)}
    report |= outcome.to_json()
    print(report)
    if given.results:
        from lib.harness import add_run

        add_run(given.results, report)
    sys.exit(1 if outcome.faults else 0)


if __name__ == "__main__":
    main()
