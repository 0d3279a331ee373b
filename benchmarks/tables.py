"""Writes the tables of benchmarks/README.md, docs/scale.md and docs/hardware.md from benchmarks/results.

    python benchmarks/tables.py             # all tables anew
    python benchmarks/tables.py --check     # says which are not those of the results, status 1
    python benchmarks/tables.py --charts    # the charts of merges and of the online gateway too

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`; what stands there is replaced. Text around
it is written by hand.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from lib import (
    tables_arena,
    tables_hardware,
    tables_merge,
    tables_replicas,
    tables_server,
    tables_simulation,
    tables_starts,
)
from lib.harness import RESULTS, ROOT
from lib.table_text import results

DOCUMENTS = (ROOT / "benchmarks" / "README.md", ROOT / "docs" / "scale.md", ROOT / "docs" / "hardware.md")
#: What is not measured yet is here too: as soon as its result is there, a mark in the text shows it.
TABLES: Mapping[str, Callable[[], str]] = {
    "memory_by_base": tables_hardware.memory_by_base,
    "memory_estimate": tables_hardware.memory_estimate,
    "coordinator": tables_server.coordinator,
    "crashes": tables_server.crashes,
    "replicas": tables_replicas.disturbances,
    "page": tables_server.page,
    "runs_page": tables_server.runs_page,
    "replicas_takeovers": tables_replicas.takeovers,
    "replicas_rates": tables_replicas.rates,
    "ray_rollouts": tables_replicas.ray_rollouts,
    "fuzzing": tables_server.fuzzing,
    "recovery": tables_server.recovery,
    "journals": tables_server.journals,
    "fairness": tables_server.fairness,
    "attacks": tables_server.attacks,
    "many_experts": tables_server.many_experts,
    "threads": tables_server.threads,
    "training_step": tables_server.training_step,
    "recompress": tables_server.recompress,
    "against": tables_server.against,
    "auto": tables_server.auto,
    "against_waits": partial(tables_server.against, "against_waits"),
    "startup": tables_starts.startup,
    "tokenize": tables_starts.tokenize,
    "evaluation_gate": tables_server.evaluation_gate,
    "serve_swap": tables_server.serve_swap,
    "arena_modes": tables_arena.arena_modes,
    "arena_modes_by_seed": tables_arena.arena_modes_by_seed,
    "arena_throughput": tables_arena.arena_throughput,
    "merge_quality_demo": partial(tables_merge.merge_quality, "demo"),
    "merge_quality_unseen": partial(tables_merge.merge_quality, "unseen"),
    "merge_quality_ten": partial(tables_merge.merge_quality, "ten"),
    "merge_peers": tables_merge.merge_peers,
    "repeated_merges_demo": partial(tables_merge.repeated_merges, "demo"),
    "repeated_merges_unseen": partial(tables_merge.repeated_merges, "unseen"),
    "repeated_merges_ten": partial(tables_merge.repeated_merges, "ten"),
    "repeated_merges_ten_rank64": partial(tables_merge.repeated_merges, "ten_rank64"),
    "lora_init": tables_merge.lora_init,
    "statistics_budget_demo": partial(tables_merge.statistics_budget, "demo"),
    "statistics_budget_demo_all": partial(tables_merge.statistics_budget_all, "demo"),
    "statistics_budget_unseen": partial(tables_merge.statistics_budget, "unseen"),
    "online_gateway": tables_merge.online_gateway,
    "online_gateway_shares": tables_merge.online_gateway_shares,
    "simulation_scale": tables_simulation.scale,
    "simulation_training": partial(tables_simulation.training, "training"),
    "simulation_deadline": partial(tables_simulation.training, "deadline"),
    "simulation_outages": partial(tables_simulation.training, "outages"),
    "simulation_training_traffic": partial(tables_simulation.traffic, "training"),
    "simulation_int8": partial(tables_simulation.training, "int8"),
    "simulation_int8_traffic": partial(tables_simulation.traffic, "int8"),
    "simulation_robustness": tables_simulation.robustness,
}
_TABLE = re.compile(r"(<!-- table: (\w+) -->\n)(.*?)(<!-- end of table -->)", re.DOTALL)


def written(text: str) -> str:
    """The text with every table as the results have it; raises SystemExit for a mark that names none."""

    def replace(match: re.Match[str]) -> str:
        begin, name, _, end = match.groups()
        if name not in TABLES:
            raise SystemExit(f"the text marks a table {name}, which {Path(__file__).name} does not make")
        return f"{begin}{TABLES[name]()}\n{end}"

    return _TABLE.sub(replace, text)


def outdated(text: str) -> list[str]:
    """The names of the tables that are not those of the results."""
    pairs = zip(_TABLE.findall(text), _TABLE.findall(written(text)), strict=True)
    return [old[1] for old, new in pairs if old != new]


def draw_charts() -> None:
    """Draw both charts from the results."""
    from lib import merge_chart, online_gateway_chart

    (RESULTS / "merge_quality.png").write_bytes(merge_chart.chart())
    gains = [found["gains"] for found in results("online_gateway").values()]
    (RESULTS / "online_gateway.png").write_bytes(online_gateway_chart.chart(gains, online_gateway_chart.MACHINES, 30))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if a table is out of date")
    parser.add_argument("--charts", action="store_true", help="draw the charts as well (needs matplotlib)")
    options = parser.parse_args()
    texts = {document: document.read_text("utf-8") for document in DOCUMENTS}
    if options.check:
        names = [name for text in texts.values() for name in outdated(text)]
        if names:
            print(f"not as the results have it: {', '.join(names)}; write them with: python benchmarks/tables.py")
        sys.exit(1 if names else 0)
    for document, text in texts.items():
        document.write_text(written(text), "utf-8")
    if options.charts:
        draw_charts()


if __name__ == "__main__":
    main()
