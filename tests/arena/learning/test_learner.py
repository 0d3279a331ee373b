"""Policies learn from their rewards (E1, E19), each as if alone, and a step that cannot be made changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from builders import random_adapter
from loss_cases import AggregationName, LossName

from fedmoe.arena.learning.config import LearningConfig
from fedmoe.arena.learning.learner import AdamState, Learner
from fedmoe.arena.learning.loss import LossError
from fedmoe.arena.rollout.episodes import Example, PlayedTurn, Player
from fedmoe.lora.adapter import ShapeError
from fedmoe.models.base import load_base
from fedmoe.models.multilora import MultiLora, UnknownAdapterError
from fedmoe.models.policy_logprobs import Continuation, MicroBatch, plan_micro_batches

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
LENGTH = 4
#: Without warm-up and with steps large enough to be seen.
CONFIG = LearningConfig(learning_rate=1e-3, warmup_steps=0, micro_batch_tokens=4096)


def make_learner(config: LearningConfig = CONFIG, names: Sequence[str] = ("a", "b"), device: str = "cpu") -> Learner:
    base = load_base("tiny", device=device, dtype="fp32")
    learner = Learner(base, MultiLora(base.model), config)
    for name in names:
        learner.add(name, random_adapter(learner.layout(4), ord(name), alpha=8.0))
    return learner


def make_examples(learner: Learner, name: str, count: int = 6, seed: int = 0) -> list[Example]:
    """Turns of one policy, two prompts, sampled by it as far as the log-probabilities go; rewards of both signs."""
    rng = np.random.default_rng([seed, ord(name)])
    prompts = [tuple(rng.integers(0, 256, length).tolist()) for length in (7, 3)]
    made = []
    for index in range(count):
        prompt, tokens = prompts[index % 2], tuple(rng.integers(0, 256, LENGTH - index % 2).tolist())
        turn = PlayedTurn(0, Player(name, None, True), prompt, tokens, "", learner.score(name, prompt, tokens), True)
        made.append(Example(name, turn, (1.0, -1.0, 0.5)[index % 3], 0.0))
    return made


def scores(learner: Learner, examples: Sequence[Example]) -> list[float]:
    """The log-probability of each example's tokens."""
    return [float(learner.score(one.policy, one.turn.prompt, one.turn.tokens).sum()) for one in examples]


def flats(learner: Learner, names: Sequence[str] = ("a", "b")) -> dict[str, np.ndarray]:
    return {name: learner.adapter(name).flat.copy() for name in names}


def assert_equal_state(one: AdamState, other: AdamState) -> None:
    assert one.steps == other.steps
    np.testing.assert_array_equal(one.first, other.first)
    np.testing.assert_array_equal(one.second, other.second)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("loss", ["decoupled", "clipped", "reinforce"])
def test_rewarded_tokens_become_likelier_and_punished_ones_less(loss: LossName, device: str) -> None:
    learner = make_learner(replace(CONFIG, loss=loss), device=device)
    examples = [one for name in ("a", "b") for one in make_examples(learner, name)]
    before = scores(learner, examples)
    for _ in range(3):
        reports = learner.update(examples, LENGTH)
    for one, old, new in zip(examples, before, scores(learner, examples), strict=True):
        assert (new - old) * one.advantage > 0.01
    assert set(reports) == {"a", "b"}
    for report in reports.values():
        assert report.gradient_norm > 0
        assert report.entropy > 0
        assert report.learning_rate == pytest.approx(1e-3)
        assert report.tokens == sum(len(one.turn.tokens) for one in examples) // 2


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "constant"])
def test_policies_beside_each_other_change_as_they_would_alone(aggregation: AggregationName) -> None:
    config = replace(CONFIG, aggregation=aggregation)
    together = make_learner(config)
    examples = {name: make_examples(together, name, count) for name, count in (("a", 6), ("b", 4))}
    mixed = [one for pair in zip(examples["a"], examples["b"], strict=False) for one in pair] + examples["a"][4:]
    for _ in range(3):
        found = together.update(mixed, LENGTH)
    for name in ("a", "b"):
        alone = make_learner(config, names=(name,))
        for _ in range(3):
            expected = alone.update(examples[name], LENGTH)[name]
        np.testing.assert_allclose(together.adapter(name).flat, alone.adapter(name).flat, atol=1e-6, rtol=0)
        assert found[name].loss == pytest.approx(expected.loss, abs=1e-5)
        assert found[name].gradient_norm == pytest.approx(expected.gradient_norm, rel=1e-4)
        assert found[name].entropy == pytest.approx(expected.entropy, rel=1e-5)
        assert found[name].moved == pytest.approx(expected.moved, abs=1e-5)


def test_a_policy_without_examples_stays_as_it_is() -> None:
    learner = make_learner()
    before = flats(learner)
    assert set(learner.update(make_examples(learner, "b"), LENGTH)) == {"b"}
    after = flats(learner)
    np.testing.assert_array_equal(after["a"], before["a"])
    assert np.abs(after["b"] - before["b"]).max() > 1e-4
    assert learner.optimizer_state("a").steps == 0
    assert learner.update([], LENGTH) == {}


@pytest.mark.parametrize("limit", [1, 16, 40])
def test_small_micro_batches_give_the_step_of_one_large_one(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[list[MicroBatch]] = []

    def remember(continuations: Sequence[Continuation], max_tokens: int) -> list[MicroBatch]:
        batches.append(plan_micro_batches(continuations, max_tokens))
        return batches[-1]

    large, small = make_learner(), make_learner()
    small.micro_batch_tokens = limit
    examples = [one for name in ("a", "b") for one in make_examples(large, name)]
    monkeypatch.setattr("fedmoe.arena.learning.learner.plan_micro_batches", remember)
    reports = [one.update(examples, LENGTH) for one in (large, small)]
    assert len(batches[0]) == 1
    assert len(batches[1]) > 1
    for name in ("a", "b"):
        one, other = (learner.optimizer_state(name).first for learner in (large, small))
        np.testing.assert_allclose(other, one, atol=1e-5 * np.abs(one).max(), rtol=0)
        for field in ("loss", "entropy", "gradient_norm", "moved"):
            values = [getattr(report[name], field) for report in reports]
            assert values[1] == pytest.approx(values[0], rel=1e-4, abs=1e-5)
        assert reports[1][name].statistics.tokens == reports[0][name].statistics.tokens


def test_later_epochs_are_measured_against_the_weights_before_the_first() -> None:
    learner = make_learner(replace(CONFIG, learning_rate=1e-2, epochs=2))
    examples = make_examples(learner, "a")
    stale = [replace(one, turn=replace(one.turn, behaviour=one.turn.behaviour - 0.3)) for one in examples]
    report = learner.update(stale, LENGTH)["a"]
    # The gap to the rollout is that of the weights before the update; the movement that of the first epoch.
    assert report.statistics.gap_mean == pytest.approx(0.3, abs=1e-4)
    assert report.statistics.kl_k3 > 1e-3
    assert report.statistics.clip_fraction > 0
    once = make_learner(replace(CONFIG, learning_rate=1e-2))
    first = once.update(stale, LENGTH)["a"]
    assert first.statistics.kl_k3 == pytest.approx(0, abs=1e-9)
    assert first.statistics.gap_mean == pytest.approx(0.3, abs=1e-4)
    assert learner.optimizer_state("a").steps == 2
    # A second update of its own would take the weights after the first as proximal, and clip nothing.
    assert once.update(stale, LENGTH)["a"].statistics.clip_fraction == 0


@pytest.mark.parametrize("device", DEVICES)
def test_a_checkpoint_goes_on_bit_for_bit(device: str) -> None:
    config = replace(CONFIG, warmup_steps=5, weight_decay=0.01)
    uninterrupted = make_learner(config, device=device)
    examples = [one for name in ("a", "b") for one in make_examples(uninterrupted, name)]
    uninterrupted.update(examples, LENGTH)
    uninterrupted.update(examples, LENGTH)
    saved = {name: (uninterrupted.adapter(name), uninterrupted.optimizer_state(name)) for name in ("a", "b")}
    expected = [uninterrupted.update(examples, LENGTH) for _ in range(2)]
    resumed = make_learner(config, device=device)
    for name, (adapter, state) in saved.items():
        assert state.steps == 2
        resumed.replace(name, adapter, state)
        assert_equal_state(resumed.optimizer_state(name), state)
    assert [resumed.update(examples, LENGTH) for _ in range(2)] == expected
    for name in ("a", "b"):
        np.testing.assert_array_equal(resumed.adapter(name).flat, uninterrupted.adapter(name).flat)
        assert_equal_state(resumed.optimizer_state(name), uninterrupted.optimizer_state(name))


def test_saved_moments_are_copies() -> None:
    learner = make_learner()
    examples = make_examples(learner, "a")
    learner.update(examples, LENGTH)
    state = learner.optimizer_state("a")
    kept = AdamState(state.first.copy(), state.second.copy(), state.steps)
    learner.update(examples, LENGTH)
    learner.replace("a", learner.adapter("a"), state)
    learner.update(examples, LENGTH)
    assert_equal_state(state, kept)


def test_replacing_without_moments_starts_anew_also_with_another_rank() -> None:
    learner = make_learner()
    learner.update(make_examples(learner, "a"), LENGTH)
    learner.replace("a", random_adapter(learner.layout(7), 5, alpha=8.0))
    assert learner.adapter("a").rank == 7
    assert learner.optimizer_state("a").steps == 0
    assert not learner.optimizer_state("a").first.any()
    assert learner.update(make_examples(learner, "a"), LENGTH)["a"].gradient_norm > 0
    with pytest.raises(ShapeError, match="do not fit"):
        learner.replace("a", random_adapter(learner.layout(2), 5, alpha=8.0), learner.optimizer_state("a"))
    assert learner.adapter("a").rank == 7


@pytest.mark.parametrize("limit", [4096, 1])
def test_a_gradient_that_is_not_finite_changes_no_policy(limit: int) -> None:
    """Fault 83."""
    learner, untouched = make_learner(), make_learner()
    good = [one for name in ("a", "b") for one in make_examples(learner, name)]
    for one in (learner, untouched):
        one.update(good, LENGTH)
    before = flats(learner)
    learner.micro_batch_tokens = limit
    # Finite, but its square is not: policy b comes after policy a.
    broken = [*good, replace(good[-1], advantage=1e30)]
    with pytest.raises(FloatingPointError, match=r"gradients of b are not finite; no policy"):
        learner.update(broken, LENGTH)
    for name in ("a", "b"):
        np.testing.assert_array_equal(learner.adapter(name).flat, before[name])
        assert_equal_state(learner.optimizer_state(name), untouched.optimizer_state(name))
    learner.micro_batch_tokens = untouched.micro_batch_tokens
    assert learner.update(good, LENGTH) == untouched.update(good, LENGTH)


def test_an_error_half_way_leaves_no_gradient_behind() -> None:
    learner, untouched = make_learner(), make_learner()
    good = [one for name in ("a", "b") for one in make_examples(learner, name)]
    learner.micro_batch_tokens = 1
    nothing = np.full(len(good[-1].turn.tokens), np.nan, np.float32)
    with pytest.raises(LossError, match="not finite"):
        learner.update([*good, replace(good[-1], turn=replace(good[-1].turn, behaviour=nothing))], LENGTH)
    learner.micro_batch_tokens = untouched.micro_batch_tokens
    assert learner.update(good, LENGTH) == untouched.update(good, LENGTH)
    for name in ("a", "b"):
        np.testing.assert_array_equal(learner.adapter(name).flat, untouched.adapter(name).flat)


def test_long_gradients_are_cut_to_the_limit() -> None:
    free, cut = (make_learner(replace(CONFIG, max_grad_norm=limit)) for limit in (1e9, 0.5))
    examples = make_examples(free, "a")
    reports = [one.update(examples, LENGTH)["a"] for one in (free, cut)]
    assert reports[0].gradient_norm == reports[1].gradient_norm > 1
    # After one step the first moment is a constant times the gradient.
    lengths = [np.linalg.norm(one.optimizer_state("a").first.astype(np.float64)) for one in (free, cut)]
    assert lengths[1] / lengths[0] == pytest.approx(0.5 / reports[0].gradient_norm, rel=1e-4)


def test_the_learning_rate_warms_up_and_can_be_changed() -> None:
    learner = make_learner(replace(CONFIG, warmup_steps=4))
    examples = make_examples(learner, "a")
    rates = [learner.update(examples, LENGTH)["a"].learning_rate for _ in range(5)]
    assert rates == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3])
    learner.set_learning_rate("a", 2e-4)
    assert learner.learning_rate("a") == 2e-4
    assert learner.update(examples, LENGTH)["a"].learning_rate == 2e-4
    assert learner.learning_rate("b") == 1e-3
    with pytest.raises(ValueError, match="positive"):
        learner.set_learning_rate("a", 0.0)


def test_it_learns_at_the_temperature_of_the_rollout() -> None:
    learner = make_learner(replace(CONFIG, temperature=0.5))
    (one,) = make_examples(learner, "a", count=1)
    report = learner.update([one], LENGTH)["a"]
    assert report.statistics.gap_mean > 0.1  # its behaviour is that of temperature 1
    plain = make_learner().update([one], LENGTH)["a"]
    assert plain.statistics.gap_mean < 1e-5
    assert report.entropy < plain.entropy


def test_a_policy_that_is_not_there_is_named() -> None:
    learner = make_learner()
    (one,) = make_examples(learner, "a", count=1)
    with pytest.raises(UnknownAdapterError, match=r"\['c'\] to train; there are: \['a', 'b'\]"):
        learner.update([one, replace(one, policy="c")], LENGTH)
    with pytest.raises(ShapeError, match="'a' is there already"):
        learner.add("a", random_adapter(learner.layout(4), 1, alpha=8.0))


@pytest.mark.parametrize(
    "wrong",
    [
        {"learning_rate": 0.0},
        {"epochs": 0},
        {"temperature": -1.0},
        {"max_grad_norm": float("nan")},
        {"warmup_steps": -1},
    ],
)
def test_settings_that_cannot_be_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        replace(CONFIG, **wrong)  # type: ignore[arg-type]


def test_bfloat16_learns_too() -> None:
    base = load_base("tiny", device="cpu", dtype="bf16")
    learner = Learner(base, MultiLora(base.model), replace(CONFIG, learning_rate=3e-3))
    learner.add("a", random_adapter(learner.layout(4), 1, alpha=8.0))
    examples = make_examples(learner, "a")
    before = scores(learner, examples)
    for _ in range(4):
        learner.update(examples, LENGTH)
    gains = [
        (new - old) * one.advantage for one, old, new in zip(examples, before, scores(learner, examples), strict=True)
    ]
    assert min(gains) > 0
    assert learner.adapter("a").flat.dtype == np.float32
