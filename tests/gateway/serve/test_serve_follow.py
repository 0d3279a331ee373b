"""Following a coordinator: what fails changes nothing and is said."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import pytest
from builders import wait_until
from support import LAYOUT, MANIFEST, make_adapter

from fedmoe.gateway.serve.catalogue import Catalogue
from fedmoe.gateway.serve.version_watcher import VersionWatcher
from fedmoe.inference.backend import BackendError, ServedModel
from fedmoe.lora.adapter import Adapter
from fedmoe.lora.manifest import BaseModel, Manifest
from fedmoe.runtime.errors import RefusedError
from fedmoe.wire.client import CoordinatorUnavailableError, PulledExpert, PulledGateway
from fedmoe.wire.contract.experts import ExpertInfo, ExpertListing, GatewayInfo
from fedmoe.wire.contract.messages import StatisticsKind

OTHER_BASE = Manifest(BaseModel("other", "main", "e" * 64, "f" * 64), LAYOUT, 4.0)


@dataclass
class FakeSource:
    """A coordinator that is told what it has."""

    experts: dict[str, int] = field(default_factory=dict)
    gateway: int | None = None
    manifest: Manifest = MANIFEST
    lost: bool = False
    broken: set[str] = field(default_factory=set)
    pulls: list[str] = field(default_factory=list)
    prompts: dict[str, str] = field(default_factory=dict)

    def digest(self, name: str, version: int) -> str:
        return f"{abs(hash((name, version))):064x}"[:64]

    def list_experts(self) -> ExpertListing:
        if self.lost:
            raise CoordinatorUnavailableError("no answer")
        experts = [
            ExpertInfo(
                name=n,
                version=v,
                rank=2,
                alpha=4.0,
                parameters=1,
                base="b",
                digest=self.digest(n, v),
                workers=[],
                prompts=self.prompts.get(n),
            )
            for n, v in self.experts.items()
        ]
        return ExpertListing(experts=experts, gateway=self._info(), enable_gateway=True)

    def _info(self) -> GatewayInfo | None:
        if self.gateway is None:
            return None
        digest = self.digest("gateway", self.gateway)
        return GatewayInfo(
            version=self.gateway,
            strategy="sum",
            rank=2,
            parameters=1,
            modules=1,
            lora_A_shape=(1, 1),
            lora_B_shape=(1, 1),
            sources={},
            weights={},
            truncation_error=0.0,
            digest=digest,
        )

    def pull_expert(self, expert: str) -> PulledExpert | None:
        self.pulls.append(expert)
        if expert in self.broken:
            raise RefusedError("forbidden", "this token may not read it.")
        version = self.experts[expert]
        return PulledExpert(
            expert, version, self.digest(expert, version), self.manifest, make_adapter(version).flat, ""
        )

    def data_statistics(self, expert: str, kind: StatisticsKind) -> bytes:
        return f"{kind} of {expert}".encode()

    def pull_gateway(self) -> PulledGateway | None:
        assert self.gateway is not None
        base = {"weights_hash": self.manifest.base.weights_hash, "tokenizer_hash": self.manifest.base.tokenizer_hash}
        digest = self.digest("gateway", self.gateway)
        return PulledGateway(self.gateway, digest, make_adapter(self.gateway), {}, base, {})


@dataclass
class FakeBackend:
    """Remembers what it holds; refuses what it is told to."""

    held: set[ServedModel] = field(default_factory=set)
    refused: bool = False

    def load(self, model: ServedModel, adapter: Adapter) -> None:
        if self.refused:
            raise BackendError("no room")
        assert np.isfinite(adapter.flat).all()
        assert model not in self.held
        self.held.add(model)

    def unload(self, model: ServedModel) -> None:
        self.held.remove(model)

    def loaded(self) -> frozenset[ServedModel]:
        return frozenset(self.held)


@dataclass
class FakeRouter:
    """Remembers what it was told to route by; leaves out whom it is told to."""

    told: list[dict[str, str]] = field(default_factory=list)
    fetched: dict[str, bytes] = field(default_factory=dict)
    refused: set[str] = field(default_factory=set)

    @property
    def experts(self) -> tuple[str, ...]:
        return tuple(self.told[-1]) if self.told else ()

    def candidates(self, prompt: object) -> None:
        raise AssertionError("nobody asks")

    def follow(self, listed: Mapping[str, str], fetch: Callable[[str], bytes]) -> Mapping[str, str]:
        self.told.append(dict(listed))
        self.fetched |= {name: fetch(name) for name in listed}
        return dict.fromkeys(self.refused & set(listed), "too little")


@dataclass
class House:
    source: FakeSource = field(default_factory=lambda: FakeSource({"python": 1, "sql": 1}, 2))
    backend: FakeBackend = field(default_factory=FakeBackend)
    catalogue: Catalogue = field(default_factory=Catalogue)
    router: FakeRouter = field(default_factory=FakeRouter)
    now: float = 100.0

    def __post_init__(self) -> None:
        self.watcher = VersionWatcher(
            self.source,  # type: ignore[arg-type]  # the routes that are followed
            self.catalogue,
            self.backend,  # type: ignore[arg-type]  # no generations here
            MANIFEST.base,
            poll_seconds=1.0,
            clock=lambda: self.now,
            router=self.router,  # type: ignore[arg-type]  # only what it is asked for
        )

    def served(self) -> dict[str, int]:
        return {name: model.version for name, model in self.catalogue.snapshot.models.items()}


def test_everything_listed_is_served_and_old_versions_go() -> None:
    house = House()
    house.watcher.poll()
    assert house.served() == {"python": 1, "sql": 1, "gateway": 2}
    house.source.experts["python"], house.source.gateway = 2, 3
    house.watcher.poll()
    assert house.served() == {"python": 2, "sql": 1, "gateway": 3}
    assert house.backend.held == set(house.catalogue.snapshot.models.values())


def test_only_what_changed_is_fetched() -> None:
    house = House()
    house.watcher.poll()
    house.watcher.poll()
    house.source.experts["sql"] = 5
    house.watcher.poll()
    assert house.source.pulls == ["python", "sql", "sql"]


def test_a_lost_coordinator_leaves_everything_and_is_said() -> None:
    house = House()
    house.watcher.poll()
    house.source.lost, house.now = True, 130.0
    house.watcher._poll_safely()
    assert house.served() == {"python": 1, "sql": 1, "gateway": 2}
    assert house.watcher.health().behind == {"coordinator": "no answer"}
    assert house.watcher.health().seconds_since_answer == 30.0
    house.source.lost = False
    house.watcher._poll_safely()
    assert house.watcher.health().behind == {}
    assert house.watcher.health().seconds_since_answer == 0.0


def tag(mark: str) -> str:
    return mark * 64


def test_the_router_gets_the_statistics_of_what_is_served_when_they_change() -> None:
    house = House()
    house.watcher.poll()
    assert house.router.told == []
    house.source.prompts = {"python": tag("a"), "sql": tag("b")}
    house.source.experts["law"], house.source.broken = 1, {"law"}
    house.source.prompts["law"] = tag("c")
    house.watcher.poll()
    house.watcher.poll()
    assert house.router.told == [{"python": tag("a"), "sql": tag("b")}]
    assert house.router.fetched == {"python": b"prompts of python", "sql": b"prompts of sql"}
    house.source.prompts["sql"] = tag("d")
    del house.source.experts["law"], house.source.experts["python"]
    house.watcher.poll()
    assert house.router.told[1:] == [{"sql": tag("d")}]


def test_statistics_that_cannot_be_used_are_said_and_tried_again_later() -> None:
    house = House()
    house.source.prompts, house.router.refused = {"python": tag("a"), "sql": tag("b")}, {"sql"}
    house.watcher.poll()
    assert house.watcher.health().behind == {"prompts of sql": "too little"}
    house.now += 59
    house.watcher.poll()
    assert len(house.router.told) == 1
    house.router.refused, house.now = set(), house.now + 1
    house.watcher.poll()
    assert house.router.told[0] == house.router.told[1]
    assert house.watcher.health().behind == {}


def test_without_a_coordinator_there_is_no_start() -> None:
    house = House(FakeSource(lost=True))
    with pytest.raises(CoordinatorUnavailableError):
        house.watcher.poll()


@pytest.mark.parametrize("why", ["pull", "load", "base"])
def test_a_version_that_fails_leaves_the_old_one_and_is_tried_again_more_and_more_seldom(why: str) -> None:
    house = House()
    house.watcher.poll()
    house.source.experts["python"] = 2
    house.source.broken = {"python"} if why == "pull" else set()
    house.backend.refused = why == "load"
    house.source.manifest = OTHER_BASE if why == "base" else MANIFEST
    house.watcher.poll()
    assert house.served() == {"python": 1, "sql": 1, "gateway": 2}
    assert set(house.watcher.health().behind) == {"python"}
    tries = []
    for _ in range(200):
        house.now += 1
        before = len(house.source.pulls)
        house.watcher.poll()
        if len(house.source.pulls) > before:
            tries.append(house.now)
    pauses = np.diff(tries)
    assert (np.diff(pauses[:4]) > 0).all()
    assert max(pauses) <= 60
    house.source.broken, house.backend.refused, house.source.manifest = set(), False, MANIFEST
    house.now += 61
    house.watcher.poll()
    assert house.served()["python"] == 2
    assert house.watcher.health().behind == {}


def test_one_that_fails_does_not_hold_up_the_others() -> None:
    house = House()
    house.source.broken = {"python"}
    house.watcher.poll()
    assert house.served() == {"sql": 1, "gateway": 2}


def test_weights_for_another_base_model_are_refused_by_name() -> None:
    house = House(FakeSource({"python": 1}, None, OTHER_BASE))
    house.watcher.poll()
    assert house.served() == {}
    assert "eeeeeeeeeeeeeeee" in house.watcher.health().behind["python"]


def test_the_same_version_number_with_other_content_is_another_version() -> None:
    house = House()
    house.watcher.poll()
    before = house.catalogue.snapshot.models["python"]
    house.source.digest = lambda name, version: "9" * 64  # type: ignore[method-assign]
    house.watcher.poll()
    after = house.catalogue.snapshot.models["python"]
    assert (after.version, after.digest) == (before.version, "9" * 64)
    assert before not in house.backend.held


def test_experts_with_a_reserved_name_are_left_out() -> None:
    house = House(FakeSource({"auto": 1, "base": 2, "law": 3}))
    house.watcher.poll()
    assert house.served() == {"law": 3}


def test_nothing_is_routed_to_an_expert_that_is_named_like_the_gateway() -> None:
    house = House(FakeSource({"gateway": 1, "law": 3, "sql": 1}, gateway=2))
    house.source.prompts = {"gateway": tag("a"), "law": tag("b"), "sql": tag("c")}
    house.watcher.poll()
    assert house.served() == {"gateway": 2, "law": 3, "sql": 1}
    assert house.router.told == [{"law": tag("b"), "sql": tag("c")}]


def test_the_thread_goes_on_and_unloads_when_the_last_lease_ends() -> None:
    house = House()
    house.watcher._poll_seconds = 0.01
    house.watcher.poll()
    house.watcher.start()
    with house.catalogue.lease("python") as (old, _):
        house.source.experts["python"] = 2
        wait_until(lambda: house.served()["python"] == 2)
        assert old in house.backend.held
    wait_until(lambda: old not in house.backend.held)
    house.watcher.close()
