"""`fedmoe gateway` and `get_gateway_model.py`: show, save, audit and try the gateway."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from fedmoe.cli.experts import show_listing
from fedmoe.cli.gateway_evaluate import evaluate
from fedmoe.cli.gateway_export import GATEWAY, export, pull
from fedmoe.cli.gateway_options import GENERATE_OPTIONS, coordinator_of
from fedmoe.cli.options import (
    DEFAULT_URL,
    AsJson,
    CoordinatorUrl,
    Token,
    client,
    configured,
    federation_base,
    loaded,
    template_of,
    with_client,
)
from fedmoe.cli.output import CommandError, reserved_output, say, show_json, show_table
from fedmoe.cli.serve import serve
from fedmoe.config import GatewayConfig
from fedmoe.lora.diagnostics import MergeAudit, Overlap
from fedmoe.lora.diagnostics import audit as merge_audit
from fedmoe.lora.formats import npz_bytes
from fedmoe.runtime.files import write_atomic
from fedmoe.wire.client import CoordinatorClient, PulledGateway
from fedmoe.wire.contract.experts import GatewayInfo

app = typer.Typer(help="Look at the gateway, save it, export it, try it.", no_args_is_help=True)


@app.command()
@with_client()
def info(api: CoordinatorClient, as_json: AsJson = False) -> None:
    """Print the gateway's version, sources and shapes."""
    _show_info(api.gateway_info(merged=True), as_json)


def _show_info(gateway: GatewayInfo, as_json: bool) -> None:
    if as_json:
        show_json(gateway)
        return
    sources = ", ".join(f"{name} v{v} (weight {gateway.weights[name]:.3g})" for name, v in gateway.sources.items())
    scale = f" x{gateway.scale:.3g}" if gateway.scale != 1 else ""
    say(f"gateway version {gateway.version}, {gateway.strategy}{scale} of {sources or 'no expert yet'}")
    assert gateway.digest is not None, "asked for with what a merge tells"
    say(f"  rank {gateway.rank}, {gateway.modules} modules, {gateway.parameters:,} parameters")
    say(f"  lora_A {gateway.lora_A_shape}, lora_B {gateway.lora_B_shape}")
    say(f"  truncation error {gateway.truncation_error:.2e}, digest {gateway.digest}")
    if gateway.statistics_tokens:
        moments = ", ".join(f"{name} {tokens:,}" for name, tokens in gateway.statistics_tokens.items())
        say(f"  input moments of so many tokens: {moments}")
    if (online := gateway.living) is not None:
        last = ", ".join(f"{name} (staleness {tau})" for name, tau in online.staleness.items())
        say(f"  {online.folds} merges" + (f", the last of {last} in {online.seconds:.1f} s" if last else ""))
        for name, point in online.departures.items():
            say(f"  {name} branched after merge {point.gateway} as v{point.version}, {point.steps} steps since")
    for note in gateway.notes:
        say(f"  note: {note}")
    for name, reason in gateway.left_out.items():
        say(f"  left out: {name} ({reason})")
    if (gate := gateway.gate) is not None:
        say(f"  gate: {gate.reason}")
        say(f"  gate: {gate.status}; evaluators: {', '.join(gate.evaluators) or 'none'}")


@app.command()
@with_client()
def save(
    api: CoordinatorClient,
    file: Annotated[Path, typer.Argument(help="The npz file to write.")] = Path("gateway_model.npz"),
    as_json: AsJson = False,
) -> None:
    """Save the gateway as npz: lora_A, lora_B, version, module names and offsets."""
    with reserved_output(as_json):
        saved = _save(api, file)
    if as_json:
        show_json({"file": str(file), "version": saved.version, "digest": saved.digest, "sources": saved.sources})


def _save(api: CoordinatorClient, file: Path) -> PulledGateway:
    pulled = api.pull_gateway()
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, npz_bytes(pulled.adapter, pulled.version, pulled.sources), 0o644)
    print(f"saved gateway version {pulled.version} ({pulled.digest[:12]}) to {file}")
    return pulled


@app.command()
@with_client()
def audit(api: CoordinatorClient, as_json: AsJson = False) -> None:
    """Show how large the experts are, how much each two of them share, and which rank their sum will need."""
    names = [expert.name for expert in api.list_experts().experts]
    if not names:
        raise CommandError("this federation has no experts yet; start a worker first")
    report = merge_audit({name: pull(api, name).adapter for name in names})
    if as_json:
        show_json(asdict(report))
    else:
        _show_audit(report)


def _show_audit(report: MergeAudit) -> None:
    show_table("Experts", ("expert", "norm of B A"), [(name, f"{norm:.4g}") for name, norm in report.norms.items()])
    if report.pairs:
        rows = [(pair.first, pair.second, _cosines(pair.inputs), _cosines(pair.outputs)) for pair in report.pairs]
        columns = ("expert", "and", "inputs in common", "outputs in common")
        show_table("Cosines of the angles between them, median and largest: 1 same, 0 separate", columns, rows)
    share = f"rank {report.predicted_rank} keeps {100 * report.energy:g} % of the energy of every module"
    print(f"their sum has rank {report.stacked_rank}; {share}")


def _cosines(overlap: Overlap) -> str:
    return f"{overlap.median:.2f}, {overlap.maximum:.2f}"


for command in (export, evaluate, serve):
    app.command()(command)


@app.command()
@configured(GatewayConfig, GENERATE_OPTIONS)
def generate(
    config: GatewayConfig,
    prompt: Annotated[str, typer.Argument(help="What to say to the model.")],
    expert: Annotated[str, typer.Option(help="An expert's name, or 'gateway'.")] = GATEWAY,
    as_json: AsJson = False,
) -> None:
    """Load the gateway (or an expert) on its base model and let it answer."""
    from fedmoe.gateway.export import check_base
    from fedmoe.models.training_config import LoraConfig
    from fedmoe.qwen_finetune import QwenLoRAExpert

    chat = template_of(config.chat_template, config.chat_template_kwargs)
    with coordinator_of(config) as api:
        pulled, manifest = pull(api, expert), api.federation().manifest
        name = federation_base(api, config.base_model)
    adapter = pulled.adapter
    targets = tuple(sorted({module.name for module in adapter.layout.modules}))
    base = loaded(name, config.device, chat)
    if manifest is not None:
        trained_on = manifest.manifest().base
        check_base("the experts were", trained_on, base.identity.name, base.identity.weights_hash)
    model = QwenLoRAExpert(base, LoraConfig(adapter.rank, adapter.alpha, target_modules=targets))
    model.load_adapter(adapter)
    answer = model.generate(prompt, config.max_new_tokens)
    if as_json:
        show_json({"model": expert, "version": pulled.version, "prompt": prompt, "answer": answer})
    else:
        print(answer)


#: `get_gateway_model.py`, the specification's name for the gateway tool.
tool = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None, add_completion=False)


@tool.command()
def get_gateway_model(
    coordinator_url: CoordinatorUrl = DEFAULT_URL,
    save_gateway: Annotated[Path | None, typer.Option(help="Save the gateway to this npz file.")] = None,
    list_experts: Annotated[bool, typer.Option("--list-experts", help="List every expert and the gateway.")] = False,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Print the gateway's version, sources and shapes; save it; list the experts."""
    with client(coordinator_url, token) as api:
        if list_experts:
            show_listing(api.list_experts(), as_json)
        if save_gateway is not None:
            with reserved_output(as_json):
                _save(api, save_gateway)
        if not list_experts and save_gateway is None:
            _show_info(api.gateway_info(merged=True), as_json)
