"""The vLLM server as a child process: what it is started with, and that all of it is gone afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fedmoe
from fedmoe.inference.engine import EngineError
from fedmoe.inference.vllm import watchdog as vllm_guard
from fedmoe.inference.vllm.server import (
    VllmServer,
    VllmSettings,
    loras_needed,
    server_command,
    server_environment,
)

SETTINGS = VllmSettings(Path("/env/bin/python"), Path("/models/base"), max_loras=6, max_rank=12)
Start = Callable[..., VllmServer]
ROOT = Path(fedmoe.__file__).parents[1]


def stand_in(tmp_path: Path) -> Path:
    """A program in the place of vLLM's python."""
    made = tmp_path / "python"
    program = Path(__file__).with_name("stand_in_server.py")
    made.write_text(f'#!/bin/sh\necho $$ >server.pid\nexec {sys.executable} {program} "$@"\n')
    made.chmod(0o700)
    return made


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Starts a stand-in for the server that behaves as named."""
    settings = VllmSettings(stand_in(tmp_path), Path("/models/base"), max_loras=6, max_rank=12)

    def made(how: str, deadline: float = 20.0) -> VllmServer:
        monkeypatch.setenv("STAND_IN", how)
        return VllmServer(settings, tmp_path / "logs" / "server.log", deadline)

    return made


def pid_in(tmp_path: Path, name: str) -> int:
    return int((tmp_path / "logs" / f"{name}.pid").read_text())


def gone_already(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def becomes(true: Callable[[], bool]) -> bool:
    """Whether it comes true; on busy cores that takes its time."""
    deadline = time.monotonic() + 60
    while not true() and time.monotonic() < deadline:
        time.sleep(0.01)
    return true()


def gone(pid: int) -> bool:
    """Whether the process ends."""
    return becomes(lambda: gone_already(pid))


@settings(deadline=None)
@given(policies=st.integers(1, 32), staleness=st.integers(0, 8))
def test_the_server_has_room_for_all_versions_in_use_and_the_next(policies: int, staleness: int) -> None:
    in_use = policies * (staleness + 1)
    base = 1
    assert loras_needed(policies, staleness) == in_use + policies + base


def option(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


def test_the_command_asks_for_loopback_adapters_and_exact_log_probabilities() -> None:
    command = server_command(SETTINGS, 8123)
    assert command[:3] == ["/env/bin/python", "-m", "vllm.entrypoints.openai.api_server"]
    asked = {"--host": "127.0.0.1", "--port": "8123", "--model": "/models/base", "--max-loras": "6"}
    asked |= {"--logprobs-mode": "processed_logprobs", "--generation-config": "vllm", "--dtype": "float32"}
    assert {name: option(command, name) for name in asked} == asked
    assert "--enable-lora" in command


def test_on_a_cpu_prompts_are_never_cut_in_two() -> None:
    command = server_command(SETTINGS, 8123)
    assert "--no-enable-chunked-prefill" in command
    assert int(option(command, "--max-num-batched-tokens")) >= SETTINGS.max_tokens
    assert "--enforce-eager" in command


def test_on_a_gpu_the_trainer_keeps_its_part_of_the_memory() -> None:
    settings = VllmSettings(Path("/env/bin/python"), Path("/models/base"), 6, 12, device="cuda", gpu_share=0.3)
    command = server_command(settings, 8123)
    assert option(command, "--gpu-memory-utilization") == "0.3"
    assert "--enforce-eager" not in command
    assert "VLLM_CPU_KVCACHE_SPACE" not in server_environment(settings, {})


@pytest.mark.parametrize(("rank", "room"), [(1, 1), (2, 8), (8, 8), (12, 16), (65, 128), (512, 512)])
def test_the_rank_is_rounded_up_to_one_that_vllm_has_room_for(rank: int, room: int) -> None:
    settings = VllmSettings(Path("/env/bin/python"), Path("/models/base"), 6, rank)
    assert option(server_command(settings, 1), "--max-lora-rank") == str(room)


@pytest.mark.parametrize("rank", [0, 513])
def test_a_rank_vllm_cannot_serve_is_refused(rank: int) -> None:
    with pytest.raises(EngineError, match=f"ranks from 1 to 512, got max_rank {rank}"):
        server_command(VllmSettings(Path("/env/bin/python"), Path("/models/base"), 6, rank), 1)


def test_the_environment_opens_the_adapter_routes_and_imports_nothing_from_here() -> None:
    environment = server_environment(SETTINGS, {"PATH": "/bin", "PYTHONPATH": "/src", "PYTHONHOME": "/usr"})
    assert environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
    assert environment["VLLM_HOST_IP"] == "127.0.0.1"
    assert environment["PYTHONSAFEPATH"] == "1"
    assert environment["PATH"] == "/bin"
    assert not {"PYTHONPATH", "PYTHONHOME"} & environment.keys()


def test_a_started_server_answers_and_takes_all_it_started_with_it(start: Start, tmp_path: Path) -> None:
    with start("serves") as server:
        assert server.running()
        child = pid_in(tmp_path, "child")
        assert psutil.pid_exists(child)
        assert "--enable-lora" in server.tail()
    assert not server.running()
    assert gone(server.pid)
    assert gone(child)
    server.stop()


def test_a_server_that_dies_while_it_starts_says_why(start: Start) -> None:
    with pytest.raises(EngineError, match=r"(?s)ended while it started.*the model's folder is empty"):
        start("dies")


def test_a_server_that_is_never_ready_is_ended(start: Start, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"not ready after 3 s"):
        start("sleeps", deadline=3.0)
    assert gone(pid_in(tmp_path, "server"))


def test_children_of_a_server_that_was_killed_are_ended_too(start: Start, tmp_path: Path) -> None:
    with start("serves") as server:
        psutil.Process(pid_in(tmp_path, "server")).kill()
        assert gone(pid_in(tmp_path, "child"))
        assert gone(server.pid)
        # A process is a zombie once its first thread is; it can be waited for when its last one is.
        assert becomes(lambda: not server.running())


def test_a_server_that_lost_its_guard_is_ended_all_the_same(start: Start, tmp_path: Path) -> None:
    with start("serves") as server:
        psutil.Process(server.pid).kill()
        assert gone(server.pid)
        assert not gone_already(pid_in(tmp_path, "server"))
    assert gone(pid_in(tmp_path, "server"))
    assert gone(pid_in(tmp_path, "child"))


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_a_server_ends_with_the_process_that_started_it(tmp_path: Path, end: signal.Signals) -> None:
    program = (
        "import sys, time; from pathlib import Path; from fedmoe.inference.vllm.server import *\n"
        f"VllmServer(VllmSettings(Path({str(stand_in(tmp_path))!r}), Path('/m'), 6, 12), Path(sys.argv[1]), 20.0)\n"
        "print('ready', flush=True); time.sleep(600)"
    )
    log = tmp_path / "logs" / "server.log"
    environment = os.environ | {"STAND_IN": "serves"}
    with subprocess.Popen(
        [sys.executable, "-c", program, str(log)], env=environment, stdout=subprocess.PIPE, cwd=ROOT
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"ready\n"
        parent.send_signal(end)
    assert gone(pid_in(tmp_path, "server"))
    assert gone(pid_in(tmp_path, "child"))


def test_a_guard_without_a_group_of_its_own_starts_nothing() -> None:
    guard = Path(vllm_guard.__file__)
    ended = subprocess.run([sys.executable, str(guard), "touch", "x"], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr.strip()) == (
        1,
        "start this in a session of its own: it ends its whole process group",
    )


def test_a_python_that_is_not_there_is_refused(tmp_path: Path) -> None:
    settings = VllmSettings(tmp_path / "nowhere", Path("/models/base"), 6, 12)
    with pytest.raises(EngineError, match="nowhere is not there; it must be the python of an environment with vLLM"):
        VllmServer(settings, tmp_path / "server.log")
