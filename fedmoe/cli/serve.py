"""`fedmoe gateway serve`: serve the gateway and the experts over an OpenAI-compatible interface."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import structlog
import typer

from fedmoe.cli.coordinator import check_tls
from fedmoe.cli.options import (
    ChatTemplateFile,
    ChatTemplateKwargs,
    Device,
    Dtype,
    FederationBase,
    federation_base,
    loaded,
    template_of,
    with_client,
)
from fedmoe.cli.output import CommandError, importing
from fedmoe.runtime.logs import configure, log_uncaught
from fedmoe.wire.client import CoordinatorClient

#: Where tokens are computed.
BackendKind = StrEnum("BackendKind", ["transformers", "vllm"])


@with_client()
def serve(
    api: CoordinatorClient,
    base_model: FederationBase = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port.")] = 8080,
    api_keys: Annotated[
        Path | None,
        typer.Option(help="File of API key hashes, one a line; made with one key if missing. [default: no keys]"),
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Ask for no API key, even off loopback.")] = False,
    poll_interval: Annotated[float, typer.Option(min=0.05, help="Seconds between two looks for versions.")] = 2.0,
    max_prompt_tokens: Annotated[int, typer.Option(min=1, help="Longest prompt, in tokens.")] = 1024,
    max_output_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 1024,
    max_batch: Annotated[int, typer.Option(min=1, max=1024, help="Answers computed at once.")] = 16,
    max_queue: Annotated[int, typer.Option(min=0, help="Answers that may wait; more are refused (429).")] = 128,
    device: Device = "auto",
    dtype: Dtype = "auto",
    chat_template: ChatTemplateFile = None,
    chat_template_kwargs: ChatTemplateKwargs = None,
    backend: Annotated[BackendKind, typer.Option(help="Where tokens are computed.")] = BackendKind.transformers,
    vllm_url: Annotated[str | None, typer.Option(help="The vLLM server, for --backend vllm.")] = None,
    replicas: Annotated[
        list[str] | None,
        typer.Option(help="Another vLLM server like it, which shares the work; repeat for more."),
    ] = None,
    vllm_model: Annotated[str, typer.Option(help="The base model's name on the vLLM server.")] = "base",
    vllm_adapters: Annotated[
        Path, typer.Option(help="Our folder of adapters, which the vLLM server sees under the same path.")
    ] = Path("runs/serve/vllm_adapters"),
    vllm_token: Annotated[
        str | None, typer.Option(envvar="FEDMOE_VLLM_TOKEN", help="The vLLM server's API key.")
    ] = None,
    tls_cert: Annotated[str | None, typer.Option(help="TLS certificate chain (PEM).")] = None,
    tls_key: Annotated[str | None, typer.Option(help="TLS private key (PEM).")] = None,
) -> None:
    """Serve the gateway and every expert over an OpenAI-compatible interface; newer versions come by themselves."""
    if (backend is BackendKind.vllm) != (vllm_url is not None):
        raise CommandError("--backend vllm and --vllm-url URL belong together")
    servers = (*([vllm_url] if vllm_url else []), *(replicas or []))
    if len(set(servers)) < len(servers) or (replicas and vllm_url is None):
        raise CommandError(f"--replicas names servers beside that of --vllm-url, each once; got {', '.join(servers)}")
    if (tls_cert is None) != (tls_key is None):
        raise CommandError("TLS needs both --tls-cert and --tls-key")
    check_tls(tls_cert, tls_key)
    configure()
    log_uncaught()
    structlog.get_logger("fedmoe.serve").info("starting", backend=backend.value)
    chat = template_of(chat_template, chat_template_kwargs)
    keys, loopback = _keys(host, api_keys, insecure)
    with importing("worker"):
        from fedmoe.gateway.serve import app as process
        from fedmoe.gateway.serve.service import Limits
        from fedmoe.runtime.device import pin_threads
    pin_threads()
    gate = process.Endpoint(host, port, keys, loopback, tls_cert, tls_key)
    limits = Limits(max_prompt_tokens, max_output_tokens, max_batch + max_queue)
    address = (
        process.VllmAddress(vllm_url, vllm_model, vllm_adapters, vllm_token, tuple(replicas or ()))
        if vllm_url is not None
        else None
    )
    manifest = api.federation().manifest
    if manifest is None:
        raise CommandError(
            "the coordinator has no experts yet, so nobody knows what to serve; start a worker, or register an "
            "expert with 'fedmoe experts create'"
        )
    base = loaded(federation_base(api, base_model), device, chat, dtype)
    maker = process.backend_maker(max_batch, address)
    with process.open_server(api, manifest.manifest(), base, maker, limits, gate, poll_interval) as running:
        process.listen(running, gate)


def _keys(host: str, file: Path | None, insecure: bool) -> tuple[frozenset[str] | None, bool]:
    """The hashes of the API keys (None: no key is asked for), and whether only this machine is answered."""
    from fedmoe.gateway.serve.api_keys import read_keys
    from fedmoe.wire.http.middleware import is_loopback

    loopback = is_loopback(host)
    if file is None:
        if not loopback and not insecure:
            raise CommandError(
                f"{host} can be reached by others: give a file with --api-keys FILE (made with one key if it is "
                "missing), or answer everybody with --insecure"
            )
        return None, loopback and not insecure
    if insecure:
        raise CommandError("--api-keys and --insecure contradict each other; give one of them")
    keys, made = read_keys(file)
    if made is not None:
        print(f"This API key is shown once; {file} keeps only its hash.\n  {made}")
        sys.stdout.flush()
    return keys, loopback
