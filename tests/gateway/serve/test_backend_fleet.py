"""Several vLLM servers behind one gateway server: a version for all of them or none, and no answer lost with one."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest
from fake_vllm import make_adapter
from streaming_vllm import StreamingFakeVllm, fake_backend

from fedmoe.inference.backend import BackendError, ContinuationRequest, DecodingStep, SamplingOptions, ServedModel
from fedmoe.inference.backend_fleet import BackendFleet

PYTHON, NEWER = ServedModel("python", 1, "a" * 64), ServedModel("python", 2, "b" * 64)
GREEDY = SamplingOptions(6, temperature=0.0)


@dataclass
class MistakenVllm(StreamingFakeVllm):
    """While `mistaken`, adapters that are loaded become other weights than those in their folders."""

    mistaken: bool = False

    def _load(self, name: str, path: str) -> httpx2.Response:
        answer = super()._load(name, path)
        if self.mistaken:
            self._cache[name, path] = -self._cache[name, path]
        return answer


class Servers:
    """Three servers as one backend, on a clock that stands still."""

    def __init__(self, folder: Path) -> None:
        self.now = 100.0
        self.fakes = [MistakenVllm(logprobs_mode="raw_logprobs") for _ in range(3)]
        backends = [fake_backend(fake, folder / str(number)) for number, fake in enumerate(self.fakes)]
        self.fleet = BackendFleet(backends, lambda: self.now)

    def streams(self) -> list[int]:
        """How many streams each server was asked for."""
        return [sum(bool(body.get("stream")) for body in fake.bodies("/v1/completions")) for fake in self.fakes]

    def answer(self, model: ServedModel = PYTHON) -> list[int | None]:
        async def run() -> list[DecodingStep]:
            return [step async for step in self.fleet.generate(ContinuationRequest(model, (3, 1, 4), GREEDY))]

        return [step.token for step in asyncio.run(run())]


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[Servers]:
    opened = Servers(tmp_path)
    yield opened
    opened.fleet.close()


def test_a_version_that_one_server_computes_otherwise_is_on_none_of_them(servers: Servers) -> None:
    servers.fleet.load(PYTHON, make_adapter(1))
    before = [set(fake.adapters) for fake in servers.fakes]
    servers.fakes[2].mistaken = True
    with pytest.raises(BackendError, match=r"replica 3 of 3: python@2.* nats off"):
        servers.fleet.load(NEWER, make_adapter(2))
    assert servers.fleet.loaded() == {PYTHON}
    assert [set(fake.adapters) for fake in servers.fakes] == before
    assert servers.answer()
    servers.fakes[2].mistaken = False
    servers.fleet.load(NEWER, make_adapter(2))
    assert servers.fleet.loaded() == {PYTHON, NEWER}


def test_requests_go_to_the_server_with_the_least_to_do(servers: Servers) -> None:
    servers.fleet.load(PYTHON, make_adapter(1))
    request = ContinuationRequest(PYTHON, (3, 1, 4), GREEDY)

    async def three_at_once() -> None:
        generations = [servers.fleet.generate(request) for _ in range(3)]
        for generation in generations:
            await anext(generation)
        assert servers.streams() == [1, 1, 1]
        for generation in generations:
            async with aclosing(generation):
                pass

    asyncio.run(three_at_once())


def test_a_server_that_fails_loses_no_answer_and_is_left_alone_for_a_while(servers: Servers) -> None:
    servers.fleet.load(PYTHON, make_adapter(1))
    expected = servers.answer()
    servers.fakes[0].cut = 0
    asked = servers.streams()[0]
    assert [servers.answer() for _ in range(3)] == [expected] * 3
    assert servers.streams()[0] == asked + 1
    servers.fakes[0].cut = None
    servers.now += 11.0
    assert servers.answer() == expected
    assert servers.streams()[0] == asked + 2


def test_an_answer_that_has_begun_is_not_begun_again(servers: Servers) -> None:
    servers.fleet.load(PYTHON, make_adapter(1))
    for fake in servers.fakes:
        fake.cut = 1
    with pytest.raises(BackendError, match="ended before its text did"):
        servers.answer()
    assert sum(servers.streams()) == 1


def test_where_all_servers_fail_the_last_one_says_why(servers: Servers) -> None:
    servers.fleet.load(PYTHON, make_adapter(1))
    for fake in servers.fakes:
        fake.cut = 0
    with pytest.raises(BackendError, match="ended before its text did"):
        servers.answer()
    assert servers.streams() == [1, 1, 1]
