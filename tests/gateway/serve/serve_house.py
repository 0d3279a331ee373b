"""A coordinator with experts for the tiny model, and a server that follows it, both listening on loopback."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import openai
from live import House, listening, open_house
from support import make_submission

from fedmoe.gateway.serve.app import Endpoint, backend_maker, open_server
from fedmoe.gateway.serve.auto_model import PromptRouter
from fedmoe.gateway.serve.service import Limits, Service
from fedmoe.gateway.serve.version_watcher import VersionWatcher
from fedmoe.inference.backend import Backend
from fedmoe.lora.adapter import Adapter, Layout, ModuleShape
from fedmoe.lora.manifest import Manifest
from fedmoe.models.base import LoadedBase, load_base
from fedmoe.models.lora_layers import ALL_LINEAR, find_targets
from fedmoe.models.multilora import MultiLora
from fedmoe.models.sampling import SampleSpec, sample
from fedmoe.wire.client import CoordinatorClient

EXPERTS = ("python", "sql")
#: The official client; its overloads refuse settings that come as a dictionary, and wrong ones are tested too.
Client = Any


def tiny() -> LoadedBase:
    return load_base("tiny", device="cpu", dtype="fp32")


@cache
def tiny_layout(rank: int = 4) -> Layout:
    """All linear layers of the tiny model."""
    found = find_targets(tiny().model, ALL_LINEAR)
    return Layout(tuple(ModuleShape(name, layer.in_features, layer.out_features) for name, layer in found), rank)


def tiny_adapter(seed: int, rank: int = 4, spread: float = 0.1) -> Adapter:
    """A and B both away from zero."""
    layout = tiny_layout(rank)
    flat = np.random.default_rng(seed).normal(0.0, spread, layout.size).astype(np.float32)
    return Adapter(layout, 2.0 * rank, flat)


def tiny_manifest() -> Manifest:
    return Manifest(tiny().identity, tiny_layout(), 8.0)


class Alone:
    """What one adapter by itself answers: the model, freshly loaded, with nobody else in the batch."""

    def __init__(self) -> None:
        self.base = tiny()
        self.multi = MultiLora(self.base.model)

    def tokens(self, adapter: Adapter | None, prompt: Sequence[int], count: int) -> tuple[int, ...]:
        """The likeliest continuation, as the house's own sampler finds it."""
        if adapter is not None:
            self.multi.add("only", adapter)
        wanted = SampleSpec(None if adapter is None else "only", tuple(prompt), count, 0.0, 0)
        (found,) = sample(self.base.model, self.multi, [wanted], frozenset({self.base.tokenizer.eos_token_id}))
        if adapter is not None:
            self.multi.remove("only")
        return found.tokens

    def text(self, tokens: Sequence[int]) -> str:
        return str(self.base.tokenizer.decode(list(tokens), skip_special_tokens=True))

    def chat(self, content: str) -> list[int]:
        turns = [{"role": "user", "content": content}]
        text = self.base.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return list(self.base.tokenizer(text, add_special_tokens=False)["input_ids"])


@dataclass
class Served:
    """A running server, its coordinator, and every adapter there ever was, by digest."""

    url: str
    house: House
    service: Service
    watcher: VersionWatcher
    adapters: dict[str, Adapter] = field(default_factory=dict)

    @property
    def backend(self) -> Backend:
        return self.service.backend

    def client(self, key: str = "none") -> Client:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=120)

    def push(self, expert: str, seed: int) -> None:
        """A new version of an expert, and so of the gateway."""
        coordinator = self.house.service.coordinator
        version = coordinator.expert(expert).version
        delta = np.random.default_rng(seed).normal(0.0, 0.1, tiny_layout().size).astype(np.float32)
        coordinator.push_update(make_submission(expert, version, seed), delta)
        self.note()

    def note(self) -> None:
        """Remember what there is now."""
        coordinator = self.house.service.coordinator
        for expert in coordinator.experts.values():
            self.adapters[expert.digest] = expert.adapter
        gateway = coordinator.gateway()
        self.adapters[gateway.digest] = gateway.adapter


@contextmanager
def serving(
    folder: Path,
    limits: Limits,
    rows: int = 8,
    keys: frozenset[str] | None = None,
    poll_seconds: float = 0.02,
    router: object = None,
) -> Iterator[Served]:
    """A server for two experts whose adapters are away from zero; `router` stands for a `PromptRouter`."""
    with open_house(folder) as house:
        house.register(*EXPERTS, manifest=tiny_manifest())
        with listening(house.app) as coordinator, CoordinatorClient(coordinator.url, attempts=1) as api:
            served = Served("", house, None, None)  # type: ignore[arg-type]  # filled in below
            for seed, expert in enumerate(EXPERTS):
                served.push(expert, 100 + seed)
            gate = Endpoint("127.0.0.1", 0, keys, keys is None)
            maker = backend_maker(rows, None)
            with open_server(
                api, tiny_manifest(), tiny(), maker, limits, gate, poll_seconds, cast("PromptRouter | None", router)
            ) as running:
                served.service, served.watcher = running.service, running.watcher
                with listening(running.app) as server:
                    served.url = server.url
                    yield served
