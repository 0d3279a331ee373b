"""A worker's heartbeat: says from a thread of its own what the worker is doing, with the newest lines of its log."""

from __future__ import annotations

import threading
import time

import structlog

from fedmoe.qwen_worker import StepRecord
from fedmoe.runtime.device import held_and_total
from fedmoe.runtime.errors import RefusedError
from fedmoe.runtime.logs import LogTail
from fedmoe.runtime.memory import used_memory
from fedmoe.wire.client import CoordinatorClient, CoordinatorUnavailableError
from fedmoe.wire.contract.status import LONGEST_LINE, MOST_LINES, Heartbeat, OwnState
from fedmoe.worker.pace import Pace

_log = structlog.get_logger("fedmoe.worker")

#: What of a worker's log leaves its machine: events without a word of its data, its files or its folders.
LOGGED_EVENTS = frozenset(
    {
        *("base_model", "phase", "epochs", "held_out_data", "registered", "pulled", "pushed", "delivering", "refused"),
        *("held_out", "stopped_early", "quarantined", "held_update_released", "held_update_rejected", "left"),
        *("coordinator_away", "coordinator_warns", "other_history", "sync_interval_raised", "not_finite"),
        *("smaller_micro_batches", "statistics", "statistics_sent", "statistics_refused", "thin_statistics"),
    }
)
# However long a sync interval is, silence is noticed soon; and no coordinator is asked more often than this.
_LEAST_SECONDS, _MOST_SECONDS = 1.0, 10.0
# Refusals that pass by themselves: the expert is registered after the base model is loaded, haste is over soon.
_PASSING = frozenset({"unknown_expert", "too_many_requests", "no_owner", "busy", "retired"})
_LAST_SECONDS = 2.0


class HeartbeatSender:
    """Sends heartbeats until `close`; whatever goes wrong with them never reaches the training."""

    def __init__(
        self, client: CoordinatorClient, expert: str, worker: str, sync_interval: float, tail: LogTail
    ) -> None:
        self._client, self._expert, self._worker, self._tail = client, expert, worker, tail
        self._interval = min(max(sync_interval, _LEAST_SECONDS), _MOST_SECONDS)
        self._state: OwnState = "loading"
        self._phase = self._device = ""
        self._pace = Pace()
        self._sent = 0
        self._changed = threading.Event()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fedmoe-heartbeat", daemon=True)
        self._thread.start()

    def loading(self, phase: str) -> None:
        """What the worker does before the first step."""
        self._phase = phase
        self._changed.set()

    def training(self, device: str, steps: int | None) -> None:
        """Training begins; `steps` is how many there will be in all, None without an end."""
        self._state, self._phase, self._device, self._pace.steps = "training", "", device, steps
        self._changed.set()

    def stepped(self, record: StepRecord) -> None:
        """A step is done; sent with the next heartbeat."""
        self._pace.add(record)

    def close(self) -> None:
        """Say that the worker leaves, in `_LAST_SECONDS` at most."""
        self._closed.set()
        self._changed.set()
        self._thread.join(_LAST_SECONDS)

    def _run(self) -> None:
        while True:
            closing = self._closed.is_set()
            self._changed.clear()
            try:
                self._send("left" if closing else self._state)
            except CoordinatorUnavailableError:
                pass  # who delivers updates says so
            except RefusedError as error:
                if error.code not in _PASSING:
                    _log.warning("heartbeats_refused", code=error.code, reason=str(error))
                    return
            except Exception as error:
                # The client may be closed under a call that was on its way when the worker left.
                if not self._closed.is_set():
                    _log.warning("heartbeats_ended", reason=repr(error))
                return
            if closing:
                return
            self._changed.wait(self._interval)
            if not self._closed.is_set():
                time.sleep(_LEAST_SECONDS / 10)  # phases that follow each other are told at once

    def _send(self, state: OwnState) -> None:
        first, lines = self._tail.since(self._sent, MOST_LINES)
        record = self._pace.newest
        held, total = held_and_total(self._device) or (None, None)
        self._client.heartbeat(
            Heartbeat(
                expert=self._expert,
                worker=self._worker,
                state=state,
                interval=self._interval,
                phase=self._phase[:200],
                step=record.step if record else 0,
                steps=self._pace.steps,
                steps_per_second=self._pace.steps_per_second,
                tokens_per_second=self._pace.tokens_per_second,
                loss=record.loss if record and 0 <= record.loss <= 1000 else None,
                device=self._device[:200],
                memory=used_memory(),
                device_memory=held,
                device_total=total,
                first_line=first,
                lines=[line[:LONGEST_LINE] for line in lines],
            )
        )
        self._sent = first + len(lines)
