"""Link of a policy to its expert: weights downloaded, update under way, change not yet sent.

    policy                        RUN/federation/NAME/             coordinator
    local - base = delta  ------> update-N, identity.json  ------> base + delta -> newest version
    local = newest + (local - reference) <- point.safetensors <--- newest version

`reference` is what the coordinator knows of the policy: the base, plus the update under way. Everything is on disk
before it counts: an update before it is sent, its answer (`PolicySyncPoint`) before the update is forgotten. So a
process killed at any moment sends again what was not answered, under the same number, and knows what was delivered.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
import structlog

from fedmoe.lora.adapter import Adapter, FloatVector
from fedmoe.lora.codec import decode, encode
from fedmoe.lora.manifest import Manifest
from fedmoe.lora.safetensors_bytes import encode_named, read_header, read_named
from fedmoe.runtime import failpoints
from fedmoe.runtime.errors import ExpectedError
from fedmoe.runtime.files import write_atomic
from fedmoe.wire.client import CoordinatorClient, CoordinatorUnavailableError, ExpectedWeights, PulledExpert
from fedmoe.wire.contract.messages import UpdateHeader
from fedmoe.wire.delivery import Delivery, DeliveryOutcome
from fedmoe.wire.outbox import Outbox

_POINT = "point.safetensors"
_log = structlog.get_logger("fedmoe.arena")


class FederationError(ExpectedError, RuntimeError):
    """A coordinator or a state folder that this run cannot work with; says what to do."""


@dataclass(frozen=True)
class PolicySyncPoint:
    """The newest moment at which policy and expert were brought together.

    `base`: the expert as downloaded, at `version`; `local`: the policy from then on (the base and what has still to
    travel); both float32 (size,). `answered`: the number of the newest update whose answer is part of it, -1 for none;
    `count`: how many such moments there were before. `digest` and `incarnation` say which version and of which history
    the base is; None in a point of an older program.
    """

    base: FloatVector
    local: FloatVector
    version: int
    answered: int = -1
    count: int = 0
    digest: str | None = None
    incarnation: str | None = None

    @classmethod
    def of(cls, pulled: PulledExpert, local: FloatVector, answered: int = -1, count: int = 0) -> Self:
        """The moment at which an expert was downloaded and the policy became `local`."""
        named = (pulled.version, answered, count, pulled.digest, pulled.incarnation)
        return cls(pulled.weights, local, *named)

    def encoded(self) -> bytes:
        """As safetensors, with a checksum of all that is in it."""
        counts = {"version": self.version, "answered": self.answered, "count": self.count}
        facts = json.dumps(counts | {"digest": self.digest, "incarnation": self.incarnation})
        metadata = {"fedmoe": facts, "sha256": _checksum(self.base, self.local, facts)}
        return encode_named({"base": self.base, "local": self.local}, metadata)

    @classmethod
    def decoded(cls, data: bytes, size: int) -> Self:
        """What `encoded` gave; raises ValueError for anything else, or for vectors of another size."""
        _, metadata, _ = read_header(data)
        vectors, counts = read_named(data), json.loads(metadata.get("fedmoe", "{}"))
        try:
            base, local = vectors["base"], vectors["local"]
            version, answered, count = (int(counts[name]) for name in ("version", "answered", "count"))
            digest, incarnation = (counts.get(name) for name in ("digest", "incarnation"))
        except (KeyError, TypeError) as error:
            raise ValueError(f"{error} is missing") from error
        if base.shape != (size,) or local.shape != (size,):
            raise ValueError(f"it holds {base.size} and {local.size} numbers, expected {size}")
        # Older versions wrote none.
        if metadata.get("sha256", checksum := _checksum(base, local, metadata["fedmoe"])) != checksum:
            raise ValueError("its checksum is another: it is damaged")
        return cls(base, local, version, answered, count, digest, incarnation)


def _checksum(base: FloatVector, local: FloatVector, counts: str) -> str:
    return hashlib.sha256(base.tobytes() + local.tobytes() + counts.encode()).hexdigest()


class ExpertLink:
    """The identity, the update under way and the newest point of one policy, in a folder that nobody else may use.

    Raises OutboxError or FederationError for a folder that is in use, another policy's, or damaged.
    """

    def __init__(self, folder: Path, worker: str, expert: str, manifest: Manifest) -> None:
        self.expert = expert
        self.registered = False
        self._worker = worker
        self._manifest = manifest
        self._file = folder / _POINT
        self._outbox = Outbox(folder, worker, expert)
        self._delivery: Delivery | None = None
        self._etag: str | None = None
        try:
            self._point = self._read()
            for leftover in folder.glob(f".{_POINT}-*"):
                leftover.unlink()
            pending = self._outbox.pending
            if pending is not None and self._point is not None and pending.header.sequence <= self._point.answered:
                # Answered and taken in just before the process was killed.
                self._outbox.settle()
            self._reference = self._known_to_coordinator()
        except BaseException:
            self._outbox.close()
            raise

    def _read(self) -> PolicySyncPoint | None:
        try:
            return PolicySyncPoint.decoded(self._file.read_bytes(), self._manifest.layout.size)
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise FederationError(
                f"{self._file} cannot be read ({error}); move {self._file.parent} away and start with --fresh"
            ) from error

    def _known_to_coordinator(self) -> FloatVector | None:
        if self._point is None:
            return None
        pending = self._outbox.pending
        if pending is None:
            return self._point.base
        # The same sum as the coordinator's, so that an expert nobody else changed is this bit for bit.
        return self._point.base + decode(pending.body, self._manifest.layout).flat

    @property
    def begun(self) -> bool:
        """Whether the expert was ever downloaded into this folder."""
        return self._point is not None

    @property
    def under_way(self) -> bool:
        """Whether an update is being delivered."""
        return self._delivery is not None and not self._delivery.over

    @property
    def mark(self) -> list[str | int]:
        """Names the state of the folder for a checkpoint: it changes whenever something is handed over or taken in."""
        return [self._outbox.epoch, self._require_point().count, self._outbox.next_sequence]

    def adapter(self, flat: FloatVector) -> Adapter:
        """Weights of this expert's kind."""
        return Adapter(self._manifest.layout, self._manifest.alpha, flat)

    def register(self, client: CoordinatorClient) -> None:
        """Make sure that the expert is there; the coordinator draws its first A."""
        if not self.registered:
            info = client.register(self.expert, self._worker, self._manifest)
            self.registered = True
            _log.info("expert_registered", expert=info.name, version=info.version, digest=info.digest[:12])

    def begin(self, client: CoordinatorClient) -> FloatVector:
        """The weights to start with: the expert's, or those this folder was left with."""
        if self._point is None:
            pulled = client.pull_expert(self.expert, expected=ExpectedWeights(self._manifest))
            assert pulled is not None, "without an ETag there is always an answer"
            self._record(PolicySyncPoint.of(pulled, pulled.weights))
        return self.newest_local()

    def newest_local(self) -> FloatVector:
        """The policy's weights when something was last handed over or taken in."""
        point = self._require_point()
        assert self._reference is not None
        return self._reference if self._outbox.pending is not None else point.local

    def send(self, client: CoordinatorClient, local: FloatVector, steps: int, trouble: OnFailure) -> bool:
        """Start to deliver what is left of an earlier run, or what was learned since the base; False if nothing is.

        An update that is being delivered goes on.
        """
        if self._delivery is not None:
            return True
        pending = self._outbox.pending
        if pending is None:
            point = self._require_point()
            if np.allclose(local, point.base, rtol=1e-6, atol=1e-9):
                return False  # what rounding left is no update
            pending = self._outbox.cut(self._header(point, steps), encode(self._manifest.layout, local - point.base))
            self._reference = self._known_to_coordinator()
        self._delivery = Delivery(client, pending, trouble, manifest=self._manifest)
        return True

    def _header(self, point: PolicySyncPoint, steps: int) -> UpdateHeader:
        return UpdateHeader(
            expert=self.expert,
            worker=self._worker,
            epoch=self._outbox.epoch,
            sequence=self._outbox.next_sequence,
            base_version=point.version,
            base_digest=point.digest,
            incarnation=point.incarnation,
            answer="weights",
            steps=steps,
        )

    def wait(self, seconds: float) -> bool:
        """Wait so long for the answer to the update under way; whether there is nothing more to wait for."""
        return self._delivery is None or self._delivery.wait(seconds)

    def take_in(self, local: FloatVector) -> FloatVector | None:
        """The policy's next weights, if the answer to the update is there and the expert holds more than it brought.

        Raises RefusedError for an update that a person has to see to; it stays for the next time, unless its numbers
        themselves were refused.
        """
        delivery = self._delivery
        answer = delivery.answer() if delivery is not None else None
        if delivery is None or answer is None:
            return None
        failpoints.reached("league.answered")
        self._delivery = None
        sequence = delivery.pending.header.sequence
        if answer.newest is None:
            assert answer.refused is not None, "only a refusal comes without the newest version"
            if answer.poisoned:
                point = self._require_point()
                self._record(replace(point, local=local, answered=sequence, count=point.count + 1))
                self._settle()
            raise answer.refused
        _log_answer(self.expert, sequence, answer)
        # A returned update never landed: all that was learned since the base has still to travel.
        reference = self._require_point().base if answer.returned else self._reference
        assert reference is not None
        return self._move(answer.newest, local, reference, sequence)

    def refresh(self, client: CoordinatorClient, local: FloatVector) -> FloatVector | None:
        """The policy's next weights, if there is nothing to send and others have changed the expert."""
        point = self._require_point()
        pulled = client.pull_expert(self.expert, self._etag, expected=ExpectedWeights(self._manifest))
        return None if pulled is None else self._move(pulled, local, point.base, point.answered)

    def _move(
        self, newest: PulledExpert, local: FloatVector, reference: FloatVector, answered: int
    ) -> FloatVector | None:
        """Rebase what has still to travel, `local - reference`, onto `newest`; None if the weights stay."""
        changed = not np.array_equal(newest.weights, reference)
        merged = newest.weights + (local - reference) if changed else local
        before = self._require_point()
        here, there = (newest.version, newest.incarnation), (before.version, before.incarnation)
        if changed or answered != before.answered or here != there:
            self._record(PolicySyncPoint.of(newest, merged, answered, before.count + 1))
            self._settle()
        self._etag = newest.etag
        return merged if changed else None

    def _record(self, point: PolicySyncPoint) -> None:
        write_atomic(self._file, point.encoded())
        failpoints.reached("league.recorded")
        self._point = point
        self._reference = point.base

    def _settle(self) -> None:
        self._outbox.settle()
        self._reference = self._known_to_coordinator()

    def _require_point(self) -> PolicySyncPoint:
        assert self._point is not None, "a link begins with a download"
        return self._point

    def close(self) -> bool:
        """Give the folder back; whether an update was left that the coordinator has not answered."""
        pending = self._outbox.pending is not None and (self._delivery is None or not self._delivery.over)
        if self._delivery is not None:
            self._delivery.close()
        self._outbox.close()
        return pending


#: Called with the error of every try that was not answered, in the delivery's own thread.
OnFailure = Callable[[CoordinatorUnavailableError], None]


def _log_answer(expert: str, sequence: int, answer: DeliveryOutcome) -> None:
    if answer.result is None:
        code = answer.refused.code if answer.refused else ""
        _log.warning("update_refused", expert=expert, sequence=sequence, code=code, reason=str(answer.refused))
        return
    result = answer.result
    if answer.held:
        _log.warning("update_quarantined", expert=expert, sequence=sequence, held=result.held, reason=result.note)
        return
    _log.info(
        "update_landed",
        expert=expert,
        sequence=sequence,
        version=result.version,
        staleness=result.staleness,
        coefficient=round(result.coefficient, 6),
        duplicate=result.duplicate,
        digest=(answer.newest.digest if answer.newest else result.digest)[:12],
    )
