"""Options of the gateway commands that have a section in `fedmoe.toml`, and the connection that they name."""

from __future__ import annotations

from collections.abc import Mapping

import typer

from fedmoe.cli.options import (
    CHAT_TEMPLATE,
    CHAT_TEMPLATE_KWARGS,
    DEFAULT_URL,
    DEVICE_OPTIONS,
    MAP,
    OptionText,
    client,
)
from fedmoe.config import GatewayConfig
from fedmoe.wire.client import CoordinatorClient

_SHARED: Mapping[str, OptionText] = {
    "base_model": "Base model: smollm2, a folder or a hub id. [default: the federation's, of its revision]",
    "device": DEVICE_OPTIONS["device"],
    "chat_template": CHAT_TEMPLATE,
    "chat_template_kwargs": CHAT_TEMPLATE_KWARGS,
    "coordinator_url": typer.Option(
        envvar=["FEDMOE_GATEWAY_COORDINATOR_URL", "FEDMOE_COORDINATOR_URL"],
        help=f"Where the coordinator listens. [default: {DEFAULT_URL}]",
    ),
    "token": typer.Option(envvar="FEDMOE_TOKEN", help="Token, where one is asked for."),
}
SERVE_OPTIONS: Mapping[str, OptionText] = {
    "host": "Address to listen on. [default: 127.0.0.1]",
    "port": "Port. [default: 8080]",
    "api_keys": "File of API key hashes, one a line; made with one key if missing. [default: no keys]",
    "insecure": typer.Option("--insecure", help="Ask for no API key, even off loopback."),
    "poll_interval": "Seconds between two looks for versions. [default: 2]",
    "max_prompt_tokens": "Longest prompt, in tokens. [default: 1024]",
    "max_output_tokens": "Longest answer, in tokens. [default: 1024]",
    "max_batch": "Answers computed at once. [default: 16]",
    "max_queue": "Answers that may wait; more are refused (429). [default: 128]",
    "dtype": DEVICE_OPTIONS["dtype"],
    "backend": "Where tokens are computed: transformers (default) or vllm.",
    "vllm_url": "The vLLM server, for --backend vllm.",
    "replicas": "Another vLLM server like it, which shares the work; repeat for more.",
    "vllm_model": "The base model's name on the vLLM server. [default: base]",
    "vllm_adapters": (
        "Our folder of adapters, which the vLLM server sees under the same path. [default: runs/serve/vllm_adapters]"
    ),
    "vllm_token": typer.Option(envvar="FEDMOE_VLLM_TOKEN", help="The vLLM server's API key."),
    "tls_cert": "TLS certificate chain (PEM).",
    "tls_key": "TLS private key (PEM).",
    **_SHARED,
}
EVALUATE_OPTIONS: Mapping[str, OptionText] = {
    "map": MAP,
    "blocks": "At most so many blocks of each domain are scored. [default: 32]",
    "max_length": "Tokens a block. [default: 1024, or the model's context if shorter]",
    "batch_size": "Blocks at once. [default: 4]",
    **_SHARED,
}
GENERATE_OPTIONS: Mapping[str, OptionText] = {"max_new_tokens": "Longest answer, in tokens. [default: 64]", **_SHARED}


def coordinator_of(config: GatewayConfig) -> CoordinatorClient:
    """A client of the coordinator that the configuration names."""
    return client(config.coordinator_url, config.token.get_secret_value() if config.token else None)
