"""Policy-gradient losses on flat tensors of tokens, each divided by a constant that is known before the first backward.

A constant denominator makes accumulated micro-batches equal the whole batch, and training beside other policies equal
training alone: no token changes what another one weighs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch

#: Mean |log p_trainer - log p_rollout| per token, in nats: what a healthy pair of engine and trainer stays below,
#: and where something is wrong (other precision, other temperature, packed sequences that see each other).
GAP_TARGET = 0.05
GAP_ALARM = 0.2

# exp() of more overflows into NaN gradients; no token so far from its old probability has anything to teach.
_LOG_RATIO_LIMIT = 20.0


class LossError(ValueError):
    """Tensors or settings that no loss can be computed from."""


@dataclass(frozen=True, slots=True)
class LossConfig:
    """Which loss, and its settings.

    `clip_low`, `clip_high`: the ratio counts within [1 - clip_low, 1 + clip_high]. `dual_clip`: where the advantage is
    negative the ratio counts up to this (above 1; None: no limit). `weight_cap`: the largest behaviour importance
    weight of `decoupled`; beyond it a token is left out (`over_cap` "mask") or weighs the cap ("clamp"), and in both
    cases it still counts in the denominator. `kl_coefficient`: weight of the k3 estimate of KL to the reference.
    """

    loss: str = "decoupled"
    aggregation: str = "token_mean"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    weight_cap: float = 5.0
    over_cap: Literal["mask", "clamp"] = "mask"
    kl_coefficient: float = 0.0

    def __post_init__(self) -> None:
        _known("loss", self.loss, LOSSES)
        _known("aggregation", self.aggregation, AGGREGATIONS)
        _known("over_cap", self.over_cap, ("mask", "clamp"))
        if not (0 <= self.clip_low <= 1 and self.clip_high >= 0):
            raise LossError(f"clip_low is in [0, 1] and clip_high at least 0, got {self.clip_low}, {self.clip_high}")
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise LossError(f"dual_clip must be above 1 (None for no limit), got {self.dual_clip}")
        if not self.weight_cap > 0:
            raise LossError(f"weight_cap must be positive (inf for no cap), got {self.weight_cap}")
        if not (math.isfinite(self.kl_coefficient) and self.kl_coefficient >= 0):
            raise LossError(f"kl_coefficient must be a finite number from 0 on, got {self.kl_coefficient}")


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """What a loss sees of N tokens: every tensor is (N,), on one device; only `current` may carry gradients.

    `current`, `proximal`, `behaviour`, `reference` are natural-logarithm probabilities of the sampled token (float32
    or float64) under the weights being trained, those before this update, those that sampled it, and a fixed model.
    `mask` (bool): the tokens that are learned from; the numbers of the others are never used, not even when NaN.
    `weights` come from the aggregation. Raises `LossError` for shapes and types that do not fit.
    """

    current: torch.Tensor
    proximal: torch.Tensor
    behaviour: torch.Tensor
    advantages: torch.Tensor
    mask: torch.Tensor
    weights: torch.Tensor
    reference: torch.Tensor | None = None

    def __post_init__(self) -> None:
        shape = self.current.shape
        if self.current.ndim != 1:
            raise LossError(f"expected flat tensors (N,), got current of shape {tuple(shape)}")
        if self.mask.dtype != torch.bool:
            raise LossError(f"mask must be a bool tensor, got {self.mask.dtype}")
        for name in ("current", "proximal", "behaviour", "advantages", "mask", "weights", "reference"):
            tensor = getattr(self, name)
            if tensor is None:
                continue
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

    `clip_fraction`, `dual_clip_fraction`: tokens whose gradient the clip took. `gap_mean`, `gap_max`: |proximal -
    behaviour| in nats. `kl_k1`, `kl_k3`: estimates of KL(proximal || current) in nats, how far this update has moved.
    `importance_weight`: mean behaviour weight of the tokens kept. `masked_fraction`: tokens left out by the cap.
    `reference_kl`: k3 estimate of KL(current || reference) in nats, None without a reference.
    """

    tokens: int
    clip_fraction: float
    dual_clip_fraction: float
    gap_mean: float
    gap_max: float
    kl_k1: float
    kl_k3: float
    importance_weight: float
    masked_fraction: float
    reference_kl: float | None


Loss = Callable[[Tokens, LossConfig, float], tuple[torch.Tensor, LossStatistics]]


def reinforce(tokens: Tokens, config: LossConfig, denominator: float) -> tuple[torch.Tensor, LossStatistics]:
    """-A log p: the plain policy gradient (Williams 1992); unbiased only where behaviour equals current."""
    advantages = torch.where(tokens.mask, tokens.advantages, 0.0)
    objective = -advantages * torch.where(tokens.mask, tokens.current, 0.0)
    return _aggregate(tokens, config, denominator, _Surrogate.unclipped(objective), None)


def clipped(tokens: Tokens, config: LossConfig, denominator: float) -> tuple[torch.Tensor, LossStatistics]:
    """PPO's clipped surrogate on the ratio current / behaviour (Schulman et al. 2017; GRPO, DAPO's two bounds)."""
    ratio = tokens.log_ratio(tokens.current, tokens.behaviour).exp()
    return _aggregate(tokens, config, denominator, _surrogate(tokens, ratio, config), None)


def decoupled(tokens: Tokens, config: LossConfig, denominator: float) -> tuple[torch.Tensor, LossStatistics]:
    """The clipped surrogate on current / proximal, times the capped importance weight proximal / behaviour.

    Decoupled PPO (Hilton et al. 2021) as in AReaL: stale tokens are corrected for, and a token beyond the cap leaves
    the sum but not the denominator.
    """
    ratio = tokens.log_ratio(tokens.current, tokens.proximal).exp()
    weight = tokens.log_ratio(tokens.proximal, tokens.behaviour).exp()
    return _aggregate(tokens, config, denominator, _surrogate(tokens, ratio, config), weight)


LOSSES: Mapping[str, Loss] = MappingProxyType({"reinforce": reinforce, "clipped": clipped, "decoupled": decoupled})


@dataclass(frozen=True, slots=True)
class Aggregation:
    """How tokens become one number: `weights` of every token of a sequence, one a sequence, and the denominator."""

    weights: tuple[float, ...]
    denominator: float


def token_mean(lengths: Sequence[int], max_tokens: int) -> Aggregation:
    """Every token of the whole batch weighs the same (DAPO)."""
    return Aggregation((1.0,) * len(lengths), float(max(sum(lengths), 1)))


def sequence_mean(lengths: Sequence[int], max_tokens: int) -> Aggregation:
    """Every sequence weighs the same, so tokens of long ones less (GRPO)."""
    return Aggregation(tuple(1.0 / max(length, 1) for length in lengths), float(max(len(lengths), 1)))


def constant(lengths: Sequence[int], max_tokens: int) -> Aggregation:
    """Every token weighs the same whatever the lengths: the denominator is sequences x `max_tokens` (Dr. GRPO)."""
    return Aggregation((1.0,) * len(lengths), float(max(len(lengths), 1) * max_tokens))


#: Name -> from the lengths (tokens under the mask) of *all* sequences of an update and the limit on a sequence.
AGGREGATIONS: Mapping[str, Callable[[Sequence[int], int], Aggregation]] = MappingProxyType(
    {"token_mean": token_mean, "sequence_mean": sequence_mean, "constant": constant}
)


def combined(parts: Sequence[LossStatistics]) -> LossStatistics:
    """The statistics of several micro-batches as those of the whole; raises `LossError` when there are none."""
    if not parts:
        raise LossError("there are no statistics to combine: at least one micro-batch is needed")
    tokens = [part.tokens for part in parts]
    kept = [part.tokens * (1 - part.masked_fraction) for part in parts]
    kls = [part.reference_kl for part in parts if part.reference_kl is not None]
    if len(kls) not in (0, len(parts)):
        raise LossError("some micro-batches have a reference and some have none; they cannot be combined")
    return LossStatistics(
        tokens=sum(tokens),
        clip_fraction=_mean([part.clip_fraction for part in parts], tokens),
        dual_clip_fraction=_mean([part.dual_clip_fraction for part in parts], tokens),
        gap_mean=_mean([part.gap_mean for part in parts], tokens),
        gap_max=max(part.gap_max for part in parts),
        kl_k1=_mean([part.kl_k1 for part in parts], tokens),
        kl_k3=_mean([part.kl_k3 for part in parts], tokens),
        importance_weight=_mean([part.importance_weight for part in parts], kept),
        masked_fraction=_mean([part.masked_fraction for part in parts], tokens),
        reference_kl=_mean(kls, tokens) if kls else None,
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


@dataclass(frozen=True, slots=True, eq=False)
class _Surrogate:
    """The objective of each token (N,), and which tokens the two clips decided."""

    objective: torch.Tensor
    clipped: torch.Tensor
    dual_clipped: torch.Tensor

    @classmethod
    def unclipped(cls, objective: torch.Tensor) -> _Surrogate:
        nowhere = torch.zeros_like(objective, dtype=torch.bool)
        return cls(objective, nowhere, nowhere)


def _surrogate(tokens: Tokens, ratio: torch.Tensor, config: LossConfig) -> _Surrogate:
    advantages = torch.where(tokens.mask, tokens.advantages, 0.0)
    plain = -advantages * ratio
    bounded = -advantages * ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    objective = torch.maximum(plain, bounded)
    by_clip = plain < bounded
    if config.dual_clip is None:
        return _Surrogate(objective, by_clip, torch.zeros_like(by_clip))
    ceiling = config.dual_clip * advantages.abs()
    by_dual = ceiling < objective
    return _Surrogate(torch.minimum(objective, ceiling), by_clip, by_dual)


def _aggregate(
    tokens: Tokens, config: LossConfig, denominator: float, surrogate: _Surrogate, weight: torch.Tensor | None
) -> tuple[torch.Tensor, LossStatistics]:
    if not (math.isfinite(denominator) and denominator > 0):
        raise LossError(f"the denominator must be a positive number known in advance, got {denominator}")
    kept, weight = _capped(tokens, config, weight)
    per_token = torch.where(kept, surrogate.objective * weight, 0.0)
    divergence = _reference_kl(tokens, config)
    if divergence is not None and config.kl_coefficient > 0:
        per_token = per_token + config.kl_coefficient * divergence
    loss = torch.where(tokens.mask, tokens.weights * per_token, 0.0).sum() / denominator
    return loss, _statistics(tokens, surrogate, kept, weight, divergence)


def _capped(tokens: Tokens, config: LossConfig, weight: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens that stay, and what each weighs."""
    if weight is None:
        return tokens.mask, torch.ones_like(tokens.behaviour)
    if config.over_cap == "clamp":
        return tokens.mask, weight.clamp(max=config.weight_cap)
    return tokens.mask & (weight <= config.weight_cap), weight


def _reference_kl(tokens: Tokens, config: LossConfig) -> torch.Tensor | None:
    """k3 per token (Schulman, "Approximating KL divergence"): r - 1 - log r with r = reference / current."""
    if tokens.reference is None:
        if config.kl_coefficient > 0:
            raise LossError("kl_coefficient is above 0, but there are no reference log-probabilities; give them")
        return None
    return _k3(tokens.log_ratio(tokens.reference, tokens.current))


def _k3(log_ratio: torch.Tensor) -> torch.Tensor:
    return torch.expm1(log_ratio) - log_ratio


def _statistics(
    tokens: Tokens, surrogate: _Surrogate, kept: torch.Tensor, weight: torch.Tensor, divergence: torch.Tensor | None
) -> LossStatistics:
    with torch.no_grad():
        gap = torch.where(tokens.mask, tokens.proximal - tokens.behaviour, 0.0).abs()
        moved = tokens.log_ratio(tokens.current, tokens.proximal)
        sums = [
            *(tokens.mask.sum(), kept.sum(), (surrogate.clipped & kept).sum(), (surrogate.dual_clipped & kept).sum()),
            *(gap.sum(), gap.max() if gap.numel() else gap.sum(), -moved.sum(), _k3(moved).sum()),
            torch.where(kept, weight, 0.0).sum(),
            torch.zeros(()) if divergence is None else divergence.sum(),
            _soundness(tokens),
        ]
        # One transfer from the device instead of eleven.
        values = torch.stack([value.to(gap.device, torch.float64) for value in sums]).tolist()
    if not all(math.isfinite(value) for value in values):
        raise LossError("inputs under the mask are not finite; check the model's outputs, the rollout and the rewards")
    count, kept_count, by_clip, by_dual, gap_sum, gap_max, k1, k3, weights, reference, _ = values
    share = 1.0 / max(count, 1.0)
    return LossStatistics(
        tokens=int(count),
        clip_fraction=by_clip * share,
        dual_clip_fraction=by_dual * share,
        gap_mean=gap_sum * share,
        gap_max=gap_max,
        kl_k1=k1 * share,
        kl_k3=k3 * share,
        importance_weight=weights / max(kept_count, 1.0),
        masked_fraction=(count - kept_count) * share,
        reference_kl=None if divergence is None else reference * share,
    )


def _soundness(tokens: Tokens) -> torch.Tensor:
    """A number that is finite exactly when every input under the mask is (the clamp of a ratio would hide some)."""
    total = tokens.current + tokens.proximal + tokens.behaviour + tokens.advantages + tokens.weights
    if tokens.reference is not None:
        total = total + tokens.reference
    return torch.where(tokens.mask, total, 0.0).sum()


def _mean(values: Sequence[float], counts: Sequence[float]) -> float:
    total = sum(counts)
    return sum(value * count for value, count in zip(values, counts, strict=True)) / total if total else 0.0


def _known(what: str, name: str, names: Mapping[str, object] | Sequence[str]) -> None:
    if name not in names:
        raise LossError(f"{what} {name!r} is not known; there are: {', '.join(names)}")
