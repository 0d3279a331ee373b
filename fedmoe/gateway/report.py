"""What an evaluation says: rows for a table, JSON for programs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict

from fedmoe.gateway.losses import BASE, LossMatrix
from fedmoe.gateway.retained_gain import Interval, Retained

Table = tuple[Sequence[str], list[Sequence[str]]]


def own_experts(domains: Iterable[str], experts: Iterable[str]) -> dict[str, str]:
    """domain -> its own expert, the one called `DOMAIN` or `DOMAIN_expert`; domains without one are left out."""
    known = set(experts)
    found = {domain: [name for name in (domain, f"{domain}_expert") if name in known] for domain in domains}
    return {domain: names[0] for domain, names in found.items() if names}


def loss_table(matrix: LossMatrix) -> Table:
    """Loss of every model on every domain, with its change against the base model."""
    rows = []
    for model in matrix.models:
        cells = []
        for domain in matrix.domains:
            loss, base = matrix.losses[model][domain], matrix.losses[BASE][domain]
            cells.append(f"{loss:.4f}" if model == BASE else f"{loss:.4f} ({loss - base:+.3f})")
        rows.append((model, *cells))
    tokens = ("tokens", *(f"{matrix.tokens[domain]:,}" for domain in matrix.domains))
    return ("model", *matrix.domains), [*rows, tokens]


def retained_table(found: Retained) -> Table:
    """Gain kept by every model on every domain that has an own expert, then its worst and its mean."""
    models = list(found.domains[0].kept)
    rows: list[Sequence[str]] = []
    for domain in found.domains:
        gain = f"{domain.own_gain.value:.3f} ({domain.own_gain.low:.3f} to {domain.own_gain.high:.3f})"
        mark = "" if domain.warning is None else " ?"
        rows.append((domain.domain + mark, domain.expert, gain, *(_percent(domain.kept[model]) for model in models)))
    if found.summaries:
        worst = [found.summaries[model] for model in models]
        rows.append(("worst", "", "", *(f"{_percent(one.worst)}, {one.worst_domain}" for one in worst)))
        rows.append(("mean", "", "", *(_percent(one.mean) for one in worst)))
    return ("domain", "own expert", "own gain (nats)", *models), rows


def _percent(share: Interval) -> str:
    return f"{100 * share.value:.0f} % ({100 * share.low:.0f} to {100 * share.high:.0f})"


def report_json(matrix: LossMatrix, found: Retained | None) -> dict[str, object]:
    """JSON types only; losses in nats per token, shares of the own expert's gain, null for what is no number."""
    content: dict[str, object] = {
        "losses": {model: dict(row) for model, row in matrix.losses.items()},
        "tokens": dict(matrix.tokens),
        "block_losses": {
            model: {domain: [_number(loss) for loss in losses] for domain, losses in row.items()}
            for model, row in matrix.block_losses.items()
        },
        "block_tokens": {domain: list(counts) for domain, counts in matrix.block_tokens.items()},
    }
    if found is not None:
        content["retained"] = {
            domain.domain: {
                "expert": domain.expert,
                "own_gain": _interval(domain.own_gain),
                "kept": _intervals(domain.kept),
                "warning": domain.warning,
            }
            for domain in found.domains
        }
        content["summary"] = {
            model: {"worst_domain": one.worst_domain, "worst": _interval(one.worst), "mean": _interval(one.mean)}
            for model, one in found.summaries.items()
        }
    return content


def _intervals(shares: Mapping[str, Interval]) -> dict[str, object]:
    return {model: _interval(share) for model, share in shares.items()}


def _interval(interval: Interval) -> dict[str, float | None]:
    return {name: _number(value) for name, value in asdict(interval).items()}


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
