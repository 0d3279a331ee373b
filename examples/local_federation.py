"""A federation in this process, for the other examples: a coordinator on a free port, workers in threads.

Real federations run `fedmoe coordinator` and `fedmoe worker` (or `fedmoe join`) as processes of their own; these
functions start the same objects with the same options.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedmoe.cli.worker_setup import run_worker
from fedmoe.config import CoordinatorConfig, WorkerConfig
from fedmoe.distributed_coordinator import DistributedCoordinator
from fedmoe.wire.http.serving import listen, run, server_of


@contextmanager
def coordinator(folder: Path, **options: str | int | float) -> Iterator[str]:
    """A coordinator with the options of `fedmoe coordinator`, until the block ends; gives its URL."""
    config = CoordinatorConfig.model_validate({"state_dir": str(folder), **options})
    running, listener = DistributedCoordinator(config), listen("127.0.0.1", 0)
    server = server_of(running.app)
    running.service.start()
    thread = threading.Thread(target=run, args=(server, listener, lambda: None))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()
        running.close()


def start_worker(url: str, name: str, expert: str, dataset: Path, steps: int = 30) -> threading.Thread:
    """A worker of the tiny model in a thread of its own, which ends after so many steps."""
    config = WorkerConfig(
        coordinator_url=url,
        worker_id=name,
        specialty=expert,
        dataset=str(dataset),
        state_dir=str(dataset.parent / name),
        base_model="tiny",
        device="cpu",
        max_length=64,
        max_steps=steps,
        eval_split=0.2,
        eval_steps=10,
        sync_interval=1.0,
        learning_rate=0.01,
        lora_r=4,
        lora_alpha=8.0,
    )
    worker = threading.Thread(target=run_worker, args=(config,), name=name)
    worker.start()
    return worker


def write_dataset(file: Path, topic: str, rows: int = 120) -> Path:
    """A small data file: rows of text with the same few words."""
    file.parent.mkdir(parents=True, exist_ok=True)
    texts = [f"{topic} lesson {number % 9}: {topic} begins with {topic[:3]}" for number in range(rows)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file
