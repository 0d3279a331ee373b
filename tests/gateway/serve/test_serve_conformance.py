"""What every backend of the server does, whatever it runs on: one suite over all implementations."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import fake_vllm
import numpy as np
import pytest
from serve_house import tiny, tiny_adapter
from streaming_vllm import StreamingFakeVllm, fake_backend

from fedmoe.gateway.serve.app import VllmAddress, backend_maker
from fedmoe.inference.backend import (
    Backend,
    BackendError,
    ContinuationRequest,
    DecodingStep,
    SamplingOptions,
    ServedModel,
)
from fedmoe.inference.backend_fleet import BackendFleet
from fedmoe.inference.batching.scheduler import TransformersBackend
from fedmoe.inference.vllm.server import SERVED_NAME, VllmServer
from fedmoe.lora.adapter import Adapter, Layout, ModuleShape
from fedmoe.lora.manifest import Manifest
from fedmoe.models.base import load_base
from fedmoe.models.lora_layers import ALL_LINEAR, find_targets

ONE, TWO = ServedModel("python", 3, "a" * 64), ServedModel("sql", 1, "b" * 64)
GREEDY = SamplingOptions(8, temperature=0.0)


@dataclass(frozen=True)
class Bench:
    """A backend under test: random adapters by seed for its model, and prompts."""

    backend: Backend
    adapter: Callable[[int], Adapter]
    prompts: tuple[tuple[int, ...], ...]
    tolerance: float
    misfit: Adapter
    own_likelihoods: bool = True

    def load(self, *models: ServedModel) -> None:
        for seed, model in enumerate(models):
            self.backend.load(model, self.adapter(seed))

    def steps(self, *wanted: ContinuationRequest) -> list[list[DecodingStep]]:
        """All generations at once, each to its end."""

        async def one(generation: ContinuationRequest) -> list[DecodingStep]:
            return [step async for step in self.backend.generate(generation)]

        async def together() -> list[list[DecodingStep]]:
            return await asyncio.gather(*(one(generation) for generation in wanted))

        return asyncio.run(together())

    def wanted(
        self, model: ServedModel | None, sampling: SamplingOptions = GREEDY, prompt: int = 0
    ) -> ContinuationRequest:
        return ContinuationRequest(model, self.prompts[prompt], sampling)


def fake_bench(folder: Path) -> Bench:
    fake = StreamingFakeVllm(logprobs_mode="raw_logprobs")
    backend = fake_backend(fake, folder)
    misfit = fake_vllm.make_adapter(1, rank=fake.max_rank + 1)
    return Bench(backend, fake_vllm.make_adapter, ((3, 1, 4, 1, 5), (9, 2, 6, 5, 3, 5), (8, 9, 7)), 1e-4, misfit)


def transformers_bench(_: Path) -> Bench:
    base = tiny()
    modules = [module.name for module in tiny_adapter(0).layout.modules]
    prompts = (tuple(range(60, 70)), tuple(range(90, 118)), tuple(range(97, 102)))
    shape = (np.zeros((2, 5), np.float32), np.zeros((7, 2), np.float32))
    misfit = Adapter.from_factors({"elsewhere": shape}, 2.0)
    backend = TransformersBackend(base, modules, rows=3)
    return Bench(backend, lambda seed: tiny_adapter(seed, 3 + seed), prompts, 1e-4, misfit)


def vllm_bench(folder: Path, server: VllmServer) -> Bench:
    """The embedded model; this server gives log-probabilities after temperature."""
    base = load_base("smollm2", device="cpu", dtype="fp32")
    found = find_targets(base.model, ALL_LINEAR)
    layout = Layout(tuple(ModuleShape(name, layer.in_features, layer.out_features) for name, layer in found), 8)
    address = VllmAddress(server.url, SERVED_NAME, folder, None)
    backend = backend_maker(3, address)(base, Manifest(base.identity, layout, 16.0))

    def adapter(seed: int, rank: int = 8) -> Adapter:
        flat = np.random.default_rng(seed).normal(0.0, 0.02, layout.with_rank(rank).size).astype(np.float32)
        return Adapter(layout.with_rank(rank), 2.0 * rank, flat)

    prompts = (tuple(range(504, 520)), tuple(range(1000, 1024)), tuple(range(2000, 2012)))
    return Bench(backend, adapter, prompts, 1e-3, adapter(1, rank=9), own_likelihoods=False)


def fleet_bench(folder: Path) -> Bench:
    one = fake_bench(folder / "1")
    return replace(one, backend=BackendFleet([one.backend, fake_bench(folder / "2").backend]))


@pytest.fixture(params=["fake", "fleet", "transformers", pytest.param("vllm", marks=pytest.mark.vllm)])
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bench]:
    if request.param == "vllm":
        made = vllm_bench(tmp_path, request.getfixturevalue("live_vllm"))
    else:
        made = {"fake": fake_bench, "fleet": fleet_bench, "transformers": transformers_bench}[request.param](tmp_path)
    yield made
    made.backend.close()


def tokens_of(steps: Sequence[DecodingStep]) -> list[int]:
    return [step.token for step in steps if step.token is not None]


def test_a_backend_holds_what_was_loaded_until_it_is_unloaded(bench: Bench) -> None:
    assert bench.backend.loaded() == frozenset()
    bench.load(ONE, TWO)
    assert bench.backend.loaded() == {ONE, TWO}
    bench.backend.unload(ONE)
    assert bench.backend.loaded() == {TWO}


def test_how_likely_a_text_is_under_each_model_is_what_its_tokens_are_together(bench: Bench) -> None:
    bench.load(ONE, TWO)
    text = bench.prompts[0]
    first, second, again = bench.backend.log_likelihoods([(text, ONE), (text, TWO), (text, ONE)])
    assert first == pytest.approx(again, abs=bench.tolerance)
    assert abs(first - second) > 100 * bench.tolerance
    parts = [bench.backend.log_likelihoods([(text[: end + 1], ONE)])[0] for end in range(len(text))]
    assert parts[0] == 0.0
    assert all(later < before for before, later in pairwise(parts))
    assert parts[-1] == pytest.approx(first, abs=bench.tolerance)


def test_texts_of_different_lengths_are_as_likely_together_as_alone(bench: Bench) -> None:
    bench.load(ONE, TWO)
    pairs = [(bench.prompts[0][:end], model) for end in (3, 1, len(bench.prompts[0]), 2) for model in (TWO, ONE)]
    alone = [bench.backend.log_likelihoods([pair])[0] for pair in pairs]
    assert bench.backend.log_likelihoods(pairs) == pytest.approx(alone, abs=bench.tolerance)


def test_the_likelihood_under_a_version_that_is_not_loaded_is_refused(bench: Bench) -> None:
    bench.load(ONE)
    with pytest.raises(BackendError, match="sql@1"):
        bench.backend.log_likelihoods([(bench.prompts[0], ONE), (bench.prompts[0], TWO)])


def test_a_version_is_loaded_once_and_unloaded_once(bench: Bench) -> None:
    bench.load(ONE)
    with pytest.raises(BackendError, match="python@3"):
        bench.backend.load(ONE, bench.adapter(5))
    with pytest.raises(BackendError, match="sql@1"):
        bench.backend.unload(TWO)
    bench.backend.unload(ONE)
    bench.backend.load(ONE, bench.adapter(5))


def test_a_version_that_is_not_loaded_is_refused_by_name(bench: Bench) -> None:
    bench.load(ONE)
    with pytest.raises(BackendError, match="sql@1"):
        bench.steps(bench.wanted(TWO))


def test_only_the_last_step_says_that_it_is_the_last(bench: Bench) -> None:
    bench.load(ONE)
    for prompt in range(3):
        for most in (1, 2, 7):
            (steps,) = bench.steps(bench.wanted(ONE, SamplingOptions(most, 1.0, 1.0, seed=prompt), prompt))
            assert [step.finish for step in steps[:-1]] == [None] * (len(steps) - 1)
            assert steps[-1].finish in ("stop", "length")
            assert 1 <= len(tokens_of(steps)) <= most
            assert (steps[-1].finish == "length") <= (len(tokens_of(steps)) == most)


def test_nobody_gets_other_tokens_because_of_who_else_is_there(bench: Bench) -> None:
    bench.load(ONE, TWO)
    wanted = [
        bench.wanted(model, SamplingOptions(most, temperature, 1.0, seed), prompt)
        for model in (ONE, TWO, None)
        for prompt in range(3)
        for most, temperature, seed in ((3, 0.0, 0), (11, 0.8, prompt), (20, 0.0, 0))
    ]
    alone = [bench.steps(one)[0] for one in wanted]
    assert [tokens_of(steps) for steps in bench.steps(*wanted)] == [tokens_of(steps) for steps in alone]
    assert len({tuple(tokens_of(steps)) for steps in alone}) > 9


def test_the_seed_fixes_the_draw(bench: Bench) -> None:
    bench.load(ONE)
    wanted = [bench.wanted(ONE, SamplingOptions(8, 1.0, 1.0, seed)) for seed in (*range(6), *range(6))]
    drawn = [tokens_of(steps) for steps in bench.steps(*wanted)]
    assert drawn[:6] == drawn[6:]
    assert len({tuple(tokens) for tokens in drawn}) > 1


def test_a_nucleus_of_one_token_is_greedy(bench: Bench) -> None:
    bench.load(ONE)
    greedy, nucleus = bench.steps(bench.wanted(ONE), bench.wanted(ONE, SamplingOptions(8, 1.5, 1e-6, seed=4)))
    assert tokens_of(greedy) == tokens_of(nucleus)


def test_likelihoods_are_those_of_the_model_whatever_the_temperature(bench: Bench) -> None:
    bench.load(ONE)
    found = []
    for temperature in (0.0, 1.9 if bench.own_likelihoods else 1.0):
        (steps,) = bench.steps(bench.wanted(ONE, SamplingOptions(1, temperature, 1.0, 2, alternatives=4)))
        assert steps[0].likelihood is not None
        assert len(steps[0].likelihood.top) == 4
        found.append(steps[0].likelihood)
    greedy, drawn = found
    assert greedy.top[0][1] == pytest.approx(greedy.chosen, abs=bench.tolerance)
    np.testing.assert_allclose([v for _, v in greedy.top], [v for _, v in drawn.top], atol=bench.tolerance)
    assert [v for _, v in greedy.top] == sorted((v for _, v in greedy.top), reverse=True)
    (plain,) = bench.steps(bench.wanted(ONE, replace(GREEDY, alternatives=0)))
    assert all(step.likelihood is not None and step.likelihood.top == () for step in plain)
    (none,) = bench.steps(bench.wanted(ONE))
    assert all(step.likelihood is None for step in none)


def test_who_leaves_early_frees_the_place(bench: Bench) -> None:
    bench.load(ONE)

    async def leave_early() -> None:
        generations = [bench.backend.generate(bench.wanted(ONE, SamplingOptions(100, 1.0, 1.0, s))) for s in range(6)]
        for one in generations:
            async with aclosing(one):
                await anext(one)
        await idle(bench.backend)

    asyncio.run(leave_early())
    bench.backend.unload(ONE)


async def idle(backend: Backend) -> None:
    deadline = time.monotonic() + 20
    while backend.busy() != (0, 0):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.002)


def test_a_version_goes_when_nobody_uses_it_any_more(bench: Bench) -> None:
    bench.load(ONE, TWO)
    generation = bench.wanted(ONE, SamplingOptions(100, 0.0))
    alone = bench.steps(generation)[0]
    gone = threading.Event()

    def unload() -> None:
        bench.backend.unload(ONE)
        gone.set()

    async def overtaken() -> list[DecodingStep]:
        found: list[DecodingStep] = []
        async for step in bench.backend.generate(generation):
            if not found:
                thread.start()
            found.append(step)
        return found

    thread = threading.Thread(target=unload)
    assert tokens_of(asyncio.run(overtaken())) == tokens_of(alone)
    assert gone.wait(20)
    thread.join()
    assert bench.backend.loaded() == {TWO}
    with pytest.raises(BackendError):
        bench.steps(generation)


def test_an_adapter_that_does_not_fit_is_refused_and_leaves_nothing(bench: Bench) -> None:
    bench.load(ONE)
    with pytest.raises(BackendError, match="sql@1"):
        bench.backend.load(TWO, bench.misfit)
    assert bench.backend.loaded() == {ONE}
    bench.backend.load(TWO, bench.adapter(1))
