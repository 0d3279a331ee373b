"""How many rollouts a policy may have under way, so that none is too old when it is learned from.

AReaL's formula, one state a policy: capacity = min(max_concurrent - running, (max_staleness + version + 1) * batch -
(accepted + running)). The k-th rollout is learned from at version (k - 1) // batch, so letting it start at `version`
only while k <= (max_staleness + version + 1) * batch bounds its age, **if** rollouts are learned from in the order they
were started. A straggler that others overtake is older; `is_fresh` tells, and `discard` gives its place back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace


class AdmissionError(ValueError):
    """An event that cannot happen in this state, or a state that cannot be."""


@dataclass(frozen=True, slots=True)
class Admission:
    """The rollouts of one policy: a value; every event gives a new one, or raises `AdmissionError`.

    `max_concurrent`, `batch` (rollouts an update consumes) and `max_staleness` (versions) are settings; the rest are
    counts. `accepted` counts since version 0, so it survives a restart or the bound does not (AReaL #1388).
    """

    max_concurrent: int
    batch: int
    max_staleness: int
    enqueued: int = 0
    running: int = 0
    accepted: int = 0
    rejected: int = 0

    def __post_init__(self) -> None:
        if self.max_concurrent < 1 or self.batch < 1:
            raise AdmissionError(f"max_concurrent and batch start at 1, got {self.max_concurrent} and {self.batch}")
        for name in ("max_staleness", "enqueued", "running", "accepted", "rejected"):
            if getattr(self, name) < 0:
                raise AdmissionError(f"{name} would be {getattr(self, name)}; it cannot be below 0")

    def capacity(self, version: int) -> int:
        """How many rollouts may start now, at this version of the policy; 0 or less: none."""
        by_staleness = (self.max_staleness + version + 1) * self.batch - (self.accepted + self.running)
        return min(self.max_concurrent - self.running, by_staleness)

    @property
    def pending_limit(self) -> int:
        """How many rollouts are worth keeping in the queue."""
        return (self.max_staleness + 1) * self.batch

    def enqueue(self, count: int = 1) -> Admission:
        """Rollouts wait to start."""
        return replace(self, enqueued=self.enqueued + _positive(count))

    def submit(self, version: int, count: int = 1) -> Admission:
        """Waiting rollouts start at this version; more than the capacity is refused."""
        if _positive(count) > self.capacity(version):
            raise AdmissionError(
                f"{count} rollouts cannot start at version {version}: the capacity is {self.capacity(version)} "
                f"({self.running} running, {self.accepted} accepted); ask capacity() first"
            )
        return replace(self, enqueued=self.enqueued - count, running=self.running + count)

    def accept(self, count: int = 1) -> Admission:
        """Running rollouts ended and will be learned from."""
        return replace(self, running=self.running - _positive(count), accepted=self.accepted + count)

    def reject(self, count: int = 1) -> Admission:
        """Running rollouts ended and are thrown away; others may take their place."""
        return replace(self, running=self.running - _positive(count), rejected=self.rejected + count)

    def discard(self, count: int = 1) -> Admission:
        """Accepted rollouts turned out too old before they were learned from; others may take their place."""
        return replace(self, accepted=self.accepted - _positive(count), rejected=self.rejected + count)

    def is_fresh(self, started: int, version: int) -> bool:
        """Whether a rollout started at version `started` may be learned from at `version`."""
        return 0 <= version - started <= self.max_staleness

    def resumed(self, version: int, buffered: int = 0) -> Admission:
        """After a restart at `version`: nothing runs, and `buffered` accepted rollouts were saved and wait."""
        return replace(self, enqueued=0, running=0, accepted=version * self.batch + buffered)

    def state(self) -> dict[str, int]:
        """Everything, as plain JSON."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: Mapping[str, object]) -> Admission:
        """What `state` was taken of; raises `AdmissionError` for anything else."""
        names = {field.name for field in fields(cls)}
        if set(state) != names or any(type(value) is not int for value in state.values()):
            raise AdmissionError(f"expected whole numbers for {sorted(names)}, got {dict(state)!r}")
        return cls(**{name: value for name, value in state.items() if isinstance(value, int)})


def _positive(count: int) -> int:
    if count < 1:
        raise AdmissionError(f"a count of rollouts starts at 1, got {count}")
    return count
