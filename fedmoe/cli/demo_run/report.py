"""Report of the demonstration: held-out losses of every model on every domain, as JSON, Markdown and a table."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

from rich.table import Table

from fedmoe.cli.demo_run.plan import GENERAL, WORKERS
from fedmoe.gateway.evaluate import BASE, LossMatrix

GATEWAY = "gateway"


@dataclass(frozen=True, slots=True)
class DomainResult:
    """Held-out losses on one domain, in nats per token; `others` are the experts of the other domains."""

    base: float
    expert: float
    gateway: float
    others: Mapping[str, float]
    tokens: int

    @property
    def improvement(self) -> float:
        """How much lower the own expert's loss is than the base model's, as a share of it."""
        return (self.base - self.expert) / self.base

    @property
    def gain_kept(self) -> float:
        """The share of the own expert's gain that the gateway keeps."""
        gain = self.base - self.expert
        return (self.base - self.gateway) / gain if gain != 0 else float("nan")


@dataclass(frozen=True, slots=True)
class GeneralResult:
    """Held-out losses on text of no domain, in nats per token: what the experts and the gateway do to the rest."""

    base: float
    experts: Mapping[str, float]
    gateway: float
    tokens: int

    @property
    def change(self) -> float:
        """How much higher the gateway's loss is than the base model's, as a share of it; below 0 it is lower."""
        return (self.gateway - self.base) / self.base


def general_result(matrix: LossMatrix) -> GeneralResult:
    """The column of text that nobody trained on."""
    losses = {name: matrix.losses[name][GENERAL] for name in (BASE, GATEWAY, *(w.expert for w in WORKERS))}
    experts = {worker.expert: losses[worker.expert] for worker in WORKERS}
    return GeneralResult(losses[BASE], experts, losses[GATEWAY], matrix.tokens[GENERAL])


def results(matrix: LossMatrix) -> dict[str, DomainResult]:
    """The matrix, seen from every domain."""
    domains = {}
    for worker in WORKERS:
        losses = {model: matrix.losses[model][worker.domain] for model in (BASE, GATEWAY, *(w.expert for w in WORKERS))}
        base, gateway, own = losses.pop(BASE), losses.pop(GATEWAY), losses.pop(worker.expert)
        domains[worker.domain] = DomainResult(base, own, gateway, losses, matrix.tokens[worker.domain])
    return domains


def report_json(domains: Mapping[str, DomainResult], general: GeneralResult, facts: Mapping[str, object]) -> str:
    """The report for programs; losses are mean held-out nats per token."""
    content = {
        **facts,
        "domains": {
            name: {
                "base": result.base,
                "expert": result.expert,
                "others": dict(result.others),
                "gateway": result.gateway,
                "improvement": result.improvement,
                "gain_kept": result.gain_kept if math.isfinite(result.gain_kept) else None,
                "held_out_tokens": result.tokens,
            }
            for name, result in domains.items()
        },
        GENERAL: {
            "base": general.base,
            "experts": dict(general.experts),
            "gateway": general.gateway,
            "change": general.change,
            "held_out_tokens": general.tokens,
        },
    }
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def _rows(domains: Mapping[str, DomainResult], general: GeneralResult) -> list[tuple[str, ...]]:
    rows = [
        (
            name,
            f"{result.base:.3f}",
            f"{result.expert:.3f}",
            f"{-100 * result.improvement:.1f} %",
            _named(result.others),
            f"{result.gateway:.3f}",
            f"{100 * result.gain_kept:.0f} %",
        )
        for name, result in domains.items()
    ]
    changed = f"({100 * general.change:+.1f} %)"
    last = (GENERAL, f"{general.base:.3f}", "", "", _named(general.experts), f"{general.gateway:.3f}", changed)
    return [*rows, last]


def _named(losses: Mapping[str, float]) -> str:
    return ", ".join(f"{expert.removesuffix('_expert')} {loss:.3f}" for expert, loss in losses.items())


_HEAD = ("domain", "base", "own expert", "change", "other experts", "gateway", "gain kept")


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
    lines += ["", "*gain kept* is (base - gateway) / (base - own expert).", "", _GENERAL, ""]
    lines += ["![loss](loss.png)", "", "## Facts", ""]
    lines += [f"- {name.replace('_', ' ')}: {json.dumps(value)}" for name, value in facts.items()]
    return "\n".join(lines) + "\n"


_GENERAL = (
    f"*{GENERAL}* is text of a domain that nobody trained on (a story of 1889): its last column is how much higher the "
    "gateway's loss is there than the base model's. Near 0 says that the gateway forgot nothing."
)
