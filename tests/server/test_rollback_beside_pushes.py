"""Changes of an expert's history while pushes arrive: each takes effect at one moment, between two pushes (82)."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
from live import listening, open_house
from support import EPOCH, make_body

from fedmoe.wire.client import CoordinatorClient
from fedmoe.wire.contract.messages import UpdateHeader


def test_rollbacks_and_retractions_beside_pushes_make_one_history_82(tmp_path: Path) -> None:
    versions: list[int] = []
    lock = threading.Lock()

    def push(url: str, worker: str) -> None:
        with CoordinatorClient(url) as client:
            newest = 0
            for sequence in range(25):
                header = UpdateHeader(
                    expert="python", worker=worker, epoch=EPOCH, sequence=sequence, base_version=newest
                )
                result = client.push(header, make_body(sequence)).result
                # Judged against the head there was: a rollback is a version, so staleness counts it.
                assert result.staleness == result.version - 1 - newest
                newest = result.version
                with lock:
                    versions.append(newest)

    def change(url: str) -> None:
        with CoordinatorClient(url) as client:
            for number in range(10):
                while (head := client.list_experts().experts[0].version) < 2:
                    time.sleep(0.005)
                change = client.roll_back("python", head - 1 - number % 2, "worse")
                with lock:
                    versions.append(change.version)

    with open_house(tmp_path) as house:
        house.register("python")
        with listening(house.app) as server:
            threads = [threading.Thread(target=push, args=(server.url, f"w{n}")) for n in range(3)]
            threads.append(threading.Thread(target=change, args=(server.url,)))
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            with CoordinatorClient(server.url) as client:
                before = client.pull_expert("python")
    assert before is not None
    assert len(versions) > 75
    assert sorted(versions) == list(range(1, len(versions) + 1))
    assert before.version == len(versions)
    with open_house(tmp_path) as house, listening(house.app) as server, CoordinatorClient(server.url) as client:
        after = client.pull_expert("python")
    assert after is not None
    assert (after.version, after.digest) == (before.version, before.digest)
    np.testing.assert_array_equal(after.weights, before.weights)
