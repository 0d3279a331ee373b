"""Reports of an evaluation: rows for a table, JSON for programs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict

from fedmoe.gateway.losses import BASE, LossMatrix
from fedmoe.gateway.retained_gain import BootstrapInterval, RetainedGains

Table = tuple[Sequence[str], list[Sequence[str]]]


def own_experts(domains: Iterable[str], experts: Iterable[str]) -> dict[str, str]:
    """domain -> its own expert, the one called `DOMAIN` or `DOMAIN_expert`; domains without one are left out."""
    names = set(experts)
    pairs = ((domain, expert) for domain in domains for expert in (f"{domain}_expert", domain))
    return {domain: expert for domain, expert in pairs if expert in names}


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


def retained_table(gains: RetainedGains) -> Table:
    """Gain kept by every model on every domain that has an own expert, then its worst and its mean."""
    models = list(gains.domains[0].retained)
    rows: list[Sequence[str]] = []
    for domain in gains.domains:
        gain = f"{domain.own_gain.value:.3f} ({domain.own_gain.low:.3f} to {domain.own_gain.high:.3f})"
        mark = "" if domain.warning is None else " ?"
        rows.append(
            (domain.domain + mark, domain.expert, gain, *(_percent(domain.retained[model]) for model in models))
        )
    if gains.summaries:
        summaries = [gains.summaries[model] for model in models]
        rows.append(("worst", "", "", *(f"{_percent(entry.worst)}, {entry.worst_domain}" for entry in summaries)))
        rows.append(("mean", "", "", *(_percent(entry.mean) for entry in summaries)))
    return ("domain", "own expert", "own gain (nats)", *models), rows


def _percent(share: BootstrapInterval) -> str:
    return f"{100 * share.value:.0f} % ({100 * share.low:.0f} to {100 * share.high:.0f})"


def report_json(matrix: LossMatrix, gains: RetainedGains | None) -> dict[str, object]:
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
    if gains is not None:
        content["retained"] = {
            domain.domain: {
                "expert": domain.expert,
                "own_gain": _interval(domain.own_gain),
                "kept": {model: _interval(share) for model, share in domain.retained.items()},
                "warning": domain.warning,
            }
            for domain in gains.domains
        }
        content["summary"] = {
            model: {"worst_domain": entry.worst_domain, "worst": _interval(entry.worst), "mean": _interval(entry.mean)}
            for model, entry in gains.summaries.items()
        }
    return content


def _interval(interval: BootstrapInterval) -> dict[str, float | None]:
    return {name: _number(value) for name, value in asdict(interval).items()}


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
