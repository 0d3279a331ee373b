"""A gateway that is merged by a strategy of one's own, which an installed package offers.

Run it: pip install ./examples/norm_strategy && python examples/own_strategy.py
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
        with coordinator(folder / "coordinator", strategy="by_norm") as url, fedmoe.Client(url) as client:
            # The second one trains longer, and is worth less a step for it.
            for topic, steps in (("python", 10), ("sql", 30)):
                start_worker(url, f"W-{topic}", topic, write_dataset(folder / f"{topic}.jsonl", topic), steps).join()
            gateway = client.gateway()
            print(f"merged by {gateway.strategy}:")
            for expert, weight in gateway.weights.items():
                print(f"  {expert}: {weight:.3f}")
            assert gateway.weights["python"] > gateway.weights["sql"]


if __name__ == "__main__":
    main()
