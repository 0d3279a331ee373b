"""An arena run from Python: four policies of the tiny model against each other, watched as the records come.

Run it: python examples/arena_run.py
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fedmoe.arena.config import ArenaConfig
from fedmoe.arena.run.options import RunOptions, Stop
from fedmoe.arena.run.run import run_arena
from fedmoe.monitor.arena_series import arena_series
from fedmoe.runtime.logs import configure
from fedmoe.runtime.records import Record, Recorder, read_records
from fedmoe.runtime.sinks import WatchedWriter

CONFIG = ArenaConfig.model_validate(
    {
        "base_model": "tiny",
        "task": {"name": "committee:chain_sum", "options": {"min_terms": 2, "max_terms": 2, "max_digits": 1}},
        "policies": {"count": 4, "rank": 2},
        "phases": [{"mode": "competitive", "iterations": 2}, {"mode": "cooperative", "iterations": 2}],
        "learning": {"groups": 2, "samples": 2, "learning_rate": 0.01},
        "evaluation": {"episodes": 4},
    }
)


class Printer:
    """A sink of one's own: gets every record once it is kept."""

    def write(self, record: Record) -> None:
        if record["kind"] == "timing":
            print(f"iteration {record['iteration']}: {record['tokens']} tokens in {record['iteration_seconds']:.2f} s")

    def close(self) -> None:
        print("the run has ended")


@contextmanager
def watched(records: Recorder, folder: Path, memory_limit: Callable[[], int]) -> Iterator[Recorder]:
    writer = WatchedWriter(records, [Printer()])
    try:
        yield writer
    finally:
        writer.close()


def main() -> None:
    configure(logging.WARNING)
    with tempfile.TemporaryDirectory() as name:
        ending = run_arena(CONFIG, RunOptions(Path(name), rollout_device="cpu", learner_device="cpu"), Stop(), watched)
        series = arena_series(read_records(Path(name) / "metrics.jsonl"))
        for policy, table in series.tables.items():
            print(f"{policy}: rewards {[round(float(value), 2) for value in table.column('reward')]}")
        print(ending.status)


if __name__ == "__main__":
    main()
