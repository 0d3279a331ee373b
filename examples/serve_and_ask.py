"""Serves a gateway in this process and asks it as any client of OpenAI's interface would.

Run it: python examples/serve_and_ask.py
"""

from __future__ import annotations

import logging
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
from local_federation import coordinator, start_worker, write_dataset

from fedmoe.gateway.serve.app import Endpoint, backend_maker, open_server
from fedmoe.gateway.serve.service import Limits
from fedmoe.models.base import load_base
from fedmoe.runtime.logs import configure
from fedmoe.wire.client import CoordinatorClient
from fedmoe.wire.http.serving import listen, run, server_of


@contextmanager
def gateway_server(url: str) -> Iterator[str]:
    """What `fedmoe gateway serve` runs, until the block ends; gives the URL for clients."""
    base, limits, gate = load_base("tiny", "cpu", "fp32"), Limits(64, 32, 16), Endpoint("127.0.0.1", 0, None, True)
    with CoordinatorClient(url) as source:
        manifest = source.federation().manifest
        assert manifest is not None
        with open_server(source, manifest.manifest(), base, backend_maker(4, None), limits, gate, 1.0) as ready:
            listener = listen(gate.host, gate.port)
            server = server_of(ready.app)
            thread = threading.Thread(target=run, args=(server, listener, lambda: None))
            thread.start()
            try:
                yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
            finally:
                server.should_exit = True
                thread.join()
                listener.close()


def main() -> None:
    configure(logging.WARNING)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with coordinator(folder / "coordinator") as url:
            start_worker(url, "Worker-1", "python_expert", write_dataset(folder / "python.jsonl", "python")).join()
            with gateway_server(url) as address, httpx2.Client(base_url=address, timeout=60) as http:
                models = [model["id"] for model in http.get("/models").raise_for_status().json()["data"]]
                print("models:", ", ".join(sorted(models)))
                question = {"role": "user", "content": "python lesson 3"}
                asked = {"model": "python_expert", "messages": [question], "max_tokens": 8, "temperature": 0}
                answer = http.post("/chat/completions", json=asked).raise_for_status().json()
                print("answer:", repr(answer["choices"][0]["message"]["content"]))
                with http.stream("POST", "/chat/completions", json={**asked, "stream": True}) as stream:
                    print("events:", sum(line.startswith("data: ") for line in stream.iter_lines()))


if __name__ == "__main__":
    main()
