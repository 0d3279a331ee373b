"""Delivery of one update from a background thread, retried until it is answered."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from concurrent import futures
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import structlog

from fedmoe.lora.codec import WireDtype, decode, digest
from fedmoe.lora.manifest import Manifest
from fedmoe.lora.safetensors_bytes import CodecError
from fedmoe.lora.update_rules import add_scaled
from fedmoe.runtime.errors import RefusedError
from fedmoe.wire.client import (
    ANOTHER_HISTORY,
    CoordinatorClient,
    CoordinatorUnavailableError,
    ExpectedWeights,
    PulledExpert,
    PushResult,
    TooStaleError,
)
from fedmoe.wire.contract.messages import StatisticRequest, UpdateResult
from fedmoe.wire.outbox import PendingUpdate

Result = TypeVar("Result")
_log = structlog.get_logger("fedmoe.worker")

#: Refusals that a newer version cures: what was learned is kept and moved onto it.
CURED_BY_PULLING = ANOTHER_HISTORY | {"too_stale"}
#: The coordinator got other bytes than were sent: a fault on the way, which the next try may not meet.
_DAMAGED_ON_THE_WAY = frozenset({"digest_mismatch", "truncated"})
#: An administrator's word on an update that was held: it is over, and what it brought must not be sent again.
_REJECTED = "update_rejected"
#: Another worker of this id pushes; when it is silent for long enough, this one takes over.
_HELD_ELSEWHERE = "lease_held"
# Refusals of the numbers themselves.
_POISONED = frozenset({"not_finite", "norm_too_large"})
_FIRST_PAUSE = 0.5
_LONGEST_PAUSE = 15.0
_LONGEST_ASKED = 60.0


@dataclass(frozen=True)
class DeliveryOutcome:
    """The end of a delivery: what became of the update, or why it was refused.

    `newest` is the version to rebase onto; there is none after a refusal that no newer version cures.
    """

    result: UpdateResult | None
    refused: RefusedError | None
    newest: PulledExpert | None
    seconds: float

    @property
    def returned(self) -> bool:
        """Whether what the update brought is local progress again: it was refused, and a newer version cures that.

        One that is held stays with the coordinator, one that was rejected is given up.
        """
        return self.refused is not None and self.refused.code in CURED_BY_PULLING

    @property
    def held(self) -> bool:
        """Whether the coordinator holds the update for an administrator."""
        return self.result is not None and self.result.status == "quarantined"

    @property
    def poisoned(self) -> bool:
        """Whether the update's numbers themselves were refused: it must never be sent again."""
        return self.refused is not None and self.refused.code in _POISONED


class Delivery:
    """Sends one pending update from a thread of its own; `answer` is there once the coordinator has spoken.

    While the coordinator is away or sheds load, tries go on, `pause_seconds` apart. The thread is a daemon: a worker
    that must leave leaves, and sends the update after its restart. `fact` is sent after an update that landed, once:
    a newer one follows with the next. Newest weights have to be of `manifest`; others are waited out. Where the update
    is all that is new, or one more that comes with the answer, they are `base`, what it was measured from, plus these,
    checked by their digest. Where they do not come with the answer they are pulled in `dtype`.
    """

    def __init__(
        self,
        client: CoordinatorClient,
        pending: PendingUpdate,
        on_trouble: Callable[[CoordinatorUnavailableError], None] = lambda _: None,
        fact: StatisticRequest | None = None,
        manifest: Manifest | None = None,
        dtype: WireDtype = "fp32",
        base: PulledExpert | None = None,
    ) -> None:
        self.pending = pending
        self._base = base
        self._manifest, self._dtype = manifest, dtype
        self._fact = fact
        self._client = client
        self._on_trouble = on_trouble
        self._started = time.monotonic()
        self._closed = threading.Event()
        self._outcome: futures.Future[DeliveryOutcome | None] = futures.Future()
        threading.Thread(target=self._run, name="fedmoe-delivery", daemon=True).start()

    @property
    def over(self) -> bool:
        """Whether the delivery has ended, so that `answer` returns its outcome or raises."""
        return self._outcome.done()

    def answer(self) -> DeliveryOutcome | None:
        """The answer, or None while the update is still on its way; raises what broke the delivery itself."""
        return self._outcome.result() if self._outcome.done() else None

    def wait(self, seconds: float) -> bool:
        """Wait for the answer, at most so long; whether `answer` has something to say."""
        return bool(futures.wait([self._outcome], seconds).done)

    def close(self) -> None:
        """Try no more; an update that was not answered stays in the outbox."""
        self._closed.set()

    def _run(self) -> None:
        try:
            self._outcome.set_result(self._deliver())
        except BaseException as error:
            self._outcome.set_exception(error)

    def _deliver(self) -> DeliveryOutcome | None:
        if self._base is not None and digest(self._base.adapter) != self._base.digest:
            self._base = None  # pulled in a narrow precision: not what the coordinator has
        try:
            pushed = self._persist(self._push)
        except RefusedError as refused:
            return self._after_refusal(refused)
        if pushed is None:
            return None
        newest = pushed.newest or self._followed(pushed)
        newest = newest or self._persist(lambda: self._pull(pushed.result.version, "fp32"))
        if self._fact is not None and pushed.result.status == "landed":
            try:
                self._client.push_statistic(self._fact)
            except (CoordinatorUnavailableError, RefusedError) as error:
                _log.warning("not_told", kind=self._fact.kind, reason=str(error))
        return self._ended(pushed.result, None, newest) if newest else None

    def _followed(self, pushed: PushResult) -> PulledExpert | None:
        """The newest weights where they are the base plus what is known; None where they are others."""
        base, result = self._base, pushed.result
        landed = [(result.digest, result.coefficient, self.pending.body)]
        if pushed.other is not None and result.other is not None:
            landed.insert(0, (result.other.digest, result.other.coefficient, pushed.other))
        if base is None or result.weights_digest is None or result.version != base.version + len(landed):
            return None
        weights = base.weights
        for name, coefficient, body in landed:
            try:
                delta = decode(body, base.manifest.layout).flat
            except CodecError as error:
                _log.warning("weights_differ", version=result.version, update=name[:12], reason=str(error))
                return None
            with np.errstate(over="ignore", invalid="ignore"):  # a coefficient that is none gives another digest
                weights = add_scaled(weights, delta, coefficient)
        newest = replace(
            base,
            version=result.version,
            digest=result.weights_digest,
            weights=weights,
            etag="",
            incarnation=result.incarnation or base.incarnation,
        )
        if digest(newest.adapter) != result.weights_digest:
            _log.warning("weights_differ", version=result.version, digest=result.weights_digest[:12])
            return None
        return newest

    def _after_refusal(self, refused: RefusedError) -> DeliveryOutcome | None:
        if refused.code not in CURED_BY_PULLING | {_REJECTED}:
            return self._ended(None, refused, None)
        newest = refused.newest if isinstance(refused, TooStaleError) else None
        least = 0 if refused.code in ANOTHER_HISTORY else self.pending.header.base_version
        newest = newest or self._persist(lambda: self._pull(least, self._dtype))
        return self._ended(None, refused, newest) if newest else None

    def _ended(
        self, result: UpdateResult | None, refused: RefusedError | None, newest: PulledExpert | None
    ) -> DeliveryOutcome:
        return DeliveryOutcome(result, refused, newest, time.monotonic() - self._started)

    def _persist(self, call: Callable[[], Result]) -> Result | None:
        return until_answered(call, self._closed, self._on_trouble)

    def _push(self) -> PushResult:
        try:
            return self._client.push(
                self.pending.header, self.pending.body, self._manifest, minimal=self._base is not None
            )
        except RefusedError as error:
            if error.code != _HELD_ELSEWHERE:
                raise
            seconds_left = error.facts.get("seconds_left")
            seconds = float(seconds_left) if isinstance(seconds_left, int | float) else None
            raise CoordinatorUnavailableError(f"{error.code}: {error}", seconds) from error

    def _pull(self, least_version: int, dtype: WireDtype) -> PulledExpert:
        expected = ExpectedWeights(self._manifest, least_version)
        pulled = self._client.pull_expert(self.pending.header.expert, dtype=dtype, expected=expected)
        assert pulled is not None, "without an ETag there is always an answer"
        return pulled


def until_answered(
    call: Callable[[], Result],
    closed: threading.Event,
    on_trouble: Callable[[CoordinatorUnavailableError], None] = lambda _: None,
) -> Result | None:
    """The result of `call`, tried until it gives one, `pause_seconds` apart; None once `closed`.

    `on_trouble` gets what went wrong with a try: no answer, or bytes that were damaged on their way.
    """
    tries = 0
    while not closed.is_set():
        try:
            return call()
        except CoordinatorUnavailableError as error:
            trouble = error
        except RefusedError as error:
            if error.code not in _DAMAGED_ON_THE_WAY:
                raise
            trouble = CoordinatorUnavailableError(f"{error.code}: {error}")
        tries += 1
        on_trouble(trouble)
        # Pauses spread load, they are no secret.
        closed.wait(pause_seconds(tries, trouble.retry_after, random.random()))  # noqa: S311
    return None


def pause_seconds(tries: int, retry_after: float | None, chance: float) -> float:
    """Seconds to wait after `tries` failures in a row; `chance` in [0, 1) spreads workers that failed together.

    Doubles from half a second to 15, of which half is left to chance; or what the coordinator asked for (at most a
    minute) and up to half as much again.
    """
    if retry_after is not None:
        return min(max(retry_after, _FIRST_PAUSE), _LONGEST_ASKED) * (1 + chance / 2)
    return min(_LONGEST_PAUSE, _FIRST_PAUSE * 2.0 ** min(tries - 1, 10)) * (1 + chance) / 2
