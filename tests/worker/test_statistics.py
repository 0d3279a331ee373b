"""What a worker tells of its data: from which tokens, how many, and that a gateway can route by it."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest

from fedmoe.datasets.tokens.packing import Block, pack
from fedmoe.datasets.tokens.tokenized_sample import MASKED, TokenizedSample
from fedmoe.gateway.routers import SequenceRouter
from fedmoe.lora.moments import InputMoments
from fedmoe.lora.prompt_statistics import FeatureMoments, PromptStatistics
from fedmoe.models.base import LoadedBase
from fedmoe.models.prompt_features import prefix_features, prompt_features
from fedmoe.worker.statistics import (
    LEAST_PROMPTS,
    LONGEST_PROMPT,
    PROMPT_LENGTHS,
    StatisticsBudget,
    data_statistics,
    prompt_statistics,
    sample_prompts,
)

WORDS = {"numbers": "0123456789 +-=", "letters": "abcdefghijklmnop "}


def text(length: int, seed: int, alphabet: str = WORDS["letters"]) -> TokenizedSample:
    draws = np.random.default_rng(seed)
    ids = np.array([ord(letter) % 256 for letter in draws.choice(list(alphabet), length)], np.int64)
    return TokenizedSample(ids, ids.copy())


def answered(question: int, answer: int, seed: int) -> TokenizedSample:
    sample = text(question + answer, seed)
    sample.labels[:question] = MASKED
    return sample


def blocks(samples: list[TokenizedSample], length: int = 300) -> list[Block]:
    return pack(samples, length, 0)


def in_order(packed: list[Block]) -> list[tuple[list[int], list[int]]]:
    found = []
    for block in packed:
        for segment in range(int(block.segment_ids.max()) + 1):
            inside = block.segment_ids == segment
            found.append((block.input_ids[inside].tolist(), block.labels[inside].tolist()))
    return found


def alike(left: FeatureMoments, right: FeatureMoments) -> None:
    assert left.count == right.count
    np.testing.assert_allclose(left.mean, right.mean, atol=1e-5)
    np.testing.assert_allclose(
        left.spread.T @ left.spread + np.diag(left.rest), right.spread.T @ right.spread + np.diag(right.rest), atol=1e-4
    )


def test_running_text_gives_its_beginnings_of_several_lengths(base: LoadedBase) -> None:
    packed = blocks([text(length, length) for length in (5, 8, 20, 70, 100, *range(30, 42))])
    found = prompt_statistics(base, sample_prompts(base, packed, 10_000))
    ids = [row for row, _ in in_order(packed)]
    lengths = [tuple(n for n in PROMPT_LENGTHS if n <= len(row)) or (len(row),) for row in ids]
    of_row = [place for place, wanted in enumerate(lengths) for _ in wanted]
    expected = PromptStatistics.of(prefix_features(base, ids, lengths), of_row)
    alike(found.first, expected.first)
    alike(found.second, expected.second)
    assert found.count == 17


def test_a_question_with_an_answer_gives_the_question(base: LoadedBase) -> None:
    packed = blocks([answered(length, 30, length) for length in range(10, 30)])
    questions = [row[: labels.count(MASKED)] for row, labels in in_order(packed)]
    assert sorted(map(len, questions)) == list(range(10, 30))
    found = prompt_statistics(base, sample_prompts(base, packed, 10_000))
    expected = PromptStatistics.of(prompt_features(base, questions))
    alike(found.first, expected.first)
    alike(found.second, expected.second)


def test_a_very_long_question_is_cut(base: LoadedBase) -> None:
    packed = pack([answered(LONGEST_PROMPT + 44, 20, seed) for seed in range(20)], 400, 0)
    found = prompt_statistics(base, sample_prompts(base, packed, 100_000))
    cut = [row[:LONGEST_PROMPT] for row, _ in in_order(packed)]
    alike(found.together(), PromptStatistics.of(prompt_features(base, cut)).together())


def test_tokens_are_bounded_but_a_few_prompts_there_are(base: LoadedBase) -> None:
    packed = blocks([text(64, seed) for seed in range(60)])
    assert prompt_statistics(base, sample_prompts(base, packed, 64 * 20)).count == 20
    assert prompt_statistics(base, sample_prompts(base, packed, 1)).count == LEAST_PROMPTS
    found = data_statistics(base, packed, "q_proj", StatisticsBudget(prompt_tokens=64 * 20, tokens=64 * 20))
    assert found.prompts.count == 20
    assert 64 * 20 <= found.moments.tokens < 64 * 20 + 300


def test_what_the_data_hold_is_told_beside_what_was_used(base: LoadedBase) -> None:
    packed = blocks([text(64, seed) for seed in range(60)])
    found = data_statistics(base, packed, "q_proj", StatisticsBudget(prompt_tokens=64 * 20, tokens=64 * 20))
    assert (found.samples, found.tokens) == (60, 60 * 64)
    assert found.prompts.count < found.samples
    assert found.moments.tokens < found.tokens


def test_progress_rises_to_all_of_it(base: LoadedBase) -> None:
    told: list[tuple[int, int]] = []
    packed = blocks([text(64, seed) for seed in range(60)])
    budget = StatisticsBudget(prompt_tokens=64 * 40, tokens=64 * 20)
    data_statistics(base, packed, "q_proj", budget, lambda done, total: told.append((done, total)))
    assert {total for _, total in told} == {64 * 40 + 64 * 20}
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1] == (64 * 60, 64 * 60)


def test_statistics_do_not_depend_on_time(base: LoadedBase, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which every look at the clock finds an hour gone gives the very same bytes."""
    packed = blocks([text(64, seed) for seed in range(60)])
    budget = StatisticsBudget(prompt_tokens=64 * 40, tokens=64 * 30)
    usual = data_statistics(base, packed, "q_proj", budget).to_bytes()
    hours = itertools.count(0.0, 3600.0)
    for clock in ("time", "monotonic", "perf_counter"):
        monkeypatch.setattr(time, clock, lambda: next(hours))
    assert data_statistics(base, packed, "q_proj", budget).to_bytes() == usual


def test_too_few_samples_tell_too_much(base: LoadedBase) -> None:
    packed = blocks([text(40, seed) for seed in range(LEAST_PROMPTS - 1)] + [text(1, 99)])
    with pytest.raises(ValueError, match="at least 16 samples of two tokens or more, there are 15"):
        data_statistics(base, packed, "q_proj")


def test_the_base_model_is_bare_before_and_after(base: LoadedBase) -> None:
    data_statistics(base, blocks([text(20, seed) for seed in range(20)]), "all-linear")
    assert not any(module._forward_pre_hooks for module in base.model.modules())


def test_bytes_are_what_the_gateway_reads(base: LoadedBase) -> None:
    found = data_statistics(base, blocks([text(20, seed) for seed in range(20)]), "q_proj")
    sent = found.to_bytes()
    assert sorted(sent) == ["moments", "prompts"]
    alike(PromptStatistics.from_bytes(sent["prompts"]).first, found.prompts.first)
    assert InputMoments.from_bytes(sent["moments"]).tokens == found.moments.tokens


def test_a_gateway_routes_by_what_two_workers_sent(base: LoadedBase) -> None:
    sent = {
        name: prompt_statistics(
            base, sample_prompts(base, blocks([text(40, seed, alphabet) for seed in range(40)]), 10_000)
        )
        for name, alphabet in WORDS.items()
    }
    router = SequenceRouter.fit(sent)
    for name, alphabet in WORDS.items():
        asked = [text(length, 500 + length, alphabet).input_ids for length in range(8, 48)]
        likeliest = router.probabilities(prompt_features(base, asked)).argmax(axis=1)
        assert np.count_nonzero(likeliest == router.names.index(name)) >= 38
