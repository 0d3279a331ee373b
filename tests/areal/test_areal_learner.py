"""AReaL's actor in a process of its own (E7). Run with AReaL's environment: `make test-areal`."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from areal_cases import example, random_pairs
from builders import random_adapter

from fedmoe.areal.config import ArealConfig, ArealError
from fedmoe.areal.learner import ArealLearner, ArealProcessError
from fedmoe.arena.rollout.episodes import Example
from fedmoe.lora.adapter import Adapter, Layout

pytestmark = [pytest.mark.areal, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def process(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ArealLearner]:
    config = ArealConfig(str(base_folder), rank=4, alpha=8, learning_rate=1e-2)
    with ArealLearner(config, tmp_path_factory.mktemp("learner"), timeout=120.0) as one:
        yield one


@pytest.fixture
def learner(process: ArealLearner) -> ArealLearner:
    """A learner at version 0, with an adapter that changes little and a fresh optimizer; making one takes long."""
    start = random_adapter(process.layout, alpha=8.0)
    process.replace(Adapter(start.layout, 8.0, start.flat * np.float32(0.1)), version=0)
    process.set_learning_rate(1e-2)
    return process


def _examples(learner: ArealLearner) -> list[Example]:
    pairs = random_pairs(6)
    scores = learner.score(pairs)
    return [
        example(prompt, tokens, 1.0 if place % 2 else -1.0, behaviour)
        for place, ((prompt, tokens), behaviour) in enumerate(zip(pairs, scores, strict=True))
    ]


def _pairs(examples: list[Example]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return [(one.turn.prompt, one.turn.tokens) for one in examples]


def test_rewarded_tokens_become_likelier_and_punished_ones_less(learner: ArealLearner) -> None:
    examples = _examples(learner)
    start = learner.adapter()
    for _ in range(3):
        update = learner.update(examples)
    end = learner.adapter()
    assert learner.version == 3
    assert (update.version, update.examples, update.steps, update.skipped_steps) == (2, 6, 1, 0)
    assert update.tokens == sum(len(one.turn.tokens) for one in examples)
    for one, after in zip(examples, learner.score(_pairs(examples)), strict=True):
        assert (float(after.sum() - one.turn.behaviour.sum()) > 0) == (one.advantage > 0)
    for module, a, b in end.factors():  # two steps: B is 0 at first, and so is the gradient of A
        before_a, before_b = start.module(module.name)
        assert (a != before_a).any(), module.name
        assert (b != before_b).any(), module.name
    assert len(list(end.factors())) == 14


def test_the_adapter_gives_the_same_log_probabilities_in_our_own_model(learner: ArealLearner) -> None:
    import torch

    from fedmoe.models.base import load_base
    from fedmoe.models.lora_layers import attach

    examples = _examples(learner)
    for _ in range(2):
        learner.update(examples)
    base = load_base("tiny", "cpu", "fp32")
    attached = attach(base.model, "all-linear", 4, 8.0)
    attached.load(learner.adapter())
    for (prompt, tokens), theirs in zip(_pairs(examples), learner.score(_pairs(examples)), strict=True):
        ids = torch.tensor([[*prompt, *tokens]])
        with torch.no_grad():
            logits = base.model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        ours = logits.log_softmax(-1)[range(len(tokens)), list(tokens)].numpy()
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
    attached.detach()


def test_an_adapter_goes_in_and_comes_out_unchanged(learner: ArealLearner) -> None:
    before = learner.score([([1, 2], [3, 4])])[0]
    given = random_adapter(learner.layout, 1, alpha=8.0)
    learner.replace(given, version=7)
    assert learner.version == 7
    taken = learner.adapter()
    assert taken.layout == given.layout
    assert taken.alpha == given.alpha
    np.testing.assert_array_equal(taken.flat, given.flat)
    assert np.abs(learner.score([([1, 2], [3, 4])])[0] - before).max() > 0.1


def test_training_goes_on_from_a_checkpoint_as_if_it_had_never_stopped(
    learner: ArealLearner, config: ArealConfig, tmp_path: Path
) -> None:
    examples = _examples(learner)
    learner.update(examples)
    learner.update(examples)
    adapter, version, state = learner.adapter(), learner.version, learner.optimizer_state()
    learner.update(examples)
    uninterrupted = learner.adapter()
    assert state.steps == 2
    assert state.first.any()
    assert state.second.any()
    with ArealLearner(config, tmp_path, start=adapter, version=version) as another:
        assert another.version == 2
        assert another.optimizer_state().steps == 0
        another.replace(adapter, version, state)
        another.update(examples)
        assert another.version == 3
        np.testing.assert_array_equal(another.adapter().flat, uninterrupted.flat)
    assert [entry.name for entry in tmp_path.iterdir()] == ["areal.log"]


def test_a_learning_rate_of_the_tuner_is_used(learner: ArealLearner) -> None:
    examples = _examples(learner)
    learner.set_learning_rate(1e-5)
    before = learner.adapter().flat
    assert learner.update(examples).learning_rate == pytest.approx(1e-5)
    assert 0 < np.abs(learner.adapter().flat - before).max() < 2e-5


def test_what_cannot_be_learned_from_is_refused_and_the_learner_goes_on(learner: ArealLearner) -> None:
    with pytest.raises(ArealError, match=r"token ids lie in \[0, 259\)"):
        learner.update([example([1], [999], 1.0)])
    other = Adapter.zeros(Layout(learner.layout.modules, 2), 8.0)
    with pytest.raises(ArealError, match="rank 2"):
        learner.replace(other, version=1)
    with pytest.raises(ArealError, match="alpha 9"):
        learner.replace(Adapter.zeros(learner.layout, 9.0), version=1)
    assert learner.version == 0
    assert learner.update([example([1], [2], 1.0)]).steps == 1


def test_a_killed_process_is_named_with_what_was_lost(config: ArealConfig, tmp_path: Path) -> None:
    with ArealLearner(config, tmp_path) as learner:
        os.kill(learner._process.pid, signal.SIGKILL)
        with pytest.raises(ArealProcessError, match=r"killed by SIGKILL.*'update' was not done"):
            learner.update([example([1], [2], 1.0)])
        with pytest.raises(ArealProcessError):
            learner.adapter()
