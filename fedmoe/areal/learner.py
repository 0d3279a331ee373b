"""One policy trained by AReaL in a process of its own: examples in, statistics and a new adapter out.

AReaL's engine holds one adapter and one process group, so each learner is a process of its own, in AReaL's environment
if that is another one than this. Nothing here imports AReaL.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedmoe.areal.batch import ExampleBatch, Sequences
from fedmoe.areal.config import ArealConfig, ArealError, check_base_folder
from fedmoe.areal.packing_check import LeakError
from fedmoe.areal.rpc import Frame, receive, send
from fedmoe.areal.statistics import ArealUpdate
from fedmoe.arena.learning.learner import AdamState
from fedmoe.arena.rollout.episodes import Example
from fedmoe.lora.adapter import Adapter, FloatArray, Layout, ModuleShape
from fedmoe.lora.formats import PEFT_CONFIG, PEFT_WEIGHTS, read_peft

_LOG = "areal.log"
_LOG_SHOWN = 2000
_STOP_SECONDS = 20.0


class ArealProcessError(ArealError):
    """The learner's process ended, or did not answer in time; what it held is lost."""


class ArealLearner:
    """AReaL's PPO actor on one adapter, in a process of its own that logs to `work_dir`/areal.log.

    `start`: the adapter to begin from (default: a random one that changes nothing), at `version`. `python`: the
    interpreter of AReaL's environment (default: this one). `timeout` in seconds is what one request may take. Raises
    `ArealError` for settings that cannot be used, `LeakError` when the model computes batched sequences other than
    alone, and `ArealProcessError` when the process is gone. Close it, or use it in a `with` statement.
    """

    def __init__(
        self,
        config: ArealConfig,
        work_dir: Path,
        *,
        start: Adapter | None = None,
        version: int = 0,
        python: Path | None = None,
        timeout: float = 1800.0,
    ) -> None:
        check_base_folder(Path(config.base_folder))
        work_dir.mkdir(parents=True, exist_ok=True)
        self._work_dir = work_dir
        #: The version of the adapter: it rises with every update that moved it.
        self.version = version
        self._alpha = float(config.alpha)
        self._channel, self._process = _launch(work_dir / _LOG, python or Path(sys.executable))
        self._channel.settimeout(timeout)
        try:
            answer = self._ask(Frame("start", {"config": config.as_json(), "version": version}))
            lines = [line.split() for line in str(answer.values["modules"]).splitlines()]
            modules = tuple(ModuleShape(name, int(inner), int(outer)) for name, inner, outer in lines)
            #: The adapter's rank and modules, which an adapter to load must have too.
            self.layout = Layout(modules, config.rank)
            if start is not None:
                self.replace(start, version)
        except BaseException:
            self.close()
            raise

    def update(self, examples: Sequence[Example]) -> ArealUpdate:
        """Learn from examples: the version rises by one, unless no step could be taken.

        The proximal log-probabilities are computed here, before the first step; those of the examples are not used.
        """
        answer = self._ask(Frame("update", arrays=ExampleBatch.of(examples).arrays()))
        values = dict(answer.values)
        version = values.pop("new_version")
        assert isinstance(version, int)
        self.version = version
        return ArealUpdate(**values)  # type: ignore[arg-type]

    def score(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[FloatArray]:
        """For each (prompt, tokens) the log-probability of every token at the rollouts' temperature, float32 (T,)."""
        sequences = Sequences.of(pairs)
        answer = self._ask(Frame("score", arrays=sequences.arrays()))
        return sequences.split(np.asarray(answer.arrays["logprobs"], np.float32))

    def adapter(self) -> Adapter:
        """The adapter as it is now, by way of the PEFT folder that AReaL writes for inference servers."""
        answer = self._ask(Frame("save", {"folder": str(self._work_dir)}))
        folder = self._work_dir / str(answer.values["folder"])
        try:
            return read_peft({name: (folder / name).read_bytes() for name in (PEFT_CONFIG, PEFT_WEIGHTS)})
        finally:
            shutil.rmtree(folder)

    def replace(self, adapter: Adapter, version: int, state: AdamState | None = None) -> None:
        """Continue from another adapter of the same rank, alpha and modules, with `state` or a fresh optimizer.

        With what `adapter`, `version` and `optimizer_state` gave, training goes on as if it had never stopped.
        """
        if adapter.layout != self.layout or adapter.alpha != self._alpha:
            raise ArealError(
                f"the adapter has rank {adapter.rank}, alpha {adapter.alpha:g} and {len(adapter.layout.modules)} "
                f"modules, the learner rank {self.layout.rank}, alpha {self._alpha:g} and "
                f"{len(self.layout.modules)}; rank, alpha and modules must be the same"
            )
        self._ask(Frame("load", {"alpha": adapter.alpha, "version": version}, {"flat": adapter.flat}))
        self.version = version
        if state is not None:
            steps = np.array([state.steps], np.float32)
            arrays = {"first_moment": state.first, "second_moment": state.second, "steps": steps}
            self._ask(Frame("restore", arrays=arrays))

    def optimizer_state(self) -> AdamState:
        """The optimizer, for a checkpoint."""
        arrays = {name: np.asarray(array, np.float32) for name, array in self._ask(Frame("state")).arrays.items()}
        return AdamState(arrays["first_moment"], arrays["second_moment"], int(arrays["steps"][0]))

    def set_learning_rate(self, rate: float) -> None:
        """Use another learning rate from now on."""
        self._ask(Frame("set_learning_rate", {"rate": float(rate)}))

    def close(self) -> None:
        """End the process; an update that runs is lost."""
        self._channel.close()
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> ArealLearner:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _ask(self, request: Frame) -> Frame:
        try:
            send(self._channel, request)
            answer = receive(self._channel)
        except TimeoutError:
            self._process.kill()
            raise ArealProcessError(
                f"{self._name} did not answer {request.kind!r} within {self._channel.gettimeout():g} s and was ended"
            ) from None
        except OSError as error:
            raise self._process_error(request, f"{error}") from error
        if answer is None:
            raise self._process_error(request, "it closed its end")
        if answer.kind == "refused":
            kind = LeakError if answer.values.get("type") == "LeakError" else ArealError
            raise kind(str(answer.values["error"]))
        if answer.kind == "failed":
            raise self._process_error(request, str(answer.values["error"]))
        return answer

    @property
    def _name(self) -> str:
        return f"the AReaL process {self._process.pid} of {self._work_dir}"

    def _process_error(self, request: Frame, why: str) -> ArealProcessError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_STOP_SECONDS)
        log = (self._work_dir / _LOG).read_text(errors="replace")
        return ArealProcessError(
            f"{self._name} is gone ({_ending(self._process.returncode)}; {why}); {request.kind!r} was not done and the "
            f"adapter since the last checkpoint is lost. Its log ends with:\n{log[-_LOG_SHOWN:]}"
        )


def _launch(log: Path, python: Path) -> tuple[socket.socket, subprocess.Popen[bytes]]:
    ours, theirs = socket.socketpair()
    with theirs, log.open("ab") as output:
        command = [str(python), "-m", "fedmoe.areal.process", "--socket", str(theirs.fileno())]
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=[theirs.fileno()],
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
                start_new_session=True,  # an interrupt of the terminal is for us; we end the process ourselves
            )
        except OSError as error:
            ours.close()
            raise ArealError(f"{python} cannot be started: {error}; give the python of AReaL's environment") from error
    return ours, process


def _ending(status: int | None) -> str:
    if status is None:
        return "still ending"
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
