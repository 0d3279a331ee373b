"""The gateway server as a process: assembles its parts, listens, and closes everything at the end."""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import structlog
from starlette.types import ASGIApp

from fedmoe.gateway.serve.auto_model import PromptRouter
from fedmoe.gateway.serve.catalogue import Catalogue
from fedmoe.gateway.serve.routes import create_app
from fedmoe.gateway.serve.service import Limits, Service
from fedmoe.gateway.serve.text import PromptEncoder
from fedmoe.gateway.serve.version_watcher import VersionWatcher
from fedmoe.inference.backend import Backend
from fedmoe.inference.backend_fleet import BackendFleet
from fedmoe.inference.batching.scheduler import TransformersBackend
from fedmoe.inference.engine import AdapterKey
from fedmoe.inference.transformers_engine import TransformersEngine
from fedmoe.inference.verify import Probe
from fedmoe.inference.vllm.backend import VllmBackend
from fedmoe.inference.vllm.engine import VllmEngine
from fedmoe.lora.adapter import Adapter, FloatArray
from fedmoe.lora.manifest import Manifest
from fedmoe.models.base import LoadedBase, context_length, stop_tokens
from fedmoe.models.multilora import MultiLora
from fedmoe.wire.client import CoordinatorClient
from fedmoe.wire.http.serving import listen as listen_on
from fedmoe.wire.http.serving import own_signals, server_of

_log = structlog.get_logger("fedmoe.serve")

# What vLLM continues for us to compare.
_PROMPTS = ("The capital of France is", "def add(a, b):\n", "Dear Sir or Madam,", "SELECT name FROM")


class ServeError(Exception):
    """The server cannot start; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class VllmAddress:
    """A running vLLM server: `model` is the name of the base model there, `folder` is ours and readable by it.

    `replicas` are further servers like it, which share the work.
    """

    url: str
    model: str
    folder: Path
    token: str | None
    replicas: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where the server listens, whom it answers (`keys`: hashes, None asks for none), and its TLS files."""

    host: str
    port: int
    keys: frozenset[str] | None
    loopback_only: bool
    tls_cert: str | None = None
    tls_key: str | None = None


@dataclass(frozen=True, slots=True)
class GatewayServer:
    """The parts of a server that is ready to listen."""

    app: ASGIApp
    service: Service
    watcher: VersionWatcher


@contextmanager
def open_server(
    source: CoordinatorClient,
    manifest: Manifest,
    base: LoadedBase,
    make_backend: Callable[[LoadedBase, Manifest], Backend],
    limits: Limits,
    gate: Endpoint,
    poll_seconds: float,
    router: PromptRouter | None = None,
) -> Iterator[GatewayServer]:
    """Everything but the socket: the newest versions loaded, the coordinator followed; closed on leaving.

    Without a `router`, prompts to `auto` are routed by the statistics that the coordinator has. Raises `ServeError`
    for another base model than the federation's, and where prompt and answer together exceed the model's context.
    """
    if differences := manifest.differences(Manifest(base.identity, manifest.layout, manifest.alpha)):
        raise ServeError(f"{'; '.join(differences)}; start with the federation's --base-model ({manifest.base.name})")
    most = context_length(base)
    if limits.prompt_tokens + limits.output_tokens > most:
        raise ServeError(
            f"{limits.prompt_tokens} prompt and {limits.output_tokens} output tokens do not fit into the model's "
            f"context of {most}; lower --max-prompt-tokens or --max-output-tokens"
        )
    with ExitStack() as stack:
        backend = make_backend(base, manifest)
        stack.callback(backend.close)
        catalogue = Catalogue()
        router = router or PromptRouter(base)
        watcher = VersionWatcher(source, catalogue, backend, base.identity, poll_seconds, router=router)
        stack.callback(watcher.close)
        watcher.poll()
        watcher.start()
        vocabulary = int(base.model.config.get_text_config().vocab_size)
        prompter = PromptEncoder(base.tokenizer, vocabulary, limits.prompt_tokens, stop_tokens(base))
        service = Service(backend, catalogue, prompter, base.identity, limits, router, lambda: secrets.randbits(62))
        stack.callback(service.close)
        app = create_app(service, watcher.health, gate.keys, gate.loopback_only)
        yield GatewayServer(app, service, watcher)


def backend_maker(rows: int, address: VllmAddress | None) -> Callable[[LoadedBase, Manifest], Backend]:
    """How to make the backend for `rows` generations at once: on the vLLM server, or else in this process."""

    def make(base: LoadedBase, manifest: Manifest) -> Backend:
        modules = [module.name for module in manifest.layout.modules]
        return TransformersBackend(base, modules, rows) if address is None else _vllm(base, modules, rows, address)

    return make


def _vllm(base: LoadedBase, modules: Sequence[str], rows: int, address: VllmAddress) -> Backend:
    """Running vLLM servers, every version of which is compared with our own model here, on each of them."""
    own = TransformersEngine(base, MultiLora(base.model, modules))
    prompts = [tuple(base.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in _PROMPTS]

    def reference(adapter: Adapter | None, probes: Sequence[Probe]) -> list[FloatArray]:
        if adapter is None:
            return [own.score(None, probe.prompt, probe.tokens) for probe in probes]
        key = AdapterKey("reference", 0)
        own.load(key, adapter)
        try:
            return [own.score(key, probe.prompt, probe.tokens) for probe in probes]
        finally:
            own.unload(key)

    def backend(url: str, folder: Path) -> VllmBackend:
        engine = VllmEngine(url, address.model, folder, stop_tokens(base), address.token)
        return VllmBackend(engine, reference, prompts, rows)

    if not address.replicas:
        return backend(address.url, address.folder)
    with ExitStack() as opened:
        backends: list[Backend] = []
        for number, url in enumerate((address.url, *address.replicas), 1):
            backends.append(backend(url, address.folder / f"replica_{number}"))
            opened.callback(backends[-1].close)
        opened.pop_all()
    return BackendFleet(backends)


def listen(running: GatewayServer, gate: Endpoint) -> None:
    """Answer requests until SIGTERM or SIGINT; what is under way then is finished."""
    listener = listen_on(gate.host, gate.port)
    server = server_of(running.app, gate.tls_cert, gate.tls_key)
    with own_signals(server), asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
        models = running.service.names()
        _log.info("listening", host=gate.host, port=listener.getsockname()[1], pid=os.getpid(), models=models)
        runner.run(server.serve(sockets=[listener]))
