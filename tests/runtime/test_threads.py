"""Threads are chosen by what is free, sleep while they wait, and are the user's where the user has set them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedmoe.runtime import machine
from fedmoe.runtime.threads import (
    COMPUTING,
    CoreUse,
    asked_for,
    choose_threads,
    command_of,
    other_processes,
    own_threads,
    prepare_threads,
    teams_of,
    waiting_settings,
)

ROOT = Path(__file__).parents[2]
SETTINGS = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "MKL_NUM_THREADS", "KMP_BLOCKTIME", "GOMP_SPINCOUNT")


@pytest.mark.parametrize(
    ("found", "teams", "count"),
    [
        (CoreUse(8, 0.2, 8), 1, 8),  # an idle machine is used
        (CoreUse(8, 3.0, 8), 1, 5),  # what others use is theirs
        (CoreUse(2, 2.0, 2), 1, 1),  # one thread is the least
        (CoreUse(2, 17.0, 2), 1, 1),
        (CoreUse(8, 0.0, 8, others=3), 1, 2),  # four that started together share
        (CoreUse(8, 7.0, 8, others=1), 1, 1),  # the first took all
        (CoreUse(64, 20.0, 2.5), 1, 2),  # a container's share, on a busy machine
        (CoreUse(64, 63.0, 4.0), 1, 1),
        (CoreUse(64, 0.0, 0.5), 1, 1),
        (CoreUse(8, 3.0, 8, ranks=4), 1, 2),  # the other ranks are seen at work
        (CoreUse(8, 0.0, 8, ranks=16), 1, 1),
        (CoreUse(8, 0.0, 8), 2, 4),  # two teams at once
        (CoreUse(2, 0.0, 2), 2, 1),
    ],
)
def test_a_process_takes_what_is_free(found: CoreUse, teams: int, count: int) -> None:
    chosen = choose_threads(found, teams)
    assert chosen.count == count
    assert f"{found.bound} cores" in chosen.reason


@pytest.mark.parametrize(
    ("environment", "count"),
    [
        ({"OMP_NUM_THREADS": "3"}, 3),
        ({"OMP_NUM_THREADS": "4,2"}, 4),
        ({"MKL_NUM_THREADS": "5"}, 5),
        ({"OMP_NUM_THREADS": "3", "MKL_NUM_THREADS": "5"}, 3),
        ({"OMP_NUM_THREADS": "many"}, 0),
    ],
)
def test_what_the_user_has_set_is_taken(environment: dict[str, str], count: int) -> None:
    assert own_threads(environment).count == count
    assert "NUM_THREADS=" in own_threads(environment).reason


def test_an_empty_setting_is_none() -> None:
    assert asked_for({"OMP_NUM_THREADS": ""}) is None


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "KMP_BLOCKTIME", "GOMP_SPINCOUNT"])
def test_who_wants_threads_to_spin_may(name: str) -> None:
    assert not {"OMP_WAIT_POLICY", "KMP_BLOCKTIME"} & waiting_settings({name: "1"}).keys()
    assert waiting_settings({})["OMP_WAIT_POLICY"] == "PASSIVE"


@pytest.mark.parametrize(
    ("line", "computes"),
    [
        (["/x/.venv/bin/python", "/x/.venv/bin/fedmoe", "worker", "--seed", "1"], True),
        (["python3.11", "-X", "dev", "-m", "fedmoe", "arena", "train", "x.toml"], True),
        (["python", "run_worker.py", "--specialty", "a"], True),
        (["C:\\Python\\python.exe", "C:\\bin\\fedmoe.exe", "gateway", "serve"], True),
        (["python", "-m", "fedmoe", "coordinator"], False),
        (["python", "-m", "fedmoe", "gateway", "info"], False),
        (["timeout", "60", "fedmoe", "worker"], False),  # what it started is counted
        (["bash", "-c", "fedmoe worker --seed 1"], False),
        (["python", "train.py", "worker"], False),
        ([], False),
    ],
)
def test_a_computing_process_is_known_by_its_command_line(line: list[str], computes: bool) -> None:
    if os.name != "nt" and "\\" in "".join(line):
        line = [word.replace("\\", "/") for word in line]
    command = command_of(line)
    assert (command is not None and teams_of(command) is not None) == computes


def test_the_table_names_commands_that_there_are() -> None:
    import typer

    from fedmoe.cli.commands import app

    for words in COMPUTING:
        command = typer.main.get_command(app)
        for word in words:
            command = command.commands[word]  # type: ignore[attr-defined]


PROBE = """
import json, os, sys
from fedmoe.runtime.threads import prepare_threads
assert not {"numpy", "torch"} & sys.modules.keys()
prepare_threads(["worker"])
import torch
from fedmoe.runtime.device import pin_threads
pin_threads()
print(json.dumps({"torch": torch.get_num_threads(), "set": {n: os.environ.get(n) for n in %r}}))
"""


def probe(**environment: str) -> dict[str, object]:
    """What a process that computes finds set, and the threads that torch then has."""
    clean = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    done = subprocess.run(
        [sys.executable, "-c", PROBE % (SETTINGS,)], cwd=ROOT, env=clean | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout)
    return found


def test_a_process_has_set_its_threads_before_torch_is_loaded() -> None:
    found = probe()
    settings = found["set"]
    assert isinstance(settings, dict)
    assert settings["OMP_WAIT_POLICY"] == "PASSIVE"
    assert settings["OMP_NUM_THREADS"] == str(found["torch"])
    assert 1 <= int(settings["OMP_NUM_THREADS"]) <= machine.usable_cores()


def test_a_process_leaves_what_the_user_has_set() -> None:
    found = probe(OMP_NUM_THREADS="3", OMP_WAIT_POLICY="ACTIVE")
    settings = dict.fromkeys(SETTINGS) | {"OMP_NUM_THREADS": "3", "OMP_WAIT_POLICY": "ACTIVE"}
    assert found == {"torch": 3, "set": settings}
    assert probe(MKL_NUM_THREADS="2")["torch"] == 2


@pytest.fixture
def computing() -> Iterator[subprocess.Popen[bytes]]:
    """A process whose command line is a worker's; it sleeps."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)", "fedmoe", "worker"])
    yield process
    process.kill()
    process.wait()


def test_a_worker_that_has_just_begun_counts_before_it_is_busy(
    computing: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert computing.pid in other_processes()
    monkeypatch.setattr(os, "getppid", os.getpid)
    assert computing.pid not in other_processes(in_a_group=True)  # as a rank of this run
    computing.kill()
    computing.wait()
    assert computing.pid not in other_processes()


def test_commands_are_prepared_before_numpy_is_loaded() -> None:
    code = (
        "import sys, os, fedmoe.cli as cli; assert 'numpy' not in sys.modules\n"
        "cli.prepare_threads = lambda words: print(words, 'numpy' in sys.modules)\n"
        "cli.main(['--version'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[0] == "['--version'] False"


def test_a_command_that_does_not_compute_takes_no_time_to_look(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SETTINGS:
        monkeypatch.setenv(name, "1")
        monkeypatch.delenv(name)
    monkeypatch.setattr("fedmoe.runtime.threads.busy_cores", lambda seconds: pytest.fail("it looked"))
    prepare_threads(["token", "create"])
    assert "OMP_NUM_THREADS" not in os.environ
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"


SPIN = """
import sys, threading, time
from fedmoe.runtime.threads import prepare_threads
prepare_threads(["worker"])
import torch
torch.set_num_threads(2)
x = torch.ones(1 << 20)
(x + 1).sum()
start = time.process_time()
for _ in range(20):
    (x + 1).sum()
    time.sleep(0.02)
print(time.process_time() - start)
"""


@pytest.mark.skipif(machine.usable_cores() < 2, reason="threads that have no core to themselves do not spin")
def test_threads_that_wait_take_no_time_from_others() -> None:
    """Twenty parallel sums with a pause after each: threads that spin use the pauses up."""

    def used(**environment: str) -> float:
        clean = {name: value for name, value in os.environ.items() if name not in SETTINGS}
        environment |= {"OMP_NUM_THREADS": "2"}
        command = [sys.executable, "-c", SPIN]
        done = subprocess.run(command, cwd=ROOT, env=clean | environment, capture_output=True, text=True, check=True)
        return float(done.stdout)

    spinning = used(OMP_WAIT_POLICY="ACTIVE", GOMP_SPINCOUNT="infinite")
    assert used() < spinning / 2
