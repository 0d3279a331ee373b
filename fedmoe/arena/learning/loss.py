"""Policy-gradient losses (REINFORCE, PPO's clip, decoupled PPO) on flat token tensors, with a constant normaliser.

A constant denominator makes accumulated micro-batches equal the whole batch, and training beside other policies equal
training alone: no token changes what another one weighs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch

from fedmoe.arena.learning.config import LossConfig

#: Mean |log p_trainer - log p_rollout| per token, in nats: what a healthy pair of engine and trainer stays below,
#: and where something is wrong (other precision, other temperature, packed sequences that see each other).
GAP_TARGET = 0.05
GAP_ALARM = 0.2
#: The largest importance weight of `decoupled`: a token beyond it leaves the sum, but not the denominator.
WEIGHT_CAP = 5.0

# exp() of more overflows into NaN gradients; no token so far from its old probability has anything to teach.
_LOG_RATIO_LIMIT = 20.0


class LossError(ValueError):
    """Tensors that no loss can be computed from."""


@dataclass(frozen=True, slots=True, eq=False)
class LossTokens:
    """What a loss sees of N tokens: every tensor is (N,), on one device; only `current` may carry gradients.

    `current`, `proximal`, `behaviour` are natural-logarithm probabilities of the sampled token (float32 or float64)
    under the weights being trained, those before this update, and those that sampled it. `mask` (bool): the tokens that
    are learned from; the numbers of the others are never used, not even when NaN. `weights` come from the aggregation.
    Raises `LossError` for shapes and types that do not fit.
    """

    current: torch.Tensor
    proximal: torch.Tensor
    behaviour: torch.Tensor
    advantages: torch.Tensor
    mask: torch.Tensor
    weights: torch.Tensor

    def __post_init__(self) -> None:
        shape = self.current.shape
        if self.current.ndim != 1:
            raise LossError(f"expected flat tensors (N,), got current of shape {tuple(shape)}")
        if self.mask.dtype != torch.bool:
            raise LossError(f"mask must be a bool tensor, got {self.mask.dtype}")
        for name in ("current", "proximal", "behaviour", "advantages", "mask", "weights"):
            tensor = getattr(self, name)
            if tensor.shape != shape:
                raise LossError(f"{name} has shape {tuple(tensor.shape)}, current {tuple(shape)}; they must be equal")
            if name != "mask" and tensor.dtype not in (torch.float32, torch.float64):
                raise LossError(f"{name} is {tensor.dtype}; differences of log-probabilities need float32")
            if name != "current" and tensor.requires_grad:
                raise LossError(f"{name} carries gradients; only current may, detach it")

    def log_ratio(self, over: torch.Tensor, under: torch.Tensor) -> torch.Tensor:
        """log(over / under) per token, 0 where the mask is off."""
        return torch.where(self.mask, over - under, 0.0).clamp(-_LOG_RATIO_LIMIT, _LOG_RATIO_LIMIT)


@dataclass(frozen=True, slots=True)
class LossStatistics:
    """What happened to the tokens of a loss, all means over the `tokens` under the mask unless said otherwise.

    `clip_fraction`: tokens whose gradient the clip took. `gap_mean`, `gap_max`: |proximal - behaviour| in nats.
    `kl_k1`, `kl_k3`: estimates of KL(proximal || current) in nats, how far this update has moved. `importance_weight`:
    mean behaviour weight of the tokens kept. `masked_fraction`: tokens left out by the cap.
    """

    tokens: int
    clip_fraction: float
    gap_mean: float
    gap_max: float
    kl_k1: float
    kl_k3: float
    importance_weight: float
    masked_fraction: float


LossFunction = Callable[[LossTokens, LossConfig, float], tuple[torch.Tensor, LossStatistics]]


def reinforce(tokens: LossTokens, config: LossConfig, denominator: float) -> tuple[torch.Tensor, LossStatistics]:
    """-A log p: the plain policy gradient (Williams 1992); unbiased only where behaviour equals current."""
    advantages = torch.where(tokens.mask, tokens.advantages, 0.0)
    objective = -advantages * torch.where(tokens.mask, tokens.current, 0.0)
    return _aggregate(tokens, denominator, objective, torch.zeros_like(tokens.mask), None)


def clipped(tokens: LossTokens, config: LossConfig, denominator: float) -> tuple[torch.Tensor, LossStatistics]:
    """PPO's clipped surrogate on the ratio current / behaviour (Schulman et al. 2017; GRPO, DAPO's two bounds)."""
    ratio = tokens.log_ratio(tokens.current, tokens.behaviour).exp()
    return _aggregate(tokens, denominator, *_surrogate(tokens, ratio, config), None)


def decoupled(tokens: LossTokens, config: LossConfig, denominator: float) -> tuple[torch.Tensor, LossStatistics]:
    """The clipped surrogate on current / proximal, times the capped importance weight proximal / behaviour.

    Decoupled PPO (Hilton et al. 2021) as in AReaL: stale tokens are corrected for, and a token beyond the cap leaves
    the sum but not the denominator.
    """
    ratio = tokens.log_ratio(tokens.current, tokens.proximal).exp()
    weight = tokens.log_ratio(tokens.proximal, tokens.behaviour).exp()
    return _aggregate(tokens, denominator, *_surrogate(tokens, ratio, config), weight)


LOSSES: Mapping[str, LossFunction] = MappingProxyType(
    {"reinforce": reinforce, "clipped": clipped, "decoupled": decoupled}
)


@dataclass(frozen=True, slots=True)
class TokenWeights:
    """How tokens become one number: `weights` of every token of a sequence, one a sequence, and the denominator."""

    weights: tuple[float, ...]
    denominator: float


def token_mean(lengths: Sequence[int], max_tokens: int) -> TokenWeights:
    """Every token of the whole batch weighs the same (DAPO)."""
    return TokenWeights((1.0,) * len(lengths), float(max(sum(lengths), 1)))


def sequence_mean(lengths: Sequence[int], max_tokens: int) -> TokenWeights:
    """Every sequence weighs the same, so tokens of long ones less (GRPO)."""
    return TokenWeights(tuple(1.0 / max(length, 1) for length in lengths), float(max(len(lengths), 1)))


def constant(lengths: Sequence[int], max_tokens: int) -> TokenWeights:
    """Every token weighs the same whatever the lengths: the denominator is sequences x `max_tokens` (Dr. GRPO)."""
    return TokenWeights((1.0,) * len(lengths), float(max(len(lengths), 1) * max_tokens))


#: Name -> from the lengths (tokens under the mask) of *all* sequences of an update and the limit on a sequence.
AGGREGATIONS: Mapping[str, Callable[[Sequence[int], int], TokenWeights]] = MappingProxyType(
    {"token_mean": token_mean, "sequence_mean": sequence_mean, "constant": constant}
)


def combined(parts: Sequence[LossStatistics]) -> LossStatistics:
    """The statistics of several micro-batches as those of the whole; raises `LossError` when there are none."""
    if not parts:
        raise LossError("there are no statistics to combine: at least one micro-batch is needed")
    tokens = [part.tokens for part in parts]
    used = [part.tokens * (1 - part.masked_fraction) for part in parts]
    means = ("clip_fraction", "gap_mean", "kl_k1", "kl_k3", "masked_fraction")
    return LossStatistics(
        tokens=sum(tokens),
        gap_max=max(part.gap_max for part in parts),
        importance_weight=_mean([part.importance_weight for part in parts], used),
        **{name: _mean([getattr(part, name) for part in parts], tokens) for name in means},
    )


def gap_alarm(gap: float) -> str | None:
    """What to say when the mean gap per token between trainer and rollout (nats) is too large; None when it is not."""
    if gap <= GAP_ALARM:
        return None
    return (
        f"trainer and rollout disagree by {gap:.3f} nats per token (alarm above {GAP_ALARM}, healthy below {GAP_TARGET}"
        "): check that both use the same adapter version, precision and temperature, and that packed sequences do not "
        "see each other"
    )


def k3(log_ratio: torch.Tensor) -> torch.Tensor:
    """r - 1 - log r per token: its mean over tokens sampled under the denominator of r estimates a KL (Schulman)."""
    return torch.expm1(log_ratio) - log_ratio


def _surrogate(tokens: LossTokens, ratio: torch.Tensor, config: LossConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """The clipped objective of each token (N,), and which tokens the clip decided."""
    advantages = torch.where(tokens.mask, tokens.advantages, 0.0)
    plain = -advantages * ratio
    bounded = -advantages * ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    return torch.maximum(plain, bounded), plain < bounded


def _aggregate(
    tokens: LossTokens, denominator: float, objective: torch.Tensor, by_clip: torch.Tensor, weight: torch.Tensor | None
) -> tuple[torch.Tensor, LossStatistics]:
    if not (math.isfinite(denominator) and denominator > 0):
        raise LossError(f"the denominator must be a positive number known in advance, got {denominator}")
    used = tokens.mask if weight is None else tokens.mask & (weight <= WEIGHT_CAP)
    weight = torch.ones_like(tokens.behaviour) if weight is None else weight
    per_token = torch.where(used, objective * weight, 0.0)
    loss = torch.where(tokens.mask, tokens.weights * per_token, 0.0).sum() / denominator
    return loss, _statistics(tokens, by_clip, used, weight)


def _statistics(tokens: LossTokens, by_clip: torch.Tensor, used: torch.Tensor, weight: torch.Tensor) -> LossStatistics:
    with torch.no_grad():
        gap = torch.where(tokens.mask, tokens.proximal - tokens.behaviour, 0.0).abs()
        moved = tokens.log_ratio(tokens.current, tokens.proximal)
        # Finite exactly when every input under the mask is (the clamp of a ratio would hide some).
        total = tokens.current + tokens.proximal + tokens.behaviour + tokens.advantages + tokens.weights
        sums = [
            *(tokens.mask.sum(), used.sum(), (by_clip & used).sum()),
            *(gap.sum(), gap.max() if gap.numel() else gap.sum(), -moved.sum(), k3(moved).sum()),
            *(torch.where(used, weight, 0.0).sum(), torch.where(tokens.mask, total, 0.0).sum()),
        ]
        # One transfer from the device instead of nine.
        values = torch.stack([value.to(gap.device, torch.float64) for value in sums]).tolist()
    if not all(math.isfinite(value) for value in values):
        raise LossError("inputs under the mask are not finite; check the model's outputs, the rollout and the rewards")
    count, used_count, clips, gap_sum, gap_max, k1_sum, k3_sum, weights, _ = values
    share = 1.0 / max(count, 1.0)
    return LossStatistics(
        tokens=int(count),
        clip_fraction=clips * share,
        gap_mean=gap_sum * share,
        gap_max=gap_max,
        kl_k1=k1_sum * share,
        kl_k3=k3_sum * share,
        importance_weight=weights / max(used_count, 1.0),
        masked_fraction=(count - used_count) * share,
    )


def _mean(values: Sequence[float], counts: Sequence[float]) -> float:
    total = sum(counts)
    return sum(value * count for value, count in zip(values, counts, strict=True)) / total if total else 0.0
