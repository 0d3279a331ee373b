"""Chooses the adapter for a prompt: reranks the router's top experts and the merged adapter by likelihood.

A router knows whose prompts look like this one, an adapter whether it can do anything with it. Experts that a router
cannot tell apart are told apart by the likelihood that each gives the prompt, and a prompt of no expert's domain shows
in the merged adapter explaining it better. That needs nothing but the adapters themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedmoe.lora.adapter import Float64Array

#: How many experts are looked at again, and how likely one must be for that.
MOST, LEAST = 3, 0.01
#: Of a long prompt so many tokens, its first, are enough.
SEEN = 128
#: What a nat of log-likelihood counts beside a nat of the router's: tokens of one text say the same again and again,
#: and experts are no calibrated models of their domains.
TRUST = 0.2
#: What the merged adapter starts with: beside a sure router it has to explain a prompt better by -ln(0.8) / TRUST = 1.1
#: nats to get it, and where the router knows nothing it gets the prompt unless an expert explains it better by far.
MERGED_PRIOR = 0.8


@dataclass(frozen=True, slots=True)
class ExpertCandidates:
    """The tokens of a prompt to look at again, and the natural logarithm of each likely expert's probability."""

    text: tuple[int, ...]
    log_priors: Mapping[str, float]


def candidates(text: Sequence[int], names: Sequence[str], probabilities: Float64Array) -> ExpertCandidates:
    """The likeliest experts of one prompt: `probabilities` (experts,) as a router gives them for `names`."""
    likely = [place for place in np.argsort(-probabilities, kind="stable")[:MOST] if probabilities[place] >= LEAST]
    # A row of many experts, all alike, may leave none above LEAST; the likeliest always stays.
    likely = likely or [np.argmax(probabilities)]
    return ExpertCandidates(tuple(text[:SEEN]), {names[place]: float(np.log(probabilities[place])) for place in likely})


def choose(candidates: ExpertCandidates, log_likelihoods: Mapping[str, float], merged: str) -> str:
    """The expert or `merged` with the highest ln prior + TRUST ln p(text); ties go to the first name.

    `log_likelihoods` are in nats, by name: of every candidate, and of `merged` where there is a merged adapter. Raises
    ValueError for one that is missing or not a number.
    """
    priors = dict(candidates.log_priors)
    if merged in log_likelihoods:
        priors[merged] = float(np.log(MERGED_PRIOR))
    scores = {name: prior + TRUST * log_likelihoods.get(name, np.nan) for name, prior in priors.items()}
    wrong = sorted(name for name, score in scores.items() if not np.isfinite(score))
    if wrong:
        raise ValueError(f"a finite log-likelihood is needed of {', '.join(priors)}; there is none of {wrong[:5]}")
    return min(scores, key=lambda name: (-scores[name], name))
