"""Continuous batching on the tiny model: rows join and leave, slots stay clean, the drawing is the house's own."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from serve_house import Alone, tiny, tiny_adapter, tiny_layout

from fedmoe.inference.backend import BackendError, ContinuationRequest, DecodingStep, SamplingOptions, ServedModel
from fedmoe.inference.batching import scheduler
from fedmoe.inference.batching.kv_slots import KVSlots
from fedmoe.inference.batching.plan import compaction
from fedmoe.inference.batching.sampler import BatchRow, draw
from fedmoe.inference.batching.scheduler import TransformersBackend
from fedmoe.lora.adapter import Adapter

PYTHON, SQL = ServedModel("python", 1, "a" * 64), ServedModel("sql", 1, "b" * 64)
ADAPTERS = {PYTHON: tiny_adapter(1), SQL: tiny_adapter(2, rank=7)}


@pytest.fixture
def backend() -> Iterator[TransformersBackend]:
    made = TransformersBackend(tiny(), [module.name for module in tiny_layout().modules], rows=4)
    for model, adapter in ADAPTERS.items():
        made.load(model, adapter)
    yield made
    made.close()


async def run(backend: TransformersBackend, wanted: ContinuationRequest, delay: float = 0.0) -> list[DecodingStep]:
    await asyncio.sleep(delay)
    return [step async for step in backend.generate(wanted)]


def test_rows_that_join_and_leave_at_any_time_say_what_they_say_alone(backend: TransformersBackend) -> None:
    rng = np.random.default_rng(0)
    wanted = [
        ContinuationRequest(
            (PYTHON, SQL, None)[index % 3],
            tuple(int(token) for token in rng.integers(0, 256, rng.integers(1, 200))),
            SamplingOptions(int(rng.integers(1, 40)), 0.0),
        )
        for index in range(30)
    ]
    delays = rng.random(30) * 0.3

    async def all_of_them() -> list[list[DecodingStep]]:
        return await asyncio.gather(*(run(backend, *pair) for pair in zip(wanted, delays, strict=True)))

    alone = Alone()
    for one, steps in zip(wanted, asyncio.run(all_of_them()), strict=True):
        adapter = None if one.model is None else ADAPTERS[one.model]
        expected = alone.tokens(adapter, one.prompt, one.sampling.max_new_tokens)
        assert tuple(step.token for step in steps) == expected
    assert backend.busy() == (0, 0)


def test_a_row_whose_numbers_overflow_leaves_nothing_behind_for_those_who_get_its_slot(
    backend: TransformersBackend,
) -> None:
    huge = ServedModel("huge", 1, "c" * 64)
    backend.load(huge, Adapter(tiny_layout(), 8.0, np.full(tiny_layout().size, 1e30, np.float32)))
    good = ContinuationRequest(PYTHON, tuple(range(60, 90)), SamplingOptions(30, 0.0))
    bad = ContinuationRequest(huge, (5, 6, 7), SamplingOptions(30, 0.0))
    alone = asyncio.run(run(backend, good))

    async def mixed() -> list[object]:
        jobs = [run(backend, one, 0.01 * index) for index, one in enumerate([good, bad, good, bad, good, bad, good])]
        return list(await asyncio.gather(*jobs, return_exceptions=True))

    found = asyncio.run(mixed())
    assert [one for one in found[::2] if one != alone] == []
    assert all(isinstance(one, BackendError) and "huge@1" in str(one) for one in found[1::2])


def test_a_batch_that_fails_tells_everybody_and_the_next_one_works(
    backend: TransformersBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = ContinuationRequest(PYTHON, (5, 6, 7), SamplingOptions(5, 0.0))
    alone = asyncio.run(run(backend, wanted))

    def fail(*_: object) -> None:
        raise MemoryError("no memory left")

    async def together() -> list[object]:
        return list(await asyncio.gather(*(run(backend, wanted) for _ in range(6)), return_exceptions=True))

    for place in ("read_prompts", "logits_of"):
        with monkeypatch.context() as patched:
            patched.setattr(scheduler, place, fail)
            found = asyncio.run(together())
        assert all(isinstance(one, BackendError) and "no memory left" in str(one) for one in found)
        assert backend.busy() == (0, 0)
        assert asyncio.run(run(backend, wanted)) == alone
    backend.unload(PYTHON)


def test_closing_tells_those_who_are_there_and_refuses_others() -> None:
    backend = TransformersBackend(tiny(), [module.name for module in tiny_layout().modules], rows=2)
    backend._stop_tokens = frozenset()  # nobody ends before the close, however late that comes
    wanted = ContinuationRequest(None, (5, 6, 7), SamplingOptions(100_000, 1.0))

    async def interrupted() -> list[object]:
        tasks = [asyncio.create_task(run(backend, wanted)) for _ in range(5)]
        await asyncio.sleep(0.05)
        await asyncio.to_thread(backend.close)
        return list(await asyncio.gather(*tasks, return_exceptions=True))

    assert all(isinstance(one, BackendError) and "stopping" in str(one) for one in asyncio.run(interrupted()))
    with pytest.raises(BackendError, match="stopping"):
        asyncio.run(run(backend, wanted))


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 7), st.integers(1, 6)), min_size=1, max_size=25))
def test_slots_hold_every_row_s_own_numbers_and_zeros_behind(actions: Sequence[tuple[bool, int, int]]) -> None:
    """Rows are written with their own number; whatever joins, leaves and steps, nobody finds another's."""
    slots, names = KVSlots(torch.device("cpu")), list[int]()
    for number, (joins, which, length) in enumerate(actions, 1):
        if joins or not names:
            block = torch.full((1, 2, length + 2, 3), float("nan"))
            block[:, :, :length] = number
            slots.join([(block, block.clone())], [length], [length + len(actions)])
            names.append(number)
        else:
            gone = which % len(names)
            kept = compaction(len(names), frozenset({gone}))
            slots.keep(kept)
            names = [names[row] for row in kept]
        if not names:
            assert len(slots) == 0
            continue
        looks, positions = slots.advance()
        written = torch.tensor(names, dtype=torch.float32)[:, None, None, None].expand(-1, 2, 1, 3)
        keys, values = slots.cache.layers[0].update(written, written)
        for row, name in enumerate(names):
            seen = looks[row, 0, 0]
            assert int(seen.sum()) == int(positions[row]) + 1
            for found in (keys, values):
                assert (found[row][:, seen] == name).all()
                assert (found[row][:, ~seen] == 0).all()


def rows_of(*samplings: SamplingOptions) -> list[BatchRow]:
    return [BatchRow(ContinuationRequest(None, (1,), sampling), frozenset()) for sampling in samplings]


@given(st.floats(0.01, 0.99), st.floats(0.2, 2.0), st.integers(0, 1000))
def test_tokens_come_from_the_smallest_set_that_reaches_top_p(top_p: float, temperature: float, seed: int) -> None:
    logits = torch.from_numpy(np.random.default_rng(seed).normal(0, 2, 30).astype(np.float32))
    shares = (logits.double() / temperature).softmax(0)
    order = shares.argsort(descending=True).tolist()
    within = [0.0, *np.cumsum([float(shares[token]) for token in order]).tolist()]
    allowed = {token for token, (before, _) in zip(order, pairwise(within), strict=True) if before < top_p + 1e-5}
    rows = rows_of(*(SamplingOptions(1, temperature, top_p, draw) for draw in range(40)))
    assert not draw(logits.repeat(40, 1), rows)
    assert {row.tokens[0] for row in rows} <= allowed


def test_the_nucleus_is_drawn_from_in_proportion() -> None:
    logits = torch.tensor([3.0, 2.0, 1.0, -1.0]).log_softmax(0)
    shares = logits.exp()
    rows = rows_of(*(SamplingOptions(1, 1.0, 0.85, seed) for seed in range(4000)))
    draw(logits.repeat(4000, 1), rows)
    counted = Counter(row.tokens[0] for row in rows)
    assert set(counted) == {0, 1}
    assert counted[0] / 4000 == pytest.approx(float(shares[0] / (shares[0] + shares[1])), abs=0.03)


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.0])
def test_tokens_are_drawn_with_the_probabilities_of_the_temperature(temperature: float) -> None:
    logits = torch.tensor([2.0, 1.5, 0.0, -1.0])
    rows = rows_of(*(SamplingOptions(2, temperature, 1.0, seed) for seed in range(4000)))
    for place in range(2):
        draw(logits.repeat(4000, 1), rows)
        counted = Counter(row.tokens[place] for row in rows)
        drawn = [counted[token] / 4000 for token in range(4)]
        np.testing.assert_allclose(drawn, (logits / temperature).softmax(0), atol=0.03)


def test_a_row_s_draws_are_its_own_whoever_is_beside_it_and_whatever_the_last_bits() -> None:
    logits = torch.from_numpy(np.random.default_rng(0).normal(0, 2, (1, 500)).astype(np.float32))
    many = rows_of(*(SamplingOptions(1, 1.0, 1.0, seed) for seed in range(300)))
    draw(logits.repeat(300, 1) + 1e-6 * torch.randn(300, 500, generator=torch.Generator().manual_seed(1)), many)
    alone = [rows_of(SamplingOptions(1, 1.0, 1.0, seed)) for seed in range(300)]
    for one in alone:
        draw(logits.clone(), one)
    assert [row.tokens for row in many] == [row.tokens for (row,) in alone]


def test_the_smallest_temperature_is_greedy() -> None:
    rows = rows_of(*(SamplingOptions(1, 1e-30, 1.0, seed) for seed in range(20)))
    draw(torch.tensor([1.0, 1.5, 1e4]).repeat(20, 1), rows)
    assert {row.tokens[0] for row in rows} == {2}


def test_a_row_without_numbers_does_not_spoil_the_others() -> None:
    logits = torch.tensor([[0.0, 5.0], [float("nan"), 0.0], [float("inf"), 0.0], [float("-inf"), 1.0]])
    rows = rows_of(*(SamplingOptions(1, 0.0, 1.0, 0, alternatives=1) for _ in range(4)))
    assert draw(logits, rows) == {1, 2}
    assert [rows[0].tokens, rows[3].tokens] == [[1], [1]]
