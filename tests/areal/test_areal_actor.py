"""AReaL's actor in this process. Run with AReaL's environment: `make test-areal`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from areal_cases import example, random_pairs
from builders import random_adapter

from fedmoe.areal.batch import ExampleBatch, Sequences
from fedmoe.areal.config import ArealConfig
from fedmoe.areal.packing_check import LeakError
from fedmoe.arena.learning.config import LossConfig

if TYPE_CHECKING:
    from fedmoe.areal.actor import ArealActor

pytestmark = [
    pytest.mark.areal,
    pytest.mark.usefixtures("no_process_group"),
    # What AReaL 1.0.4 and its libraries do is not ours to change.
    pytest.mark.filterwarnings("ignore"),
]
MakeActor = Callable[[ArealConfig], "ArealActor"]


@pytest.fixture
def make() -> Iterator[MakeActor]:
    made: list[ArealActor] = []

    def make_one(config: ArealConfig) -> ArealActor:
        from fedmoe.areal.actor import ArealActor

        for actor in made:
            actor.close()
        made.append(ArealActor(config))
        return made[-1]

    yield make_one
    made[-1].close()


def test_areals_own_packing_leaks_and_is_refused(config: ArealConfig) -> None:
    from areal.engine.fsdp_engine import FSDPPPOActor

    from fedmoe.areal.actor import ArealActor

    with pytest.raises(LeakError, match="packed sequences see each other"):
        ArealActor(config, engine=FSDPPPOActor)


def test_areals_own_engine_passes_with_one_sequence_at_a_time(config: ArealConfig) -> None:
    from areal.engine.fsdp_engine import FSDPPPOActor

    from fedmoe.areal.actor import ArealActor

    ArealActor(replace(config, tokens_per_micro_batch=None), engine=FSDPPPOActor).close()


@pytest.mark.parametrize("limit", [None, 64, 1024])
def test_batched_equals_alone(config: ArealConfig, make: MakeActor, limit: int | None) -> None:
    actor, pairs = make(replace(config, tokens_per_micro_batch=limit)), random_pairs(12)
    actor.load(random_adapter(actor.adapter().layout, alpha=8.0), version=0)
    together = actor.score(Sequences.of(pairs))
    for pair, scores in zip(pairs, together, strict=True):
        np.testing.assert_allclose(scores, actor.score(Sequences.of([pair]))[0], atol=2e-5)


def test_packing_changes_no_update(config: ArealConfig, make: MakeActor) -> None:
    examples = [example(prompt, tokens, 1.0 - place % 3) for place, (prompt, tokens) in enumerate(random_pairs(8))]
    adapters = []
    for limit in (None, 1024):
        # A small step size: AdamW's first steps follow the sign of a gradient, which rounding may turn where it is 0.
        actor = make(replace(config, tokens_per_micro_batch=limit))
        actor.load(random_adapter(actor.adapter().layout, alpha=8.0), version=0)
        actor.update(ExampleBatch.of(examples))
        adapters.append(actor.adapter().flat)
    moved = np.abs(adapters[0] - adapters[1])
    assert np.quantile(moved, 0.999) < 1e-5


def test_behaviour_counts_only_through_the_importance_weight(config: ArealConfig, make: MakeActor) -> None:
    pairs = random_pairs(4)
    actor = make(config)
    before = actor.score(Sequences.of(pairs))
    shifts = (0.0, np.log(2.0), -np.log(2.0), np.log(6.0))  # proximal / behaviour: 1, 2, 1/2, and 6, beyond the cap
    examples = [
        example(prompt, tokens, 1.0, (scores - shift).astype(np.float32), version=-1)
        for (prompt, tokens), scores, shift in zip(pairs, before, shifts, strict=True)
    ]
    update = actor.update(ExampleBatch.of(examples))
    lengths = np.array([len(tokens) for _, tokens in pairs])
    weights = np.array([1.0, 2.0, 0.5])
    assert update.loss == pytest.approx(-float((lengths[:3] * weights).sum()) / lengths.sum(), rel=1e-4)
    assert update.importance_weight == pytest.approx(float((lengths[:3] * weights).sum() / lengths[:3].sum()), rel=1e-4)
    assert update.gap_max == pytest.approx(np.log(6.0), abs=1e-4)
    assert update.tokens == lengths.sum()


def test_sequence_mean_weighs_sequences_alike(config: ArealConfig, make: MakeActor) -> None:
    actor = make(replace(config, loss=LossConfig(aggregation="sequence_mean")))
    pairs = [([1, 2, 3], [4]), ([1, 2, 3], [5] * 9)]
    before = actor.score(Sequences.of(pairs))
    examples = [
        example(prompt, tokens, advantage, scores)
        for (prompt, tokens), scores, advantage in zip(pairs, before, (1.0, 3.0), strict=True)
    ]
    assert actor.update(ExampleBatch.of(examples)).loss == pytest.approx(-2.0, rel=1e-5)


def test_later_epochs_are_clipped_against_the_first(config: ArealConfig, make: MakeActor) -> None:
    examples = [example(prompt, tokens, 1.0) for prompt, tokens in random_pairs(4)]
    update = make(replace(config, epochs=8)).update(ExampleBatch.of(examples))
    assert update.steps == 8
    assert update.clip_fraction > 0.1
    assert update.kl_k1 < -0.01  # the rewarded tokens have become likelier


def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(config: ArealConfig, make: MakeActor) -> None:
    actor = make(config)
    before = actor.adapter()
    update = actor.update(ExampleBatch.of([example([1, 2], [3, 4], 3e38)] * 2))
    assert (update.steps, update.skipped_steps) == (0, 1)
    assert actor.version == 0
    np.testing.assert_array_equal(actor.adapter().flat, before.flat)


def test_equal_seeds_give_equal_adapters(config: ArealConfig, make: MakeActor) -> None:
    first, again, other = (make(replace(config, seed=seed)).adapter().flat for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_a_llama_model_trains_too(config: ArealConfig, make: MakeActor, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from fedmoe.models.tiny import tiny_tokenizer

    sizes = LlamaConfig(
        vocab_size=259, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    LlamaForCausalLM(sizes).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    actor, pair = make(replace(config, base_folder=str(tmp_path))), ([1, 2, 3], [4, 5, 6])
    before = actor.score(Sequences.of([pair]))[0]
    actor.update(ExampleBatch.of([example(*pair, 1.0, before)]))
    assert (actor.score(Sequences.of([pair]))[0] > before).all()
