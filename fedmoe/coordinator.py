"""The coordinator without I/O: published experts, transactions on them, and the gateway made of them.

`CentralCoordinator` publishes an immutable mapping of experts. A change is worked out in a `Transaction`, written to
the journal by whoever owns one, and only then published; one that cannot be written is dropped without effect.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType

from fedmoe.experts import ExpertModel, expert_named, seed_of
from fedmoe.federation.aggregation import Aggregation, ExpertMoments
from fedmoe.federation.events import UpdateAccepted, UpdateHeld
from fedmoe.federation.gateway_members import left_out, left_out_of_online_gateway, members
from fedmoe.federation.online_gateway import OnlineGateway
from fedmoe.federation.quarantine import Quarantine
from fedmoe.federation.transaction import Submission, Transaction
from fedmoe.lora.adapter import Adapter, FloatVector, Layout
from fedmoe.lora.algebra import exact_rank
from fedmoe.lora.codec import digest
from fedmoe.lora.kept_terms import KeptTerms
from fedmoe.lora.manifest import Manifest
from fedmoe.lora.merge import STRATEGIES_WITH_MOMENTS, merge, plan_merge
from fedmoe.runtime.errors import RefusedError

__all__ = [
    "ONLINE_STRATEGY",
    "Aggregation",
    "CentralCoordinator",
    "ExpertMoments",
    "GatewayModel",
    "GatewayPlan",
    "Submission",
    "Transaction",
    "seed_of",
]

#: What the gateway is made with while an expert lacks the input moments that the chosen strategy needs.
WITHOUT_MOMENTS = "scaled"
#: The strategy by name where experts are rebased onto the gateway.
ONLINE_STRATEGY = "living"
#: With moments and without a rank given, the gateway keeps this share of every module's energy, at rank 64 or less.
ENERGY = 0.99


@dataclass(frozen=True, kw_only=True)
class GatewayPlan:
    """What a gateway is made of and how, known before its weights are merged: a view of `{expert: version}`.

    `scale` is the factor on the whole product, where the strategy has one; `statistics` are the digests of the input
    moments it is made with, by expert, and `statistics_tokens` how many tokens those of each expert rest on;
    `strategy` is the one that is used, and `notes` say in words where that is not the one asked for, or where moments
    are thin. `online_gateway` is set where experts are rebased onto it; `source_digests` are the content hashes of the
    `sources`, where they are known; `left_out` says why an expert is no part of it, by name. `layout` is None where the
    merge chooses the rank, by the energy that it keeps.
    """

    version: int
    sources: Mapping[str, int]
    weights: Mapping[str, float]
    strategy: str
    statistics: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    notes: tuple[str, ...] = ()
    scale: float = 1.0
    online_gateway: OnlineGateway | None = None
    statistics_tokens: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    source_digests: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    left_out: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    layout: Layout | None = None

    @classmethod
    def of_experts(
        cls,
        version: int,
        experts: Mapping[str, ExpertModel],
        aggregation: Aggregation,
        moments: Mapping[str, ExpertMoments] = MappingProxyType({}),
        scale: float | None = None,
    ) -> GatewayPlan:
        """The plan for the experts that learned something, as they are now; without any there is nothing to merge.

        Where the strategy needs `moments` and an expert has none, it is `WITHOUT_MOMENTS` instead, and `notes` say so.
        `scale` None is the strategy's own.
        """
        without = left_out(experts, aggregation.buffer_size)
        most = aggregation.gateway_rank
        if len(without) == len(experts):
            layout = next(expert for expert in experts.values() if not expert.retired).manifest.layout
            return cls(
                version=version,
                sources={},
                weights={},
                strategy=aggregation.strategy,
                left_out=without,
                layout=layout.with_rank(min(layout.rank, most or layout.rank)),
            )
        experts = members(experts, aggregation.buffer_size)
        moments = _of_members(moments, experts)
        adapters = {name: expert.adapter for name, expert in experts.items()}
        plan = plan_merge(
            adapters,
            aggregation.strategy,
            scale=scale,
            tokens=_tokens(moments),
            without_moments=WITHOUT_MOMENTS,
        )
        with_moments = plan.strategy in STRATEGIES_WITH_MOMENTS
        rank = exact_rank(list(adapters.values()))
        layout = next(iter(adapters.values())).layout.with_rank(min(rank, most or rank))
        return cls(
            version=version,
            sources=MappingProxyType({name: expert.version for name, expert in experts.items()}),
            weights=MappingProxyType(dict(plan.weights)),
            strategy=plan.strategy,
            statistics=MappingProxyType(
                {name: of_expert.digest for name, of_expert in moments.items()} if with_moments else {}
            ),
            notes=plan.notes,
            scale=plan.scale,
            statistics_tokens=_tokens(moments),
            source_digests=MappingProxyType({name: expert.digest for name, expert in experts.items()}),
            left_out=without,
            layout=None if with_moments and most is None else layout,
        )


@dataclass(frozen=True, kw_only=True)
class GatewayModel(GatewayPlan):
    """The model made of all experts: its plan and the merged weights, reproducible from the sources by hash."""

    adapter: Adapter
    truncation_error: float
    digest: str

    @classmethod
    def build(
        cls,
        version: int,
        experts: Mapping[str, ExpertModel],
        aggregation: Aggregation,
        moments: Mapping[str, ExpertMoments] = MappingProxyType({}),
        scale: float | None = None,
        kept: KeptTerms | None = None,
    ) -> GatewayModel:
        """Merge the experts that learned something as they are now; without any it does what the base model does.

        `gateway_rank` None keeps the merge exact; one with moments keeps `ENERGY` of it. What `kept` has of an earlier
        merge is not computed again.
        """
        plan = GatewayPlan.of_experts(version, experts, aggregation, moments, scale)
        if not plan.sources:
            assert plan.layout is not None
            return cls.of_plan(plan, Adapter.zeros(plan.layout, plan.layout.rank), 0.0)
        experts = members(experts, aggregation.buffer_size)
        with_moments = plan.strategy in STRATEGIES_WITH_MOMENTS
        merged = merge(
            {name: expert.adapter for name, expert in experts.items()},
            aggregation.strategy,
            rank=aggregation.gateway_rank,
            energy=ENERGY if with_moments and aggregation.gateway_rank is None else None,
            scale=scale,
            moments={name: of_expert.moments for name, of_expert in _of_members(moments, experts).items()},
            without_moments=WITHOUT_MOMENTS,
            kept=kept,
        )
        return cls.of_plan(plan, merged.adapter, merged.truncation_error)

    @classmethod
    def of_plan(cls, plan: GatewayPlan, adapter: Adapter, truncation_error: float) -> GatewayModel:
        """The gateway that was merged as planned."""
        facts = {facet.name: getattr(plan, facet.name) for facet in fields(GatewayPlan)} | {"layout": adapter.layout}
        return cls(adapter=adapter, truncation_error=truncation_error, digest=digest(adapter), **facts)

    @classmethod
    def of_online_gateway(
        cls, gateway: OnlineGateway, version: int, moments: Mapping[str, ExpertMoments] = MappingProxyType({})
    ) -> GatewayModel:
        """The gateway that experts are rebased onto, after its last merge and with the version of that merge.

        Before the first one it does what the base model does, and its version is the one given.
        """
        last = gateway.last
        return cls(
            adapter=gateway.adapter,
            version=last.version if last else version,
            sources=gateway.sources,
            weights=gateway.weights,
            strategy=ONLINE_STRATEGY,
            truncation_error=last.truncation_error if last else 0.0,
            digest=gateway.digest,
            notes=last.notes if last else (),
            layout=gateway.adapter.layout,
            online_gateway=gateway,
            statistics_tokens=_tokens(moments),
        )


def _of_members(moments: Mapping[str, ExpertMoments], experts: Mapping[str, ExpertModel]) -> dict[str, ExpertMoments]:
    return {name: moments[name] for name in sorted(experts.keys() & moments.keys())}


def _tokens(moments: Mapping[str, ExpertMoments]) -> Mapping[str, int]:
    return MappingProxyType({name: moments[name].moments.tokens for name in sorted(moments)})


class CentralCoordinator:
    """The experts of a federation and the gateway made of them, as one consistent view for any number of readers.

    One writer at a time changes and publishes; readers take `experts` or `gateway()` whenever they like.
    """

    def __init__(self, aggregation: Aggregation | None = None, enable_gateway: bool | None = None) -> None:
        self.aggregation = aggregation or Aggregation()
        if enable_gateway is not None:
            self.aggregation = replace(self.aggregation, enable_gateway=enable_gateway)
        # Swapped as one: no reader sees half a change.
        self._published = Transaction(self.aggregation, {}, None, 0)
        self._gateway: GatewayModel | None = None
        self._plan: GatewayPlan | None = None
        self._kept = KeptTerms()
        self._building = threading.Lock()

    @property
    def experts(self) -> Mapping[str, ExpertModel]:
        """All experts by name, as last published."""
        return MappingProxyType(self._published.experts)

    @property
    def manifest(self) -> Manifest | None:
        """What all experts share; None before the first one."""
        return self._published.manifest

    @property
    def active(self) -> Mapping[str, ExpertModel]:
        """Those that are not retired."""
        return {name: expert for name, expert in self.experts.items() if not expert.retired}

    @property
    def gateway_version(self) -> int:
        """Rises with every accepted update, and with every other change of what the gateway is made of."""
        return self._published.gateway_version

    @property
    def quarantine(self) -> Quarantine:
        """What is held back, as last published."""
        return self._published.quarantine

    def transaction(self) -> Transaction:
        """A working copy to decide changes on."""
        return self._published.savepoint()

    def publish(self, transaction: Transaction) -> None:
        """Make a transaction what all readers see."""
        self._published = replace(transaction.savepoint(), events=[], version_digests=[])

    def expert(self, name: str) -> ExpertModel:
        """The expert, or a refusal that lists which there are."""
        return expert_named(self.experts, name)

    def register_expert(self, name: str, manifest: Manifest, seed: int | None = None, at: float = 0.0) -> ExpertModel:
        """Make an expert, or get the one there is; for use inside one process."""
        transaction = self.transaction()
        expert = transaction.register(name, "local", manifest, seed, at)
        self.publish(transaction)
        return expert

    def push_update(self, submission: Submission, delta: FloatVector, at: float = 0.0) -> UpdateAccepted | UpdateHeld:
        """Land an update as the committer does, or hold it; for use inside one process."""
        transaction = self.transaction()
        update = transaction.land(submission, delta, at, size=delta.nbytes)
        self.publish(transaction)
        return update

    @property
    def built(self) -> GatewayModel | None:
        """The gateway that was built last, perhaps of an older state; None before the first one."""
        return self._gateway

    def gateway(self) -> GatewayModel:
        """The gateway of the newest state, merged when first asked for and kept until something changes."""
        with self._building:
            view = self._gateway_view()
            if self._gateway is None or self._gateway.version != view.gateway_version:
                self._gateway = self._build(view)
            return self._gateway

    def gateway_plan(self) -> GatewayPlan:
        """What the gateway of the newest state is made of, without merging it: its model where that is there."""
        view, built, plan = self._gateway_view(), self._gateway, self._plan
        if view.online_gateway is not None:
            return self.gateway()
        if built is not None and built.version == view.gateway_version:
            return built
        if plan is None or plan.version != view.gateway_version:
            self._plan = plan = GatewayPlan.of_experts(
                view.gateway_version, view.experts, self.aggregation, view.moments
            )
        return plan

    def _gateway_view(self) -> Transaction:
        """What is published; refused where no gateway can be made of it."""
        if not self.aggregation.enable_gateway:
            raise RefusedError(
                "gateway_disabled",
                "this coordinator runs without a gateway (enable_gateway is off).",
                "Start it with --enable-gateway, or pull the experts one by one.",
            )
        view = self._published
        if all(expert.retired for expert in view.experts.values()):
            raise RefusedError(
                "gateway_not_initialised",
                "the gateway is made of experts and there is none yet.",
                "Start at least one worker, or register an expert with 'fedmoe experts create'.",
            )
        return view

    def _build(self, view: Transaction) -> GatewayModel:
        if view.online_gateway is None:
            return GatewayModel.build(
                view.gateway_version, view.experts, self.aggregation, view.moments, kept=self._kept
            )
        model = GatewayModel.of_online_gateway(view.online_gateway, view.gateway_version, view.moments)
        return replace(model, left_out=left_out_of_online_gateway(view.experts, view.online_gateway))
