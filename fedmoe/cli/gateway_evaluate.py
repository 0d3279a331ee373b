"""`fedmoe gateway evaluate`: held-out losses of all models, and the gain that the gateway keeps."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedmoe.cli.gateway_export import GATEWAY, base_of, pull
from fedmoe.cli.gateway_options import EVALUATE_OPTIONS, coordinator_of
from fedmoe.cli.options import AsJson, configured, federation_base, loaded, template_of
from fedmoe.cli.output import CommandError, importing, show_json, show_table
from fedmoe.config import GatewayConfig
from fedmoe.gateway.routers import SequenceRouter
from fedmoe.lora.adapter import Adapter
from fedmoe.lora.manifest import BaseModel
from fedmoe.lora.prompt_statistics import PromptStatistics
from fedmoe.lora.safetensors_bytes import CodecError
from fedmoe.runtime.errors import RefusedError
from fedmoe.runtime.files import write_atomic
from fedmoe.wire.client import CoordinatorClient

if TYPE_CHECKING:
    from fedmoe.datasets.row_scan import RowOptions
    from fedmoe.datasets.tokens.packing import Block
    from fedmoe.gateway.losses import LossMatrix
    from fedmoe.gateway.retained_gain import RetainedGains
    from fedmoe.models.base import LoadedBase

#: The row of the routed gateway.
ROUTED = "routed"
# Rows with a meaning of their own; an expert of such a name would take their place.
_RESERVED = frozenset({"base", GATEWAY, ROUTED})


@configured(GatewayConfig, EVALUATE_OPTIONS)
def evaluate(
    config: GatewayConfig,
    domains: Annotated[
        list[str],
        typer.Option(
            "--domain",
            metavar="NAME=FILE",
            help="Held-out data; the expert NAME or NAME_expert is the domain's own. Repeat it for each domain.",
        ),
    ],
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the results into this PNG file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure base model, every expert and the gateway on every domain, and how much of each gain the gateway keeps.

    Where the workers of two experts have told of their prompts, the routed gateway too: every block by the expert that
    its first 32 tokens are routed to.
    """
    from fedmoe.datasets.row_scan import RowOptions
    from fedmoe.gateway.evaluate import held_out_blocks
    from fedmoe.gateway.evaluation_report import own_experts
    from fedmoe.gateway.export import check_base
    from fedmoe.gateway.retained_gain import retained_gains
    from fedmoe.models.prepare_data import DataOptions

    rows = RowOptions.mapping(config.map)
    files = _files(domains, rows)
    chat = template_of(config.chat_template, config.chat_template_kwargs)
    with coordinator_of(config) as api:
        adapters, identity = _models(api)
        prompts = _prompt_statistics(api, adapters.keys())
        place = federation_base(api, config.base_model)
    base = loaded(place, config.device, chat)
    check_base("the experts were", identity, base.identity.name, base.identity.weights_hash)
    length, blocks, options = config.max_length, config.blocks, DataOptions(rows)
    held_out = {
        name: held_out_blocks(file, base, length, blocks, options, lambda report: _note(report.text))
        for name, file in files.items()
    }
    matrix = _measure(base, adapters, held_out, config.batch_size, prompts)
    own, judged = own_experts(matrix.domains, matrix.models), [m for m in (GATEWAY, ROUTED) if m in matrix.models]
    # None without a model to judge or a domain with an own expert.
    gains = retained_gains(matrix, own, judged) if own and judged else None
    _show(matrix, gains, as_json)
    if plot is not None:
        _draw(plot, matrix, gains, identity.name)


def _note(text: str) -> None:
    print(text, file=sys.stderr)


def _files(domains: Sequence[str], rows: RowOptions) -> dict[str, str]:
    """Domain -> its data, of which the first rows have been looked at."""
    from fedmoe.datasets.readers.common import DataError
    from fedmoe.datasets.row_scan import check_beginning

    files: dict[str, str] = {}
    for domain in domains:
        name, separator, file = domain.partition("=")
        if not (name and separator and file) or name in files:
            raise CommandError(f"--domain takes NAME=FILE, every name once; got {domain!r}")
        try:
            check_beginning(file, rows)
        except DataError as error:
            raise CommandError(f"--domain {name}: {error}") from error
        files[name] = file
    return files


def _models(api: CoordinatorClient) -> tuple[dict[str, Adapter], BaseModel]:
    """Every expert, then the gateway where there is one, and the base model they belong on."""
    listing = api.list_experts()
    experts = [expert.name for expert in listing.experts]
    for name in sorted(_RESERVED.intersection(experts)):
        _note(f"warning: the expert {name} is left out: here {name} means something else")
    names = [name for name in experts if name not in _RESERVED] + ([GATEWAY] if listing.gateway else [])
    if not names:
        raise CommandError("this federation has no experts yet; start a worker first")
    pulled = {name: pull(api, name) for name in names}
    return {name: model.adapter for name, model in pulled.items()}, base_of(pulled[names[0]])


def _prompt_statistics(api: CoordinatorClient, models: Set[str]) -> dict[str, PromptStatistics]:
    """What the workers of the experts in `models` tell of their prompts; empty where nothing can be routed."""
    if GATEWAY not in models:
        _note("not routed: this federation has no gateway")
        return {}
    statistics = {}
    for expert in api.list_experts().experts:
        if expert.prompts is None or expert.name not in models - _RESERVED:
            continue
        try:
            statistics[expert.name] = PromptStatistics.from_bytes(api.data_statistics(expert.name, "prompts"))
        except (CodecError, RefusedError) as error:
            _note(f"warning: nothing is routed to {expert.name}: {error}")
    if len(statistics) < 2:
        _note("not routed: fewer than two experts have prompt statistics")
    return statistics if len(statistics) > 1 else {}


def _measure(
    base: LoadedBase,
    adapters: Mapping[str, Adapter],
    held_out: Mapping[str, Sequence[Block]],
    batch_size: int,
    prompts: Mapping[str, PromptStatistics],
) -> LossMatrix:
    from fedmoe.gateway.evaluate import evaluate as measure
    from fedmoe.gateway.evaluate import routed_to

    matrix = measure(base, adapters, held_out, batch_size, _note)
    if not prompts:
        return matrix
    choices = routed_to(base, SequenceRouter.fit(prompts), adapters, held_out, GATEWAY)
    return matrix.with_rows({ROUTED: matrix.routed(choices)})


def _show(matrix: LossMatrix, gains: RetainedGains | None, as_json: bool) -> None:
    from fedmoe.gateway.evaluation_report import loss_table, report_json, retained_table

    if as_json:
        show_json(report_json(matrix, gains))
        return
    show_table("Held-out loss (nats per token)", *loss_table(matrix))
    if gains is not None:
        show_table("Gain kept, with 95 % intervals", *retained_table(gains))
        for warning in gains.warnings:
            _note(f"warning: {warning}")


def _draw(file: Path, matrix: LossMatrix, gains: RetainedGains | None, base: str) -> None:
    with importing("charts"):
        from fedmoe.monitor.charts.gateway import GatewayResults, gateway_figure
        from fedmoe.monitor.picture import png
    from fedmoe.monitor.arena_series import Estimate

    domains = gains.domains if gains is not None else ()
    retained = {
        domain.domain: {name: Estimate(share.value, share.low, share.high) for name, share in domain.retained.items()}
        for domain in domains
    }
    results = GatewayResults(
        matrix.losses,
        {domain.domain: domain.expert for domain in domains},
        retained,
        [domain.domain for domain in domains if domain.warning],
        f"{base}  ·  held-out tokens: " + ", ".join(f"{name} {count:,}" for name, count in matrix.tokens.items()),
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, png(gateway_figure(results)), 0o644)
    _note(f"drew {file}")
