"""A house whose gateway lives, and what tests ask of it."""

from __future__ import annotations

from collections.abc import Callable

from crash_house import House
from reported_data import moments as input_moments

from fedmoe.coordinator import Aggregation, ExpertMoments, GatewayModel, Transaction
from fedmoe.federation.events import GatewayMerged
from fedmoe.federation.online_gateway import OnlineGateway
from fedmoe.lora.adapter import Adapter
from fedmoe.lora.algebra import product_norm, stack

ONLINE = Aggregation(merge_after=3, fold_staleness="polynomial")


def open_online(aggregation: Aggregation = ONLINE, **options: object) -> House:
    opened = House.open(aggregation, merges_by_itself=False, **options)  # type: ignore[arg-type]
    opened.register("python")
    opened.register("sql")
    return opened


def online_gateway_of(house: House) -> OnlineGateway:
    found = house.service.coordinator.transaction().online_gateway
    assert found is not None
    return found


def gateway(house: House) -> GatewayModel:
    return house.service.gateway()


def moments(seed: int) -> ExpertMoments:
    return ExpertMoments(input_moments(seed), str(seed))


def gateway_merges(house: House) -> list[GatewayMerged]:
    return [event for event in house.journal.events() if isinstance(event, GatewayMerged)]


def difference(left: Adapter, right: Adapter) -> float:
    """The norm of the difference of two products, relative to the left one's."""
    return product_norm(stack([(1.0, left), (-1.0, right)])) / product_norm(left)


def interrupted_merge(house: House, meanwhile: Callable[[], object]) -> None:
    """A fold during which something happens between the computing and the decision."""
    background_merge = house.service._background_merge
    plan = background_merge._plan()
    assert plan is not None
    folded = background_merge._compute(plan)
    meanwhile()
    background_merge._publish(plan, folded, 0.5)


def learn(house: House, **told: ExpertMoments) -> None:
    def decide(transaction: Transaction) -> None:
        for name, found in told.items():
            transaction.learn_moments(name, found)

    house.service.committer.submit(decide).result(10)
