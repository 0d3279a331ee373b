"""`fedmoe coordinator`: check the TLS certificate and key, start a coordinator, show new tokens once."""

from __future__ import annotations

import os
import re
import ssl
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

import typer
from pydantic import SecretStr

from fedmoe.cli.options import JOIN_TOKEN, OptionText, configured
from fedmoe.cli.output import CommandError
from fedmoe.config import CoordinatorConfig
from fedmoe.runtime.addresses import reachable_host
from fedmoe.runtime.logs import configure, log_uncaught, warn
from fedmoe.runtime.memory import give_back_freed_memory
from fedmoe.wire.contract.administration import INVITE, JOIN_LINE_SECONDS
from fedmoe.wire.contract.messages import DEFAULT_PORT

if TYPE_CHECKING:
    from fedmoe.distributed_coordinator import DistributedCoordinator
    from fedmoe.server.app.federation_app import FederationApp


_OPTIONS: Mapping[str, OptionText] = {
    "host": "Address to listen on. [default: 127.0.0.1]",
    "port": f"Port. [default: {DEFAULT_PORT}]",
    "state_dir": "Journal and blobs. [default: runs/coordinator]",
    "blobs": "Object store for blobs: s3://bucket/prefix, gs://... or az://... [default: the state directory]",
    "database_url": typer.Option(
        help="Keep the journal in PostgreSQL: postgresql+psycopg://user@host/db; better as FEDMOE_DATABASE_URL.",
        show_default=False,
    ),
    "replica": "Name of this one of several coordinators of a federation.",
    "advertise": "URL at which the other replicas reach this one.",
    "replica_secret_file": "File with the secret that all replicas share.",
    "lease_seconds": "Seconds after which another replica takes over from one that is gone. [default: 2]",
    "enable_gateway": "Make a gateway of all experts. [default: on]",
    "strategy": "How experts are merged: weighted_average (default), sum, concat, scaled, regmean.",
    "gateway_rank": "Cut the gateway to this rank. [default: exact; regmean: by energy, up to 64]",
    "evaluation_gate": "Publish a gateway only if evaluators' held-out losses allow it. [default: off]",
    "gate_tolerance": "Share of its gain that the worst domain may lose. [default: 0.01]",
    "gate_seconds": "Seconds that evaluators have to score candidates. [default: 300]",
    "start_from": "Experts start from: initial (default), or gateway, again after every merge.",
    "merge_after": "Steps before an expert is merged and rebased onto the gateway. [default: 10]",
    "fold_staleness": "Weight of a merge by how many merges it missed; as --staleness. [default: constant]",
    "server_learning_rate": "lr in: expert += lr * s(staleness) * delta.",
    "server_optimizer": "What applies updates: sgd (default), nesterov or adam.",
    "buffer_size": "Updates averaged into one step. [default: 1]",
    "clip_norm": "Scale updates down to this multiple of the usual norm. [default: never]",
    "hold_norm": "Hold updates above this multiple of the usual norm for an admin; 0: none. [default: 50]",
    "staleness": "Weight of stale updates: constant, polynomial (default), hinge or exponential.",
    "max_staleness": "Refuse updates older than this. [default: none]",
    "keep_updates": "Updates per expert that can be undone; older bytes are deleted. [default: all]",
    "max_parameters": "Parameters that an expert may have. [default: 268435456, 1 GiB in fp32]",
    "max_experts": "Experts that there may be, retired ones not counted. [default: 1024]",
    "keep_gb": "GB of updates' bytes to keep. [default: half of what was free at the first start]",
    "min_sync_interval": (
        "Refuse pushes that a worker makes to an expert sooner than this, in seconds. [default: advise 1]"
    ),
    "max_length": "Tokens in a packed row of every worker. [default: each worker's own]",
    "requests_per_second": "Requests that one token may make in a second, on average; 0: no limit. [default: 100]",
    "json_limit": "Numbers that an answer in JSON may have; more only as safetensors. [default: 8000000]",
    "token": JOIN_TOKEN,
    "admin_token": typer.Option(help="Admin token; better as FEDMOE_ADMIN_TOKEN.", show_default=False),
    "insecure": typer.Option("--insecure", help="Ask for no token, even off loopback."),
    "allow_network_fs": typer.Option("--allow-network-fs", help="Accept a state directory on a network file system."),
    "accept_database_loss": typer.Option(
        "--accept-database-loss", help="Accept a database whose crash loses what was acknowledged a moment before."
    ),
    "skip_damaged": typer.Option(
        "--skip-damaged", help="Start, this once, without updates and rows whose bytes are damaged."
    ),
    "accept_older_journal": typer.Option(
        "--accept-older-journal", help="Start, this once, from a journal that lacks acknowledged updates."
    ),
    "tls": typer.Option(
        metavar="auto", help="auto: make a key and certificate of its own, and print a line for `fedmoe join`."
    ),
    "tls_cert": "TLS certificate chain (PEM).",
    "tls_key": "TLS private key (PEM).",
}


@configured(CoordinatorConfig, _OPTIONS)
def coordinator(config: CoordinatorConfig) -> None:
    """Start a coordinator: keeps the experts, lands updates on them, makes the gateway."""
    check_tls(config.tls_cert, config.tls_key)
    configure()
    _check_password(config.database_url)
    log_uncaught()
    give_back_freed_memory()
    if config.replica is not None:
        from fedmoe.server.app.distributed_replica import DistributedReplica

        status = DistributedReplica(config, lambda federation: _announce(config, federation)).serve()
    else:
        from fedmoe.distributed_coordinator import DistributedCoordinator

        running = DistributedCoordinator(config)
        _announce(config, running)
        status = running.serve()
    if status:
        raise typer.Exit(status)


def _check_password(database_url: SecretStr | None) -> None:
    """Say that every user of this machine can read a password of the command line."""
    url = database_url.get_secret_value() if database_url is not None else ""
    if re.search(r"//[^/]*:[^/@]+@|password=", url) and os.environ.get("FEDMOE_DATABASE_URL") != url:
        warn("password_on_the_command_line", fix="give it in the file that PGPASSFILE names, or in FEDMOE_DATABASE_URL")


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


def _announce(config: CoordinatorConfig, running: DistributedCoordinator | FederationApp) -> None:
    """Tokens in clear, once, on standard output; they are kept only as hashes."""
    from fedmoe.wire.http.middleware import is_loopback

    tokens = running.new_tokens
    if config.insecure:
        print("WARNING: --insecure: anybody who reaches this address can read and change every expert.", flush=True)
        if running.gate.ever_had_tokens:
            print(f"WARNING: --insecure: none of the tokens of {config.state_dir} is asked for.", flush=True)
    own = getattr(running, "certificate", None)
    scheme = "https" if config.tls_cert or own is not None else "http"
    _announce_page(config, running, scheme)
    if tokens:
        print("These tokens are shown once; only their hashes are kept.")
    for role, token in tokens.items():
        if role != INVITE:
            print(f"  {role:5}  {token}")
    if "join" in tokens:
        print("Start a worker with:")
        print(
            f"  FEDMOE_TOKEN={tokens['join']} fedmoe worker --coordinator-url {scheme}://THIS-HOST:{config.port} "
            "--worker-id NAME --specialty EXPERT --dataset FILE.jsonl"
        )
    if own is not None:
        address = f"{reachable_host(config.host)}:{config.port}#{own.fingerprint}"
        print(f"The coordinator's URL, with the fingerprint of its key: https://{address}")
        if running.gate.required:
            _announce_join(address, tokens.get(INVITE))
    if scheme == "http" and (tokens or not is_loopback(config.host)):
        print(
            "Tokens and weights travel in clear over http; on a network you do not own start with --tls auto, or with "
            "a certificate of your own (--tls-cert and --tls-key)."
        )
    sys.stdout.flush()


def _announce_join(address: str, invite: str | None) -> None:
    """The line with which another machine joins, where one was made; and how to make further ones."""
    if invite is not None:
        print(f"Join from another machine, once, within {JOIN_LINE_SECONDS / 86_400:.0f} days:")
        print(f"  fedmoe join {invite}@{address} --specialty EXPERT --dataset FILE.jsonl")
    print("Further join lines: fedmoe token create --join --coordinator-url URL (with FEDMOE_ADMIN_TOKEN)")


def _announce_page(config: CoordinatorConfig, running: DistributedCoordinator | FederationApp, scheme: str) -> None:
    """Where the federation can be looked at; with tokens by a link that works once."""
    from fedmoe.wire.http.middleware import is_loopback

    if not config.port:
        return
    host = "127.0.0.1" if is_loopback(config.host) else reachable_host(config.host)
    page = f"{scheme}://{host}:{config.port}"
    if not running.gate.required:
        print(f"The federation's page: {page}/", flush=True)
    elif config.replica is None:
        print(f"The federation's page, as administrator, once within 15 minutes: {page}/login#{running.links.new()}")
        print("Later: /login with a token; 'fedmoe token create --role viewer' makes one that only looks.")
