"""Serving while versions arrive: does any request fail or mix versions, and what does a swap cost?

    python benchmarks/bench_serve_swap.py [--base tiny|smollm2] [--requests 1000] [--versions 20] [--clients 8]
    FEDMOE_VLLM_PYTHON=.venv-vllm/bin/python python benchmarks/bench_serve_swap.py --backend vllm --base smollm2

A coordinator (a process of its own) holds two experts of random factors; the gateway's server follows it in this
process and listens on loopback. With `--backend vllm` it generates on a vLLM server, which is started and ended here.
`--clients` threads send greedy completions of `--tokens` tokens to the gateway and the experts, every other one
streamed, each over a connection of its own that stays open. Meanwhile versions are pushed, spread evenly over the
requests; every push changes an expert and so the gateway.

`failed` counts answers other than 200 and streams that broke off; `mixed` those that are not what the version they
name says alone (`lib/swap_check.py`; recomputed afterwards for `--check` of the requests, since that costs as much as
serving them). Latency is that of a whole request. `swap_delay` is from the answer to the push until the new expert is
served: half the poll interval on average, then download, load, verification on vLLM, and publish. `quiet` is the same
load beforehand with no version arriving.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from lib.harness import pin_threads, write_result

pin_threads(1)

import httpx2  # noqa: E402  # threads are pinned first
import numpy as np  # noqa: E402
from lib.coordinator_process import coordinator_process  # noqa: E402
from lib.swap_check import check  # noqa: E402
from lib.swap_load import (  # noqa: E402
    EXPERTS,
    RANK,
    SEED,
    Load,
    Pusher,
    Swaps,
    latencies,
    listening,
    manifest_of,
    milliseconds,
    swap_while_loaded,
)

from fedmoe.gateway.serve.app import Endpoint, GatewayServer, VllmAddress, backend_maker, open_server  # noqa: E402
from fedmoe.gateway.serve.service import Limits  # noqa: E402
from fedmoe.inference.vllm.server import SERVED_NAME, VllmServer, VllmSettings  # noqa: E402
from fedmoe.lora.adapter import Adapter  # noqa: E402
from fedmoe.models.base import LoadedBase, load_base, prepare_base  # noqa: E402
from fedmoe.runtime.device import pin_threads as pin_torch  # noqa: E402
from fedmoe.wire.client import CoordinatorClient  # noqa: E402

SPREAD = {"tiny": 0.05, "smollm2": 0.01}
# Of gateway and experts the version served, the one before while requests end on it, and the next; and the base model.
_MAX_LORAS = 3 * (1 + len(EXPERTS)) + 1
_LONGEST_SWEEP = 60.0


@dataclass(frozen=True)
class Measurement:
    """What was seen: the load without and with versions arriving, every adapter there was, and what was left loaded:
    in the backend, and on the vLLM server (beside the base model; None without one), whose version it was."""

    quiet: Load
    quiet_seconds: float
    load: Load
    swaps: Swaps
    adapters: dict[str, Adapter]
    left: int
    left_on_vllm: int | None
    vllm_version: str | None


@contextmanager
def vllm_address(options: argparse.Namespace) -> Iterator[VllmAddress | None]:
    """A live vLLM server in float32 if that is the backend."""
    if options.backend != "vllm":
        yield None
        return
    settings = VllmSettings(
        python=Path(os.environ["FEDMOE_VLLM_PYTHON"]),
        model=prepare_base(options.base),
        max_loras=_MAX_LORAS,
        max_rank=RANK * len(EXPERTS),
        max_tokens=256,
    )
    with tempfile.TemporaryDirectory() as folder, VllmServer(settings, Path(folder) / "server.log") as server:
        yield VllmAddress(server.url, SERVED_NAME, Path(folder) / "adapters", None)


def measure(base: LoadedBase, options: argparse.Namespace) -> Measurement:
    """Serve, push, ask; everything is closed afterwards."""
    manifest = manifest_of(base)
    rng = np.random.default_rng(SEED)
    prompts = [tuple(int(t) for t in rng.integers(40, 250, 8 + 8 * (index % 4))) for index in range(8)]
    limits = Limits(128, options.tokens, 4 * options.clients)
    with ExitStack() as stack:
        address = stack.enter_context(vllm_address(options))
        state = stack.enter_context(tempfile.TemporaryDirectory())
        url = stack.enter_context(coordinator_process(state, ["--min-sync-interval", "0"])).url
        api, followed = (stack.enter_context(CoordinatorClient(url)) for _ in range(2))
        for expert in EXPERTS:
            api.register(expert, "bench", manifest)
        pusher = Pusher(api, manifest, SPREAD[options.base])
        for _ in EXPERTS:
            pusher.push()
        maker, gate = backend_maker(options.clients, address), Endpoint("127.0.0.1", 0, None, True)
        running = stack.enter_context(open_server(followed, manifest, base, maker, limits, gate, options.poll))
        port = stack.enter_context(listening(running))
        quiet = Load(port, prompts, options.tokens, max(options.clients, options.requests // 5))
        quiet_seconds = quiet.run(options.clients)
        load = Load(port, prompts, options.tokens, options.requests)
        swaps = swap_while_loaded(load, options.clients, pusher, running, (options.requests, options.versions))
        version = str(httpx2.get(f"{address.url}/version").json()["version"]) if address else None
        return Measurement(quiet, quiet_seconds, load, swaps, pusher.adapters, *left(running, address), version)


def left(running: GatewayServer, address: VllmAddress | None) -> tuple[int, int | None]:
    """How many versions stay loaded, in the backend and on the vLLM server, once the old ones had time to go."""

    def on_vllm() -> int | None:
        if address is None:
            return None
        cards = httpx2.get(f"{address.url}/v1/models").json()["data"]
        return len([card for card in cards if card["parent"] is not None and not card["id"].startswith("zeros@")])

    wanted = 1 + len(EXPERTS)
    await_true(lambda: len(running.service.backend.loaded()) == wanted and on_vllm() in (None, wanted))
    return len(running.service.backend.loaded()), on_vllm()


def await_true(condition: Callable[[], bool]) -> None:
    """Return when it holds, or after a minute."""
    deadline = time.monotonic() + _LONGEST_SWEEP
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)


def run(options: argparse.Namespace) -> dict[str, object]:
    """The benchmark's results."""
    # In bfloat16 the last bits decide near ties, and they depend on who else is in the batch.
    found = measure(load_base(options.base, options.device, "fp32"), options)
    answers = found.load.answers
    good = [answer for answer in answers if answer.status == 200]
    checked = random.Random(SEED).sample(good, min(options.check, len(good)))
    verdict = check(load_base(options.base, options.device, "fp32"), checked, found.adapters, options.tokens)
    return {
        "requests": len(answers),
        "versions_pushed": options.versions,
        "answered_when_the_last_was_served": found.swaps.answered,
        "failed": len(answers) - len(good),
        **asdict(verdict),
        "models_loaded_at_the_end": found.left,
        "models_on_vllm_at_the_end": found.left_on_vllm,
        "vllm_version": found.vllm_version,
        "under_swaps": latencies(answers, found.swaps.seconds),
        "quiet": latencies(found.quiet.answers, found.quiet_seconds),
        "swap_delay": milliseconds(found.swaps.delays),
        "swap_delays_ms": [round(1e3 * delay) for delay in found.swaps.delays],
        "first_failure": next((str(answer.tokens)[:500] for answer in answers if answer.status != 200), None),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--backend", default="transformers", choices=["transformers", "vllm"])
    parser.add_argument("--base", default="tiny", choices=sorted(SPREAD))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--versions", type=int, default=20)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--poll", type=float, default=0.5, help="seconds between two looks at the coordinator")
    parser.add_argument("--check", type=int, default=1000, help="answers recomputed alone")
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    if options.backend == "vllm" and not os.environ.get("FEDMOE_VLLM_PYTHON"):
        parser.error("--backend vllm needs the environment variable FEDMOE_VLLM_PYTHON (scripts/setup_vllm.sh)")
    pin_torch()
    results = run(options)
    print(json.dumps(results, indent=2))
    if not options.no_write:
        backend = "_vllm" if options.backend == "vllm" else ""
        write_result(f"serve_swap_{options.base}{backend}", results, vars(options), [SEED])
    if results["failed"] or results["mixed"]:
        raise SystemExit("requests failed or were mixed")


if __name__ == "__main__":
    main()
