"""`fedmoe coordinator`: start a coordinator; options, TLS files, tokens shown once."""

from __future__ import annotations

import os
import ssl
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from fedmoe.cli.output import CommandError, given
from fedmoe.config import DEFAULT_PORT, CoordinatorConfig
from fedmoe.runtime.logs import configure, log_uncaught, warn
from fedmoe.runtime.memory import give_back_freed_memory

if TYPE_CHECKING:
    from fedmoe.distributed_coordinator import DistributedCoordinator


def coordinator(
    host: Annotated[str | None, typer.Option(help="Address to listen on. \\[default: 127.0.0.1]")] = None,
    port: Annotated[int | None, typer.Option(help=f"Port. \\[default: {DEFAULT_PORT}]")] = None,
    state_dir: Annotated[str | None, typer.Option(help="Journal and blobs. \\[default: runs/coordinator]")] = None,
    enable_gateway: Annotated[bool | None, typer.Option(help="Make a gateway of all experts. \\[default: on]")] = None,
    strategy: Annotated[
        str | None,
        typer.Option(help="How experts are merged: weighted_average (default), sum, concat, scaled, regmean."),
    ] = None,
    gateway_rank: Annotated[
        int | None, typer.Option(help="Cut the gateway to this rank. \\[default: exact; regmean: by energy, up to 64]")
    ] = None,
    evaluation_gate: Annotated[
        bool | None,
        typer.Option(help="Publish a gateway only if evaluators' held-out losses allow it. \\[default: off]"),
    ] = None,
    gate_tolerance: Annotated[
        float | None, typer.Option(help="Share of its gain that the worst domain may lose. \\[default: 0.01]")
    ] = None,
    gate_seconds: Annotated[
        float | None, typer.Option(help="Seconds that evaluators have to score candidates. \\[default: 300]")
    ] = None,
    start_from: Annotated[
        str | None, typer.Option(help="Experts start from: initial (default), or gateway, again after every merge.")
    ] = None,
    merge_after: Annotated[
        int | None, typer.Option(help="Steps before an expert is merged and rebased onto the gateway. \\[default: 10]")
    ] = None,
    fold_staleness: Annotated[
        str | None,
        typer.Option(help="Weight of a merge by how many merges it missed; as --staleness. \\[default: constant]"),
    ] = None,
    server_learning_rate: Annotated[
        float | None, typer.Option(help="lr in: expert += lr * s(staleness) * delta.")
    ] = None,
    server_optimizer: Annotated[
        str | None, typer.Option(help="What applies updates: sgd (default), nesterov or adam.")
    ] = None,
    buffer_size: Annotated[int | None, typer.Option(help="Updates averaged into one step. \\[default: 1]")] = None,
    clip_norm: Annotated[
        float | None, typer.Option(help="Scale updates down to this multiple of the usual norm. \\[default: never]")
    ] = None,
    hold_norm: Annotated[
        float | None,
        typer.Option(help="Hold updates above this multiple of the usual norm for an admin; 0: none. \\[default: 50]"),
    ] = None,
    staleness: Annotated[
        str | None, typer.Option(help="Weight of stale updates: constant, polynomial (default), hinge or exponential.")
    ] = None,
    max_staleness: Annotated[int | None, typer.Option(help="Refuse updates older than this. \\[default: none]")] = None,
    keep_updates: Annotated[
        int | None,
        typer.Option(help="Updates per expert that can be undone; older bytes are deleted. \\[default: all]"),
    ] = None,
    max_parameters: Annotated[
        int | None, typer.Option(help="Parameters that an expert may have. \\[default: 268435456, 1 GiB in fp32]")
    ] = None,
    max_experts: Annotated[
        int | None, typer.Option(help="Experts that there may be, retired ones not counted. \\[default: 1024]")
    ] = None,
    keep_gb: Annotated[
        float | None,
        typer.Option(help="GB of updates' bytes to keep. \\[default: half of what was free at the first start]"),
    ] = None,
    min_sync_interval: Annotated[
        float | None,
        typer.Option(
            help="Refuse pushes that a worker makes to an expert sooner than this, in seconds. \\[default: advise 1]"
        ),
    ] = None,
    requests_per_second: Annotated[
        float | None,
        typer.Option(help="Requests that one token may make in a second, on average; 0: no limit. \\[default: 100]"),
    ] = None,
    json_limit: Annotated[
        int | None,
        typer.Option(help="Numbers that an answer in JSON may have; more only as safetensors. \\[default: 8000000]"),
    ] = None,
    token: Annotated[str | None, typer.Option(help="Join token; better as FEDMOE_TOKEN.", show_default=False)] = None,
    admin_token: Annotated[
        str | None, typer.Option(help="Admin token; better as FEDMOE_ADMIN_TOKEN.", show_default=False)
    ] = None,
    insecure: Annotated[bool | None, typer.Option("--insecure", help="Ask for no token, even off loopback.")] = None,
    allow_network_fs: Annotated[
        bool | None, typer.Option("--allow-network-fs", help="Accept a state directory on a network file system.")
    ] = None,
    skip_damaged: Annotated[
        bool | None,
        typer.Option("--skip-damaged", help="Start, this once, without updates and rows whose bytes are damaged."),
    ] = None,
    accept_older_journal: Annotated[
        bool | None,
        typer.Option(
            "--accept-older-journal", help="Start, this once, from a journal that lacks acknowledged updates."
        ),
    ] = None,
    tls_cert: Annotated[str | None, typer.Option(help="TLS certificate chain (PEM).")] = None,
    tls_key: Annotated[str | None, typer.Option(help="TLS private key (PEM).")] = None,
) -> None:
    """Start a coordinator: keeps the experts, lands updates on them, makes the gateway."""
    config = CoordinatorConfig(**given(**locals()))  # type: ignore[arg-type]
    check_tls(config.tls_cert, config.tls_key)
    configure()
    log_uncaught()
    give_back_freed_memory()
    from fedmoe.distributed_coordinator import DistributedCoordinator

    running = DistributedCoordinator(config)
    _announce(config, running)
    status = running.serve()
    if status:
        raise typer.Exit(status)


def check_tls(certificate: str | None, key: str | None) -> None:
    """Find out about unusable TLS files now, not after tokens were made and shown."""
    if certificate is None:
        return
    for option, file in (("--tls-cert", certificate), ("--tls-key", key)):
        if file is None or not os.access(file, os.R_OK):
            raise CommandError(f"{option} {file}: no such file, or this user may not read it")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
    except ssl.SSLError as error:
        raise CommandError(f"{certificate} and {key} are no certificate chain and its key in PEM: {error}") from error
    if key is not None and os.stat(key).st_mode & 0o077:
        warn("key_readable_by_others", file=key, fix=f"chmod 600 {key}")


def _announce(config: CoordinatorConfig, running: DistributedCoordinator) -> None:
    """Tokens in clear, once, on standard output; they are kept only as hashes."""
    tokens = running.new_tokens
    if config.insecure:
        print("WARNING: --insecure: anybody who reaches this address can read and change every expert.", flush=True)
        if running.gate.ever_had_tokens:
            print(f"WARNING: --insecure: none of the tokens of {config.state_dir} is asked for.", flush=True)
    if not tokens:
        return
    scheme = "https" if config.tls_cert else "http"
    print("These tokens are shown once; only their hashes are kept.")
    for role, token in tokens.items():
        print(f"  {role:5}  {token}")
    if "join" in tokens:
        print("Start a worker with:")
        print(
            f"  FEDMOE_TOKEN={tokens['join']} fedmoe worker --coordinator-url {scheme}://THIS-HOST:{config.port} "
            "--worker-id NAME --specialty EXPERT --dataset FILE.jsonl"
        )
    if scheme == "http":
        print("Tokens and weights travel in clear over http; use --tls-cert and --tls-key on a network you do not own.")
    sys.stdout.flush()
