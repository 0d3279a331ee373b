"""Report of the demonstration: held-out losses of every model on every domain, as JSON, Markdown and a table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from rich.table import Table

from fedmoe.cli.demo_run.plan import GENERAL, WORKERS
from fedmoe.gateway.evaluate import BASE, LossMatrix

GATEWAY = "gateway"
_EXPERTS = tuple(worker.expert for worker in WORKERS)
_HEAD = ("domain", "base", "own expert", "change", "other experts", "gateway", "gain kept")
_NOTES = (
    "*gain kept* is (base - gateway) / (base - own expert).",
    f"*{GENERAL}* is text of a domain that nobody trained on (a story of 1889): its last column is how much higher the "
    "gateway's loss is there than the base model's. Near 0 says that the gateway forgot nothing.",
)


@dataclass(frozen=True, slots=True)
class DomainResult:
    """Held-out losses on one domain, in nats per token; `others` are the experts of the other domains.

    `improvement`: how much lower the own expert's loss is than the base model's, as a share of it. `gain_kept`: the
    share of the own expert's gain that the gateway keeps; None where there is none.
    """

    base: float
    expert: float
    others: Mapping[str, float]
    gateway: float
    improvement: float
    gain_kept: float | None
    held_out_tokens: int


@dataclass(frozen=True, slots=True)
class GeneralResult:
    """Held-out losses on text of no domain, in nats per token: what the experts and the gateway do to the rest.

    `change`: how much higher the gateway's loss is than the base model's, as a share of it; below 0 it is lower.
    """

    base: float
    experts: Mapping[str, float]
    gateway: float
    change: float
    held_out_tokens: int


def results(matrix: LossMatrix) -> tuple[dict[str, DomainResult], GeneralResult]:
    """The matrix, seen from every domain, and from text that nobody trained on."""
    domains = {}
    for worker in WORKERS:
        base, gateway, others = _losses(matrix, worker.domain)
        own = others.pop(worker.expert)
        retained = (base - gateway) / (base - own) if base != own else None
        tokens = matrix.tokens[worker.domain]
        domains[worker.domain] = DomainResult(base, own, others, gateway, (base - own) / base, retained, tokens)
    base, gateway, experts = _losses(matrix, GENERAL)
    return domains, GeneralResult(base, experts, gateway, (gateway - base) / base, matrix.tokens[GENERAL])


def _losses(matrix: LossMatrix, domain: str) -> tuple[float, float, dict[str, float]]:
    """Of the base model, the gateway, and every expert."""
    experts = {expert: matrix.losses[expert][domain] for expert in _EXPERTS}
    return matrix.losses[BASE][domain], matrix.losses[GATEWAY][domain], experts


def report_json(domains: Mapping[str, DomainResult], general: GeneralResult, facts: Mapping[str, object]) -> str:
    """The report for programs; losses are mean held-out nats per token."""
    rows = {name: asdict(result) for name, result in domains.items()}
    return json.dumps({**facts, "domains": rows, GENERAL: asdict(general)}, indent=2, allow_nan=False) + "\n"


def _rows(domains: Mapping[str, DomainResult], general: GeneralResult) -> list[tuple[str, ...]]:
    rows = []
    for name, result in domains.items():
        change, retained = f"{-100 * result.improvement:.1f} %", result.gain_kept
        losses = (f"{result.base:.3f}", f"{result.expert:.3f}", change, _named(result.others), f"{result.gateway:.3f}")
        rows.append((name, *losses, "-" if retained is None else f"{100 * retained:.0f} %"))
    changed = f"({100 * general.change:+.1f} %)"
    last = (GENERAL, f"{general.base:.3f}", "", "", _named(general.experts), f"{general.gateway:.3f}", changed)
    return [*rows, last]


def _named(losses: Mapping[str, float]) -> str:
    return ", ".join(f"{expert.removesuffix('_expert')} {loss:.3f}" for expert, loss in losses.items())


def report_table(domains: Mapping[str, DomainResult], general: GeneralResult) -> Table:
    """The report for a terminal."""
    table = Table(*_HEAD, title="Held-out loss (nats per token)", title_justify="left")
    for row in _rows(domains, general):
        table.add_row(*row)
    return table


def report_markdown(domains: Mapping[str, DomainResult], general: GeneralResult, facts: Mapping[str, object]) -> str:
    """The report for people."""
    lines = ["# FedMoE demonstration", "", "Held-out loss in nats per token; lower is better.", ""]
    lines += ["| " + " | ".join(_HEAD) + " |", "|" + " --- |" * len(_HEAD)]
    lines += ["| " + " | ".join(row) + " |" for row in _rows(domains, general)]
    lines += ["", _NOTES[0], "", _NOTES[1], "", "![loss](loss.png)", "", "## Facts", ""]
    lines += [f"- {name.replace('_', ' ')}: {json.dumps(value)}" for name, value in facts.items()]
    return "\n".join(lines) + "\n"
