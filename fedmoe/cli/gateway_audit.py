"""`fedmoe gateway audit`."""

from __future__ import annotations

from fedmoe.cli.gateway_export import pull
from fedmoe.cli.options import DEFAULT_URL, AsJson, CoordinatorUrl, Token, client
from fedmoe.cli.output import CommandError, show_json, show_table
from fedmoe.lora.diagnostics import MergeAudit, Overlap
from fedmoe.lora.diagnostics import audit as audited


def audit(coordinator_url: CoordinatorUrl = DEFAULT_URL, token: Token = None, as_json: AsJson = False) -> None:
    """Show how large the experts are, how much each two of them share, and which rank their sum will need."""
    with client(coordinator_url, token) as api:
        names = [expert.name for expert in api.list_experts().experts]
        if not names:
            raise CommandError("this federation has no experts yet; start a worker first")
        found = audited({name: pull(api, name).adapter for name in names})
    if as_json:
        show_json(found.to_dict())
    else:
        _show(found)


def _show(found: MergeAudit) -> None:
    show_table("Experts", ("expert", "norm of B A"), [(name, f"{norm:.4g}") for name, norm in found.norms.items()])
    if found.pairs:
        rows = [(pair.first, pair.second, _cosines(pair.inputs), _cosines(pair.outputs)) for pair in found.pairs]
        columns = ("expert", "and", "inputs in common", "outputs in common")
        show_table("Cosines of the angles between them, median and largest: 1 same, 0 separate", columns, rows)
    print(
        f"their sum has rank {found.stacked_rank}; rank {found.predicted_rank} keeps {100 * found.energy:g} % of the "
        "energy of every module"
    )


def _cosines(overlap: Overlap) -> str:
    return f"{overlap.median:.2f}, {overlap.maximum:.2f}"
