"""What updates on their way in take of memory: bounded by what is checked at once, and given back afterwards."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from live import House, LiveServer
from support import LAYOUT, MANIFEST, CoordinatorProcess, make_body, make_flat

from fedmoe.coordinator import Transaction
from fedmoe.lora.adapter import FloatVector, Layout, ModuleShape
from fedmoe.lora.codec import encode
from fedmoe.runtime.errors import RefusedError
from fedmoe.server.storage.folder_blobs import FileBlobWriter
from fedmoe.server.updates import upload
from fedmoe.server.updates.intake import MemoryBudget
from fedmoe.server.updates.upload import opened_writer
from fedmoe.wire.client import CoordinatorClient
from fedmoe.wire.contract.messages import UpdateHeader


def header(index: int) -> UpdateHeader:
    return UpdateHeader(expert="python", worker=f"w{index}", epoch="e1", sequence=0, base_version=0)


def push_all(url: str, bodies: list[bytes]) -> ThreadPoolExecutor:
    """Push every body at once, each from a worker of its own."""

    def push(index: int) -> None:
        with CoordinatorClient(url) as client:
            client.push(header(index), bodies[index])

    pool = ThreadPoolExecutor(len(bodies))
    pool.map(push, range(len(bodies)))
    return pool


def test_updates_that_wait_for_their_decision_do_not_pile_up_decoded(
    house: House, server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    house.service.intake._memory = MemoryBudget(2 * LAYOUT.size * 4)
    decoded: list[int] = []
    usable = upload.usable_norm

    def counted(layout: Layout, flat: FloatVector) -> float:
        decoded.append(1)
        return usable(layout, flat)

    monkeypatch.setattr("fedmoe.server.updates.intake.usable_norm", counted)
    blocked, reached = threading.Event(), threading.Event()

    def slow(transaction: Transaction) -> None:
        reached.set()
        blocked.wait(30)

    house.service.committer.submit(slow)
    reached.wait(30)
    with push_all(server.url, [make_body(seed) for seed in range(8)]):
        while house.service.intake.uploads < 8 or len(decoded) < 2:
            time.sleep(0.005)
        time.sleep(0.2)
        assert len(decoded) == 2
        blocked.set()
    assert len(decoded) == 8
    assert house.service.coordinator.expert("python").version == 8


def test_a_request_that_is_given_up_while_its_file_is_made_leaves_none(house: House) -> None:
    made, go_on = threading.Event(), threading.Event()
    writer = house.blobs.writer

    def slow() -> FileBlobWriter:
        found = writer()
        made.set()
        go_on.wait(30)
        return found

    house.blobs.writer = slow  # type: ignore[method-assign]

    pool = ThreadPoolExecutor(1)

    async def run() -> None:
        task = asyncio.create_task(opened_writer(house.blobs, pool))
        while not made.is_set():
            await asyncio.sleep(0.005)
        task.cancel()
        asyncio.get_running_loop().call_later(0.05, go_on.set)
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    assert list((house.folder / "incoming").iterdir()) == []


def test_an_absurd_norm_is_told_without_a_copy_in_double_precision() -> None:
    layout = Layout((ModuleShape("m", 300_000, 100_000),), 1)
    flat = np.full(layout.size, 1e30, np.float32)
    with pytest.raises(RefusedError) as refused:
        upload.usable_norm(layout, flat)
    assert refused.value.facts["norm"] == pytest.approx(1e30 * layout.size**0.5)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_many_large_uploads_at_once_take_bounded_memory_and_give_it_back(
    coordinator_process: Callable[..., CoordinatorProcess],
) -> None:
    layout = Layout((ModuleShape("m", 150_000, 100_000),), 16)  # 16 MB as float32
    house = coordinator_process(fresh=True)
    house.start()
    assert house.process is not None
    with CoordinatorClient(house.url) as client:
        client.register("python", "w1", replace(MANIFEST, layout=layout))
    before, peak, done = anonymous(house.process.pid), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            peak[0] = max(peak[0], anonymous(house.process.pid))  # type: ignore[union-attr]

    watching = threading.Thread(target=watch)
    watching.start()
    body = encode(layout, make_flat(1, layout), "bf16")
    push_all(house.url, [body] * 24).shutdown()
    done.set()
    watching.join()
    assert peak[0] - before < 80 + 4 * 16 + 24 * 1.5 + 30
    deadline = time.monotonic() + 15
    while anonymous(house.process.pid) - before > 60 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert anonymous(house.process.pid) - before <= 60


def anonymous(process: int) -> float:
    """Anonymous memory of a process in MB."""
    with open(f"/proc/{process}/status") as status:
        (line,) = [line for line in status if line.startswith("RssAnon:")]
    return int(line.split()[1]) / 1024
