"""Durable updates per second with the journal in PostgreSQL, beside SQLite: blobs in a folder both times.

    python benchmarks/bench_journals.py --database-url postgresql+psycopg://user@127.0.0.1/db [--seconds 4] [--rounds 5]

Both take the updates of bench_coordinator.py from four workers, in turns: a round starts a new coordinator on an empty
state with the one, then with the other, so that both meet the same disk. Every PostgreSQL round has a schema of its
own, which is dropped afterwards. The server is on the same machine and syncs its log to the disk of its data.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from lib.harness import pin_threads, write_result

pin_threads(1)

import psutil  # noqa: E402  # threads are pinned first
import sqlalchemy as sa  # noqa: E402
from bench_coordinator import EXPERTS, MANIFEST, SEED, latency, prepare, run_pushes  # noqa: E402
from lib.coordinator_process import coordinator_process  # noqa: E402

from fedmoe.lora.codec import WireDtype  # noqa: E402
from fedmoe.server.storage.postgres import postgres_engine  # noqa: E402
from fedmoe.wire.client import CoordinatorClient  # noqa: E402

WORKERS = 4
DTYPES: tuple[WireDtype, ...] = ("fp32", "int8")


@contextmanager
def schema(url: str, name: str) -> Iterator[str]:
    """The URL of a new schema in the database, gone afterwards."""
    engine = postgres_engine(url)
    execute(engine, f"CREATE SCHEMA {name}")
    try:
        yield f"{url}{'&' if '?' in url else '?'}options=-csearch_path%3D{name}"
    finally:
        execute(engine, f"DROP SCHEMA {name} CASCADE")
        engine.dispose()


def execute(engine: sa.Engine, statement: str) -> None:
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(sa.text(statement))


def measure(dtype: WireDtype, seconds: float, scratch: str, database: str | None) -> dict[str, float]:
    """One coordinator on an empty state: its rate, the median and 99th percentile of a push, its CPU for an update."""
    variables = {"FEDMOE_DATABASE_URL": database} if database is not None else {}
    with (
        tempfile.TemporaryDirectory(dir=scratch) as state,
        coordinator_process(state, variables=variables) as running,
        CoordinatorClient(running.url) as api,
    ):
        for index in range(EXPERTS):
            api.register(f"expert-{index}", "bench", MANIFEST)
        process = psutil.Process(running.pid)
        before = sum(process.cpu_times()[:2])
        rates, pushes = run_pushes(running.port, WORKERS, prepare(dtype), seconds, 1)
        cpu = (sum(process.cpu_times()[:2]) - before) / len(pushes)
    told = latency(pushes)
    return {"rate": rates[0], "median_ms": told["median_ms"], "p99_ms": told["p99_ms"], "cpu_seconds": cpu}


def summary(rounds: list[dict[str, float]]) -> dict[str, object]:
    rates = [one["rate"] for one in rounds]
    medians = {name: statistics.median(one[name] for one in rounds) for name in ("median_ms", "p99_ms", "cpu_seconds")}
    return {"updates_per_second": {"median": statistics.median(rates), "min": min(rates), "max": max(rates)}, **medians}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--database-url", required=True, help="a database that schemas may be made in")
    parser.add_argument("--seconds", type=float, default=4.0, help="length of a measured window")
    parser.add_argument("--rounds", type=int, default=5, help="windows with each journal")
    parser.add_argument("--scratch", default=None, help="folder on the disk to measure (default: the temporary folder)")
    options = parser.parse_args()
    results: dict[str, object] = {}
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        for dtype in DTYPES:
            sqlite, postgres = [], []
            for number in range(options.rounds):
                sqlite.append(measure(dtype, options.seconds, scratch, None))
                with schema(options.database_url, f"bench_{dtype}_{number}") as url:
                    postgres.append(measure(dtype, options.seconds, scratch, url))
            rows = {"sqlite": summary(sqlite), "postgresql": summary(postgres)}
            ratio = sum(one["rate"] for one in postgres) / sum(one["rate"] for one in sqlite)
            results[dtype] = rows | {"share_of_sqlite": ratio}
            print(f"{dtype:5} PostgreSQL takes {100 * ratio:.0f} % of SQLite's updates/s: {rows}", flush=True)
    arguments = {"seconds": options.seconds, "rounds": options.rounds, "workers": WORKERS}
    print(write_result("journals", results, arguments, seeds=[SEED]))


if __name__ == "__main__":
    main()
