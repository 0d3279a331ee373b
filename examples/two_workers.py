"""A federation in one process: a coordinator, two workers that train an expert each, and a client that looks on.

Run it: python examples/two_workers.py
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

from local_federation import coordinator, start_worker, write_dataset

import fedmoe
from fedmoe.runtime.logs import configure


def main() -> None:
    configure(logging.WARNING)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with coordinator(folder / "coordinator") as url, fedmoe.Client(url) as client:
            workers = [
                start_worker(
                    url, f"Worker-{number}", f"{topic}_expert", write_dataset(folder / f"{topic}.jsonl", topic)
                )
                for number, topic in enumerate(("python", "sql"), 1)
            ]
            for worker in workers:
                worker.join()
            for expert in client.experts():
                (contributor,) = expert.workers
                held_out = contributor.held_out
                assert held_out is not None
                assert held_out.first is not None
                print(f"{expert.name} v{expert.version}: held-out loss {held_out.first:.3f} -> {held_out.loss:.3f}")
            gateway = client.gateway_weights()
            print(f"gateway v{gateway.version} of {gateway.sources}, rank {gateway.adapter.rank}")
            undone = client.roll_back("sql_expert", to_version=1, reason="an example")
            print(f"sql_expert is at version {undone.version} now, {undone.removed} updates fewer")
            print("newest event:", client.events()[-1].kind)


if __name__ == "__main__":
    main()
