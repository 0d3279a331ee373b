"""`fedmoe gateway serve`: serve the gateway and the experts over an OpenAI-compatible interface."""

from __future__ import annotations

import sys
from pathlib import Path

import structlog

from fedmoe.cli.coordinator import check_tls
from fedmoe.cli.gateway_options import SERVE_OPTIONS, coordinator_of
from fedmoe.cli.options import configured, federation_base, loaded, template_of
from fedmoe.cli.output import CommandError, importing
from fedmoe.config import GatewayConfig
from fedmoe.runtime.logs import configure, log_uncaught


@configured(GatewayConfig, SERVE_OPTIONS)
def serve(config: GatewayConfig) -> None:
    """Serve the gateway and every expert over an OpenAI-compatible interface; newer versions come by themselves."""
    vllm_url, replicas = config.vllm_url, config.replicas
    if (config.backend == "vllm") != (vllm_url is not None):
        raise CommandError("--backend vllm and --vllm-url URL belong together")
    servers = (*([vllm_url] if vllm_url else []), *replicas)
    if len(set(servers)) < len(servers) or (replicas and vllm_url is None):
        raise CommandError(f"--replicas names servers beside that of --vllm-url, each once; got {', '.join(servers)}")
    if (config.tls_cert is None) != (config.tls_key is None):
        raise CommandError("TLS needs both --tls-cert and --tls-key")
    check_tls(config.tls_cert, config.tls_key)
    configure()
    log_uncaught()
    chat = template_of(config.chat_template, config.chat_template_kwargs)
    file = Path(config.api_keys) if config.api_keys is not None else None
    keys, loopback = _keys(config.host, file, config.insecure)
    structlog.get_logger("fedmoe.serve").info("starting", backend=config.backend)
    with importing("worker"):
        from fedmoe.gateway.serve import app as process
        from fedmoe.gateway.serve.service import Limits
        from fedmoe.runtime.device import pin_threads
    pin_threads()
    gate = process.Endpoint(config.host, config.port, keys, loopback, config.tls_cert, config.tls_key)
    limits = Limits(config.max_prompt_tokens, config.max_output_tokens, config.max_batch + config.max_queue)
    address = None
    if vllm_url is not None:
        token = config.vllm_token.get_secret_value() if config.vllm_token else None
        address = process.VllmAddress(vllm_url, config.vllm_model, Path(config.vllm_adapters), token, replicas)
    with coordinator_of(config) as api:
        manifest = api.federation().manifest
        if manifest is None:
            raise CommandError(
                "the coordinator has no experts yet, so nobody knows what to serve; start a worker, or register an "
                "expert with 'fedmoe experts create'"
            )
        base = loaded(federation_base(api, config.base_model), config.device, chat, config.dtype)
        maker, seconds = process.backend_maker(config.max_batch, address), config.poll_interval
        with process.open_server(api, manifest.manifest(), base, maker, limits, gate, seconds) as running:
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
