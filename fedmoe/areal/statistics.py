"""The statistics of one update by AReaL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedmoe.lora.adapter import FloatArray

_PREFIX = "ppo_actor/update/"
# Our name -> AReaL's.
_MEANS = {
    "loss": "actor_loss/avg",
    "gradient_norm": "grad_norm",
    "learning_rate": "lr",
    "clip_fraction": "clip_ratio/avg",
    "importance_weight": "behave_imp_weight/avg",
    "masked_fraction": "rs_filtered_fraction",
    "entropy": "entropy/avg",
}


@dataclass(frozen=True, slots=True)
class ArealUpdate:
    """Statistics of one update; means are over its tokens.

    `version`: the version before. `steps`, `skipped_steps`: optimizer steps taken, and left out because the gradient
    was not finite. `loss` is what was minimised, `entropy` in nats. `clip_fraction`: tokens whose gradient the clip
    took. `importance_weight`: mean of proximal / behaviour over the tokens kept. `masked_fraction`: tokens left out by
    the cap. `gap_mean`, `gap_max`: |proximal - behaviour| in nats. `kl_k1`: estimate of KL(proximal || current) in
    nats, 0 with one minibatch, because it is taken before each step. `moved`: k3 estimate of KL(behaviour || proximal)
    in nats.
    """

    version: int
    examples: int
    tokens: int
    steps: int
    skipped_steps: int
    loss: float
    gradient_norm: float
    learning_rate: float
    clip_fraction: float
    importance_weight: float
    masked_fraction: float
    entropy: float
    kl_k1: float
    gap_mean: float
    gap_max: float
    moved: float


def summarise(
    exported: Sequence[Mapping[str, float]], log_ratio: FloatArray, version: int, examples: int
) -> ArealUpdate:
    """The update from AReaL's statistics of each minibatch, weighed by tokens, and log(proximal / behaviour)."""
    gap = np.abs(log_ratio)
    tokens = np.array([_read(part, "n_valid_tokens") for part in exported])
    taken = sum(1 for part in exported if _read(part, "update_successful") == 1.0)

    def mean(name: str) -> float:
        return float(np.average([_read(part, name) for part in exported], weights=tokens))

    return ArealUpdate(
        version=version,
        examples=examples,
        tokens=int(tokens.sum()),
        steps=taken,
        skipped_steps=len(exported) - taken,
        kl_k1=-mean("approx_kl/avg"),
        gap_mean=float(gap.mean()),
        gap_max=float(gap.max()),
        moved=float((np.expm1(log_ratio) - log_ratio).mean()),
        **{ours: mean(theirs) for ours, theirs in _MEANS.items()},
    )


def _read(part: Mapping[str, float], name: str) -> float:
    try:
        return float(part[_PREFIX + name])
    except KeyError:
        raise RuntimeError(f"AReaL gave no statistic {_PREFIX + name}; this learner needs areal==1.0.4") from None
