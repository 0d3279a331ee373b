"""Our losses against those of the installed AReaL (1.0.4) and TRL (1.16.0): equal loss and gradient to 1e-5.

Needs `areal` and `trl` importable: `pip install --no-deps areal==1.0.4 trl==1.16.0`, TRL's `datasets`, and what
`areal.utils.functional` imports (aiohttp httpx colorlog tenacity flask uvloop pyyaml hydra-core==1.4.0.dev1 pillow
orjson einops aiofiles lark torchdata zstandard ray numba openai nvidia-ml-py). Run it with `pytest -m areal`.
Nothing is skipped: where the packages are missing, the tests fail.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from loss_cases import AggregationName, computed, random_tokens

from fedmoe.arena.learning.config import LossConfig
from fedmoe.arena.learning.loss import AGGREGATIONS, WEIGHT_CAP, LossStatistics, LossTokens
from fedmoe.arena.modes.advantages import group_advantages

# The two packages and what they import warn about versions of their own; that is theirs to mend.
pytestmark = [pytest.mark.areal, pytest.mark.filterwarnings("ignore")]

SEEDS = range(5)
ROWS, COLUMNS, MAX_TOKENS = 6, 16, 20
ABSOLUTE = 1e-5
Found = tuple[float, torch.Tensor]


def single_precision(seed: int, count: int, spread: float = 0.5) -> LossTokens:
    drawn = random_tokens(seed, count, spread)
    return LossTokens(
        current=drawn.current.detach().float(),
        proximal=drawn.proximal.float(),
        behaviour=drawn.behaviour.float(),
        advantages=drawn.advantages.float(),
        mask=drawn.mask,
        weights=torch.ones(count),
    )


def assert_equal(ours: tuple[float, torch.Tensor, LossStatistics], theirs: Found) -> None:
    assert ours[0] == pytest.approx(theirs[0], abs=ABSOLUTE, rel=ABSOLUTE)
    torch.testing.assert_close(ours[1], theirs[1], atol=ABSOLUTE, rtol=ABSOLUTE)
    assert ours[1].abs().max() > 1e-3


def areal_loss(
    tokens: LossTokens, config: LossConfig, correct: bool
) -> tuple[float, torch.Tensor, dict[str, torch.Tensor]]:
    leaf = tokens.current.clone().requires_grad_()
    rejection = import_module("areal.api.cli_args").RejectionSamplingConfig(
        level="token", action="mask", metric="ratio", upper=WEIGHT_CAP, lower=None
    )
    loss, statistics = import_module("areal.utils.functional").ppo_actor_loss_fn(
        logprobs=leaf,
        proximal_logprobs=tokens.proximal if correct else tokens.behaviour,
        old_logprobs=tokens.behaviour,
        advantages=tokens.advantages,
        eps_clip=config.clip_low,
        loss_mask=tokens.mask,
        eps_clip_higher=config.clip_high,
        c_clip=None,
        rejection_sampling=rejection if correct else None,
    )
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.item(), gradient, statistics


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("high", [0.2, 0.28])
@pytest.mark.parametrize("spread", [0.5, 1.5])
def test_decoupled_is_areals_loss(seed: int, high: float, spread: float) -> None:
    tokens = single_precision(seed, 96, spread=spread)
    config = LossConfig("decoupled", clip_high=high)
    count = int(tokens.mask.sum())
    loss, gradient, theirs = areal_loss(tokens, config, correct=True)
    ours = computed(tokens, config, count)
    assert_equal(ours, (loss, gradient))
    statistics = ours[2]
    assert statistics.clip_fraction == pytest.approx(int(theirs["clip_mask"].sum()) / count)
    kept = theirs["behave_mask"]
    assert statistics.importance_weight == pytest.approx(theirs["behave_imp_weight"][kept].mean().item(), rel=1e-5)
    assert statistics.masked_fraction == pytest.approx(theirs["filtered_fraction"])
    assert (statistics.masked_fraction > 0) is (spread > 1)


@pytest.mark.parametrize("seed", SEEDS)
def test_clipped_is_areals_loss_without_decoupling(seed: int) -> None:
    tokens = single_precision(seed, 96)
    config = LossConfig("clipped", clip_high=0.28)
    loss, gradient, _ = areal_loss(tokens, config, correct=False)
    assert_equal(computed(tokens, config, int(tokens.mask.sum())), (loss, gradient))


def trl_loss(tokens: LossTokens, config: LossConfig, loss_type: str, ratio: torch.Tensor | None = None) -> Found:
    """`GRPOTrainer._compute_loss` itself, on a stand-in for the trainer whose model answers with our numbers."""
    rows = (ROWS, COLUMNS)
    leaf = tokens.current.clone().requires_grad_()
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (leaf.reshape(rows), torch.zeros(rows), None),
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _entropy_bonus_enabled=False,
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        beta=0.0,
        epsilon_low=config.clip_low,
        epsilon_high=config.clip_high,
        loss_type=loss_type,
        max_completion_length=MAX_TOKENS,
        use_vllm=ratio is not None,
        vllm_importance_sampling_correction=ratio is not None,
    )
    mask = tokens.mask.reshape(rows)
    no_prompt = torch.zeros(ROWS, 0, dtype=torch.long)
    old = tokens.behaviour if ratio is None else tokens.proximal
    inputs = {
        "prompt_ids": no_prompt,
        "prompt_mask": no_prompt,
        "completion_ids": torch.zeros(rows, dtype=torch.long),
        "completion_mask": mask.long(),
        "advantages": tokens.advantages.reshape(rows),
        "old_per_token_logps": old.reshape(rows),
        "ref_per_token_logps": torch.zeros(rows),
        "num_items_in_batch": mask.sum(),
    }
    if ratio is not None:
        inputs["importance_sampling_ratio"] = ratio.reshape(rows)
    loss = import_module("trl.trainer.grpo_trainer").GRPOTrainer._compute_loss(trainer, trainer.model, inputs)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.item(), gradient


def aggregated(seed: int, name: str) -> tuple[LossTokens, float]:
    tokens = single_precision(seed, ROWS * COLUMNS)
    lengths = tokens.mask.reshape(ROWS, COLUMNS).sum(-1)
    aggregation = AGGREGATIONS[name](lengths.tolist(), MAX_TOKENS)
    weights = torch.tensor(aggregation.weights).repeat_interleave(COLUMNS)
    return replace(tokens, weights=weights), aggregation.denominator


# On one micro-batch `bnpo` is `dapo`: it divides by the tokens of the micro-batch instead of the whole batch.
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("name", "loss_type"),
    [("token_mean", "dapo"), ("token_mean", "bnpo"), ("sequence_mean", "grpo"), ("constant", "dr_grpo")],
)
def test_clipped_is_trls_grpo_loss(seed: int, name: AggregationName, loss_type: str) -> None:
    tokens, denominator = aggregated(seed, name)
    config = LossConfig("clipped", name, clip_high=0.28)
    assert_equal(computed(tokens, config, denominator), trl_loss(tokens, config, loss_type))


@pytest.mark.parametrize("seed", SEEDS)
def test_decoupled_is_trls_loss_with_its_correction_for_the_rollout_engine(seed: int) -> None:
    """TRL's mode `token_mask`; its ratio is made by the rollout, so it is made here as it is."""
    tokens, denominator = aggregated(seed, "token_mean")
    ratio = (tokens.proximal - tokens.behaviour).exp()
    ratio = ratio.masked_fill(ratio > WEIGHT_CAP, 0.0)
    config = LossConfig("decoupled")
    assert_equal(computed(tokens, config, denominator), trl_loss(tokens, config, "dapo", ratio))


def test_standardised_group_advantages_are_trls() -> None:
    """TRL's formula with `nanstd` of its own: (r - mean) / (std + 1e-4) within each group."""
    nanstd = import_module("trl.trainer.utils").nanstd
    rewards = torch.rand(4, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    spread = nanstd(rewards, dim=1).reshape(4, 1)
    theirs = (rewards - rewards.mean(1, keepdim=True)) / (spread + 1e-4)
    ours = group_advantages(rewards.flatten().numpy(), [row for row in range(4) for _ in range(8)])
    assert ours.tolist() == pytest.approx(theirs.flatten().tolist(), abs=1e-6)
