"""What is counted while a scheme runs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """The held-out loss of all experts (mean, nats per token) at a moment, and the bytes that had travelled by then."""

    seconds: float
    loss: float
    bytes_up: int
    bytes_down: int


@dataclass
class FleetTally:
    """Counts of one run. Bytes count once they have arrived; what an outage cut off counts as `cut_off` alone.

    `accepted` by the worker's number, `arrivals` by the second, `stored` are updates that went to the journal.
    """

    accepted: Counter[int] = field(default_factory=Counter)
    staleness: Counter[int] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    held: int = 0
    cut_off: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    stored: int = 0
    stored_bytes: int = 0
    steps: int = 0
    arrivals: Counter[int] = field(default_factory=Counter)
    longest_queue_seconds: float = 0.0
    rounds: int = 0
    curve: list[CurvePoint] = field(default_factory=list)

    def arrived(self, moment: float, size: int) -> None:
        """An update's bytes are with the coordinator."""
        self.arrivals[int(moment)] += 1
        self.bytes_up += size

    def landed(self, worker: int, staleness: int) -> None:
        """An update was accepted."""
        self.accepted[worker] += 1
        self.staleness[staleness] += 1
