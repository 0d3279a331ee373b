"""Aggregation settings: how updates are weighted and the gateway is merged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fedmoe.experts import GATEWAY_SEED
from fedmoe.federation import plug_ins
from fedmoe.federation.online_gateway import OnlineGateway
from fedmoe.lora.adapter import initial_adapter
from fedmoe.lora.codec import digest
from fedmoe.lora.manifest import Manifest
from fedmoe.lora.merge import STRATEGIES_WITH_MOMENTS
from fedmoe.lora.moments import InputMoments
from fedmoe.lora.update_rules import RULES, STALENESS, UpdateRule, buffered
from fedmoe.runtime.errors import RefusedError

#: An update that would land with so many times the usual norm is held. After an outage an update holds many intervals
#: of learning: ten were up to 11 times the usual norm, 49 times in a long warm-up (`benchmarks/bench_update_norms.py`).
HOLD_NORM = 50.0


@dataclass(frozen=True, slots=True)
class Aggregation:
    """How updates are weighed and the gateway is made.

    `max_staleness` None accepts any age; `clip_norm` scales an update down to so many times the usual norm, None never.
    With `merge_after` experts are merged into the gateway and rebased onto it, each once it has trained so many steps;
    None merges it anew each time, and experts never take from it. `fold_staleness` is the decay by the merges since an
    expert's branch point. With
    `evaluation_gate` the gateway is what held-out losses let through, no view of the newest experts. An update that
    would land with more than `hold_norm` times the usual norm is held back; 0 holds none.
    """

    server_learning_rate: float = 1.0
    staleness: str = "polynomial"
    max_staleness: int | None = None
    server_optimizer: str = "sgd"
    buffer_size: int = 1
    clip_norm: float | None = None
    enable_gateway: bool = True
    strategy: str = "weighted_average"
    gateway_rank: int | None = None
    merge_after: int | None = None
    fold_staleness: str = "constant"
    evaluation_gate: bool = False
    hold_norm: float = HOLD_NORM

    def __post_init__(self) -> None:
        for option in ("staleness", "fold_staleness", "server_optimizer", "strategy"):
            value = getattr(self, option)
            if not plug_ins.load(option, value):
                raise ValueError(f"unknown {option} {value!r}; known: {', '.join(sorted(plug_ins.names(option)))}")
        if self.merge_after is not None and not (self.merge_after >= 1 and self.enable_gateway):
            raise ValueError(f"experts are merged after 1 step or more, into a gateway; got {self.merge_after}")

    @property
    def rule(self) -> UpdateRule:
        return buffered(RULES[self.server_optimizer], self.buffer_size)

    @property
    def plain_rule(self) -> bool:
        """Whether an update adds its delta times the coefficient to the weights, and nothing else."""
        return self.rule.name == "sgd"

    @property
    def uses_moments(self) -> bool:
        """Whether a gateway is made with the input moments of its experts; the gate tries such a strategy as well."""
        return self.merge_after is not None or self.evaluation_gate or self.strategy in STRATEGIES_WITH_MOMENTS

    @property
    def start_from(self) -> Literal["initial", "gateway"]:
        """Where experts start: from first weights of their own, or from the gateway."""
        return "initial" if self.merge_after is None else "gateway"

    def check_start(self, expected: Literal["initial", "gateway"] | None) -> None:
        """Refuse a worker that counts on another start than this federation's; None counts on none."""
        if expected not in (None, self.start_from):
            raise RefusedError(
                "start_mismatch",
                f"the experts of this federation start from: {self.start_from}; the worker asks for: {expected}.",
                f"Start the worker without --start-from, or the coordinator with --start-from {expected}.",
            )

    def first_gateway(self, manifest: Manifest) -> OnlineGateway | None:
        """The gateway before any merge, from which experts branch; None where they are never rebased onto it.

        Its A is the first one of every such expert: factors that began as one can be compared.
        """
        if self.merge_after is None:
            return None
        adapter = initial_adapter(manifest.layout, manifest.alpha, GATEWAY_SEED)
        return OnlineGateway(adapter, digest(adapter))

    def coefficient(self, staleness: int) -> float:
        """What a delta of this staleness is multiplied with, lr * s(tau)."""
        return self.server_learning_rate * STALENESS[self.staleness](staleness)


@dataclass(frozen=True, eq=False)
class ExpertMoments:
    """The input moments of all that an expert's workers train on, and the sha256 of their bytes as hex."""

    moments: InputMoments
    digest: str
