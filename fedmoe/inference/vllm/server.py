"""A vLLM server as a child process: started on loopback, waited for, and stopped with all that it started."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import httpx2

from fedmoe.inference.engine import EngineError

#: The name the base model is served under.
SERVED_NAME = "base"
# The ranks vLLM has room for; any adapter of lower rank fits too.
_SERVER_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_LOOPBACK = "127.0.0.1"
_GRACE_SECONDS = 20.0
_GUARD = Path(__file__).with_name("watchdog.py")


@dataclass(frozen=True, slots=True)
class VllmSettings:
    """How to start a server. `python` is that of an environment with vLLM, `model` a checkpoint folder.

    `max_rank` must be the highest rank that any adapter may get while the server runs. On a GPU `gpu_share` is the part
    of its memory to take, which must leave room for the trainer.
    """

    python: Path
    model: Path
    max_loras: int
    max_rank: int
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    max_tokens: int = 2048
    device: Literal["cpu", "cuda"] = "cpu"
    gpu_share: float = 0.4


def loras_needed(policies: int, max_staleness: int) -> int:
    """How many adapters the server must batch: each policy's versions in use and its next, and one for the base."""
    return policies * (max_staleness + 2) + 1


def server_command(settings: VllmSettings, port: int) -> list[str]:
    """The command line of the server; raises EngineError for a rank that vLLM has no room for."""
    ranks = [rank for rank in _SERVER_RANKS if rank >= settings.max_rank]
    if not ranks or settings.max_rank < 1:
        raise EngineError(f"vLLM serves ranks from 1 to {_SERVER_RANKS[-1]}, got max_rank {settings.max_rank}")
    # `vllm serve` needs a distribution called vllm, which CPU builds are not; the module is the same server.
    command = [str(settings.python), "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--host", _LOOPBACK, "--port", str(port)]
    command += ["--model", str(settings.model), "--served-model-name", SERVED_NAME]
    command += ["--dtype", settings.dtype, "--max-model-len", str(settings.max_tokens)]
    command += ["--enable-lora", "--max-loras", str(settings.max_loras), "--max-lora-rank", str(ranks[0])]
    # Plain sampling, log-probabilities at the request's temperature.
    command += ["--generation-config", "vllm", "--logprobs-mode", "processed_logprobs"]
    if settings.device == "cpu":
        # A prompt cut in two steps makes vLLM 0.32 rewind the request's seed, which a CPU cannot: the server dies.
        whole_prompts = ["--no-enable-chunked-prefill", "--max-num-batched-tokens", str(2 * settings.max_tokens)]
        return [*command, "--enforce-eager", *whole_prompts]
    return [*command, "--gpu-memory-utilization", str(settings.gpu_share)]


def server_environment(settings: VllmSettings, inherited: Mapping[str, str]) -> dict[str, str]:
    """The environment of the server: this process's own, without what would make it import from here."""
    environment = {name: value for name, value in inherited.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    environment |= {
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_HOST_IP": _LOOPBACK,
        "VLLM_LOOPBACK_IP": _LOOPBACK,
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        # A folder called `vllm` where the server is started would be taken for the package.
        "PYTHONSAFEPATH": "1",
    }
    if settings.device == "cpu":
        environment["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GiB
        # Pinning to cores is for a machine of its own; the trainer wants them too.
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        environment["OMP_NUM_THREADS"] = "1"
        # Without this the first completion waits 20 s for a kernel to be compiled that saves microseconds.
        environment["TORCHDYNAMO_DISABLE"] = "1"
        # On busy cores a step takes minutes; after 300 s vLLM would take its own worker for dead and end.
        environment["VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS"] = "3600"
    return environment


class VllmServer:
    """A running server; leave the `with` block or call `stop` to end it. It also ends when this process does, at once.

    Starting raises EngineError with the end of the log when the server dies or is not ready after `deadline` seconds.
    """

    def __init__(self, settings: VllmSettings, log: Path, deadline: float = 900.0) -> None:
        if not settings.python.is_file():
            raise EngineError(f"{settings.python} is not there; it must be the python of an environment with vLLM")
        with socket.socket() as probe:
            probe.bind((_LOOPBACK, 0))
            port = int(probe.getsockname()[1])
        self.url = f"http://{_LOOPBACK}:{port}"
        self.log = log
        self._stopped = False
        command = server_command(settings, port)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            # A session of its own makes a process group of the guard, the server and its workers: what `stop` ends.
            self._process = subprocess.Popen(
                [sys.executable, "-I", str(_GUARD), *command],
                cwd=log.parent,
                env=server_environment(settings, os.environ),
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._await_health(time.monotonic() + deadline, deadline)
        except BaseException:
            self.stop()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """The process id of the server's guard, which is also that of the group of all its processes."""
        return self._process.pid

    def running(self) -> bool:
        """Whether the server is alive."""
        # Left unreaped, a dead process keeps its id, so that `stop` never signals another process.
        return not self._stopped and os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def tail(self, characters: int = 3000) -> str:
        """The end of the server's log."""
        return self.log.read_text(errors="replace")[-characters:] if self.log.exists() else ""

    def stop(self) -> None:
        """End the server and everything it started, by request first, then by force; a second call does nothing."""
        if self._stopped:
            return
        if self._process.stdin is not None:
            self._process.stdin.close()
        end = time.monotonic() + _GRACE_SECONDS
        while self.running() and time.monotonic() < end:
            time.sleep(0.05)
        os.killpg(self.pid, signal.SIGKILL)  # where all went well only the dead guard is left in the group
        self._process.wait()
        self._stopped = True

    def _await_health(self, end: float, deadline: float) -> None:
        while True:
            with suppress(httpx2.HTTPError):
                if httpx2.get(f"{self.url}/health", timeout=2.0).status_code == 200:
                    return
            if not self.running():
                raise EngineError(f"the vLLM server ended while it started; the end of {self.log}:\n{self.tail()}")
            if time.monotonic() > end:
                raise EngineError(
                    f"the vLLM server was not ready after {deadline:g} s; the end of {self.log}:\n{self.tail()}"
                )
            time.sleep(0.25)
