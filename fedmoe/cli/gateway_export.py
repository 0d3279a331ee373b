"""`fedmoe gateway export`: write the gateway or an expert for other tools."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedmoe.cli.options import AsJson, noted_place, with_client
from fedmoe.cli.output import importing, reserved_output, show_json
from fedmoe.lora.manifest import BaseModel
from fedmoe.wire.client import CoordinatorClient, PulledExpert, PulledGateway

if TYPE_CHECKING:
    from fedmoe.gateway.export import ExportSource

GATEWAY = "gateway"


#: What an export writes.
Format = StrEnum("Format", {"peft": "peft", "npz": "npz", "merged": "merged", "gguf_lora": "gguf-lora"})


@with_client()
def export(
    api: CoordinatorClient,
    target: Annotated[Path, typer.Argument(help="Folder (peft, merged) or file (npz, gguf-lora) to write.")],
    format: Annotated[
        Format,
        typer.Option(
            "--format",
            help="peft: adapter folder; npz: arrays; merged: the base model with the adapter in its weights; "
            "gguf-lora: adapter for llama.cpp.",
        ),
    ] = Format.peft,
    expert: Annotated[str, typer.Option(help="An expert's name, or 'gateway'.")] = GATEWAY,
    base_model: Annotated[
        str | None,
        typer.Option(help="Another place of the federation's base model, for merged and gguf-lora; for peft a folder."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Export the gateway or one expert for other tools, with a manifest of what it was made of."""
    source = _source(api, expert)
    if format in (Format.merged, Format.gguf_lora) and base_model is None:
        base_model = noted_place(source.base)
    with reserved_output(as_json):
        rounding = _write(source, format, target, base_model or "", force)
    if as_json:
        facts = {"model": expert, "version": source.version, "format": str(format), "target": str(target)}
        show_json(
            {**facts, "sources": {name: part.version for name, part in source.sources.items()}}
            | ({} if rounding is None else {"rounding": rounding})
        )
        return
    loss = (
        ""
        if rounding is None
        else f" (rounding to the base model's dtype changed the products by {100 * rounding:.2g} %)"
    )
    print(f"exported {expert} version {source.version} to {target}{loss}")


def _write(source: ExportSource, format: Format, target: Path, base_model: str, force: bool) -> float | None:
    """Write one format; of merged weights the share that rounding changed."""
    from fedmoe.gateway.export import export_npz, export_peft

    if format is Format.npz:
        export_npz(source, target, force)
        return None
    if format is Format.peft:
        export_peft(source, target, force, _own_folder(source, base_model) if base_model else None)
        return None
    with importing("worker"):
        from fedmoe.gateway.export_gguf import export_gguf_lora
        from fedmoe.gateway.export_merged import export_merged
        from fedmoe.models.base import prepare_base
    folder = prepare_base(base_model)
    if format is Format.gguf_lora:
        export_gguf_lora(source, folder, target, force)
        return None
    return export_merged(source, folder, target, force)


def _own_folder(source: ExportSource, base_model: str) -> Path | None:
    """The folder that an adapter's readers find its base model in; None for a name that they know by themselves."""
    folder = Path(base_model).expanduser()
    if not folder.is_dir():
        return None
    from fedmoe.gateway.export import check_base

    with importing("worker"):
        from fedmoe.models.base import prepare_base
        from fedmoe.models.identity import weights_hash
    check_base(f"{source.name} was", source.base, base_model, weights_hash(prepare_base(base_model)))
    return folder


def _source(api: CoordinatorClient, name: str) -> ExportSource:
    from fedmoe.gateway.export import ExpertVersion, ExportSource

    pulled = pull(api, name)
    if isinstance(pulled, PulledExpert):
        sources = {name: ExpertVersion(pulled.version, pulled.digest)}
        return ExportSource(name, pulled.version, pulled.adapter, sources, pulled.manifest.base)
    digests = pulled.source_digests
    sources = {part: ExpertVersion(version, digests.get(part)) for part, version in pulled.sources.items()}
    return ExportSource(name, pulled.version, pulled.adapter, sources, base_of(pulled))


def pull(api: CoordinatorClient, name: str) -> PulledExpert | PulledGateway:
    """The newest gateway, or the newest expert of this name."""
    pulled = api.pull_gateway() if name == GATEWAY else api.pull_expert(name)
    assert pulled is not None, "without an ETag there is always an answer"
    return pulled


def base_of(pulled: PulledExpert | PulledGateway) -> BaseModel:
    """The base model that a downloaded model belongs on."""
    if isinstance(pulled, PulledExpert):
        return pulled.manifest.base
    base = pulled.base
    return BaseModel(base["name"], base["revision"], base["weights_hash"], base["tokenizer_hash"])
