"""Chooses the number of compute threads of a process, and lets idle threads sleep instead of spin.

Threads that spin while they wait for each other take the cores from those they wait for: several processes on one
machine then cost many times what they cost alone. The libraries read their settings when they are loaded, so
`prepare_threads` comes before numpy and torch are imported. What the user has set is left as it is.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath

import psutil

from fedmoe.runtime.machine import bound_cores, busy_cores, usable_cores

#: Commands that compute -> how many teams of threads each lets compute at the same time.
COMPUTING: dict[tuple[str, ...], int] = {
    ("worker",): 1,
    ("evaluator",): 1,
    ("data", "check"): 1,
    ("gateway", "audit"): 1,
    ("gateway", "evaluate"): 1,
    ("gateway", "export"): 1,
    ("gateway", "generate"): 1,
    ("gateway", "serve"): 1,
    ("arena", "train"): 2,  # one samples while the other learns
}
_COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_WAITING = ("OMP_WAIT_POLICY", "KMP_BLOCKTIME", "KMP_LIBRARY", "GOMP_SPINCOUNT")
_SAMPLE_SECONDS = 0.25


@dataclass(frozen=True, slots=True)
class CoreUse:
    """What a process finds at its start.

    `bound`: the cores it may run on; `busy`: how many of them others keep busy; `share`: the cores' worth of time that
    its container may use, `bound` without a limit; `others`: processes of FedMoE that compute here, those of its own
    group (torchrun) left out; `ranks`: how many processes of that group run on this machine.
    """

    bound: int
    busy: float
    share: float
    others: int = 0
    ranks: int = 1


@dataclass(frozen=True, slots=True)
class ThreadCount:
    """A number of threads, and a sentence that says why."""

    count: int
    reason: str


def choose_threads(use: CoreUse, teams: int = 1) -> ThreadCount:
    """The threads that fit on what is free; where others have just begun and look idle, an equal share of the cores.

    `teams` of threads compute at once in every rank. Never fewer than 1, never more than there are cores.
    """
    # Ranks that start beside this one are seen at work, and are given their share below.
    busy = max(0.0, use.busy - (use.ranks - 1))
    cores = min(use.share, use.bound)
    free = min(cores, use.bound - round(busy), cores / (use.others + 1))
    reason = f"{use.bound} cores, {busy:.1f} busy; {use.others} other computing processes of FedMoE"
    if cores < use.bound:
        reason += f"; the container may use {cores:g}"
    if use.ranks > 1:
        reason += f"; shared by {use.ranks} ranks"
    if teams > 1:
        reason += f"; {teams} teams of threads"
    return ThreadCount(max(1, int(free / (use.ranks * teams))), reason)


def asked_for(environment: Mapping[str, str]) -> ThreadCount | None:
    """What the user has set, if anything."""
    for name in _COUNTS:
        if text := environment.get(name, "").split(",")[0].strip():
            return ThreadCount(int(text) if text.isdecimal() else 0, f"{name}={text}")
    return None


def own_threads(environment: Mapping[str, str], teams: int = 1) -> ThreadCount:
    """The number of threads for this process, by what the user has set or by what is free in the next moment."""
    if (threads := asked_for(environment)) is not None:
        return threads
    text = environment.get("LOCAL_WORLD_SIZE", "1")
    ranks = max(1, int(text)) if text.isdecimal() else 1
    others = other_processes(in_a_group=ranks > 1)
    use = CoreUse(len(bound_cores()), busy_cores(_SAMPLE_SECONDS), usable_cores(), len(others), ranks)
    return choose_threads(use, teams)


def waiting_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """What to set so that no library's threads spin; nothing that the user has set."""
    settings = {"OPENBLAS_THREAD_TIMEOUT": "4", "TOKENIZERS_PARALLELISM": "false"}
    if not any(name in environment for name in _WAITING):
        # GNU's OpenMP reads the first; Intel's and LLVM's, which PyTorch brings on other systems, the second.
        settings |= {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
    return {name: value for name, value in settings.items() if name not in environment}


def prepare_threads(command: Sequence[str]) -> None:
    """Set this process's environment for a command, `["worker", ...]`; before numpy or torch is imported."""
    os.environ.update(waiting_settings(os.environ))
    teams = teams_of(command)
    # What the user has set to something that is no number is refused where threads are set.
    if teams is not None and (threads := own_threads(os.environ, teams)).count:
        os.environ.setdefault("OMP_NUM_THREADS", str(threads.count))


def teams_of(command: Sequence[str]) -> int | None:
    """How many teams of threads a command line computes with at once; None where it does not compute."""
    return next((teams for words, teams in COMPUTING.items() if tuple(command[: len(words)]) == words), None)


def command_of(command_line: Sequence[str]) -> list[str] | None:
    """The command of FedMoE that a process of this command line runs, or None: `[python, -m, fedmoe, worker, ...]`."""
    if not command_line or not PurePath(command_line[0]).name.lower().startswith("python"):
        return None  # a shell or a launcher around it is not the process itself
    for place, word in enumerate(command_line[1:8], 1):
        name = PurePath(word).name.lower().removesuffix(".exe")
        if name in ("fedmoe", "run_worker.py"):
            return [*([] if name == "fedmoe" else ["worker"]), *command_line[place + 1 :]]
    return None


def other_processes(in_a_group: bool = False) -> set[int]:
    """The ids of FedMoE's other processes on this machine that compute; one and what it started count once.

    `in_a_group`: those that the same launcher started are this run's own ranks and do not count.
    """
    computing: dict[int, int] = {}
    for process in psutil.process_iter(["cmdline", "ppid"]):
        command = command_of(process.info["cmdline"] or ())
        if command is not None and teams_of(command) is not None:
            computing[process.pid] = process.info["ppid"]
    launcher = os.getppid() if in_a_group else None
    others = computing.keys() - {os.getpid()}
    return {number for number in others if computing[number] not in {*computing, launcher}}
