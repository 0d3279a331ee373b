"""`fedmoe gateway serve` as a process, and what it refuses to start with."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import typer
from forks import Fork
from live import listening, open_house
from serve_house import tiny, tiny_manifest
from support import MANIFEST, free_port

from fedmoe.cli.output import CommandError
from fedmoe.cli.serve import serve
from fedmoe.gateway.serve.app import Endpoint, ServeError, open_server
from fedmoe.gateway.serve.service import Limits
from fedmoe.lora.manifest import Manifest


def run(*arguments: str) -> None:
    """The command in this process, without the shell around it."""
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(serve)
    app(["--base-model", "tiny", *arguments], standalone_mode=False)


@contextmanager
def process(log: Path, *arguments: str) -> Iterator[Fork]:
    command = ["-m", "fedmoe", "gateway", "serve", "--base-model", "tiny", "--device", "cpu", *arguments]
    made = Fork(command, log, environment=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        yield made
    finally:
        made.kill()
        made.wait(20)


def await_health(url: str, server: Fork, log: Path) -> None:
    deadline = time.monotonic() + 120
    while True:
        try:
            if httpx2.get(f"{url}/healthz", timeout=5, verify=False).status_code == 200:
                return
        except httpx2.HTTPError:
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)


def test_the_command_serves_to_those_with_a_key_until_it_is_told_to_stop(tmp_path: Path) -> None:
    with open_house(tmp_path) as house, listening(house.app) as coordinator:
        house.register("python", manifest=tiny_manifest())
        port, keys, log = free_port(), tmp_path / "keys", tmp_path / "log"
        url = f"http://127.0.0.1:{port}"
        options = ["--coordinator-url", coordinator.url, "--port", str(port), "--api-keys", str(keys)]
        with process(log, *options) as server:
            await_health(url, server, log)
            (key,) = [line.strip() for line in log.read_text().splitlines() if line.strip().startswith("fmk_")]
            with pytest.raises(openai.AuthenticationError):
                openai.OpenAI(base_url=f"{url}/v1", api_key="wrong").models.list()
            with openai.OpenAI(base_url=f"{url}/v1", api_key=key, timeout=60) as client:
                names = [card.id for card in client.models.list()]
                assert names == ["base", "gateway", "python"]
                answer = client.completions.create(model="gateway", prompt="abc", max_tokens=3)
                assert answer.usage is not None
                assert answer.usage.completion_tokens >= 1
            server.send_signal(signal.SIGTERM)
            assert server.wait(30) == 0, log.read_text()


def test_others_are_answered_only_with_keys_or_on_demand() -> None:
    with pytest.raises(CommandError, match="--api-keys FILE"):
        run("--host", "0.0.0.0")
    with pytest.raises(CommandError, match="contradict"):
        run("--insecure", "--api-keys", "keys")


@pytest.mark.parametrize("options", [["--backend", "vllm"], ["--vllm-url", "http://127.0.0.1:1"]])
def test_a_vllm_server_is_named_where_it_is_used(options: list[str]) -> None:
    with pytest.raises(CommandError, match="belong together"):
        run(*options)


def test_without_an_expert_there_is_nothing_to_serve(tmp_path: Path) -> None:
    with (
        open_house(tmp_path) as house,
        listening(house.app) as coordinator,
        pytest.raises(CommandError, match="no experts yet"),
    ):
        run("--coordinator-url", coordinator.url)


def start(manifest: Manifest, limits: Limits) -> None:
    """Start a server that must refuse before it needs a coordinator or a backend."""
    unused: Any = None
    with open_server(unused, manifest, tiny(), unused, limits, Endpoint("127.0.0.1", 0, None, True), 1.0):
        pass


def test_another_base_model_is_refused_before_anything_is_served() -> None:
    with pytest.raises(ServeError, match="--base-model \\(tiny/base\\)"):
        start(MANIFEST, Limits())


def test_limits_beyond_the_models_context_are_refused() -> None:
    with pytest.raises(ServeError, match="context of 2048"):
        start(tiny_manifest(), Limits(2000, 100))
