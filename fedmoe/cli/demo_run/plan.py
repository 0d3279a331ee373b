"""Plan of the demonstration: three domains, three workers of different speed, one folder."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

#: The row of text that nobody trains on.
GENERAL = "general"


@dataclass(frozen=True, slots=True)
class DemoWorker:
    """One worker: its name, its expert, the domain of its data, and how much it yields to others (nice)."""

    name: str
    expert: str
    domain: str
    niceness: int


#: On two cores the niceness makes the machines' speeds differ, as they do in a real federation.
WORKERS = (
    DemoWorker("Worker-1-Python", "python_expert", "python", 0),
    DemoWorker("Worker-2-SQL", "sql_expert", "sql", 3),
    DemoWorker("Worker-3-Docs", "docs_expert", "docs", 6),
)
# Where commands look for a coordinator that is not named.
_PORT = 5000
#: Steps in which the learning rate rises, where a run has more than that.
WARMUP_STEPS = 5


@dataclass(frozen=True)
class DemoPlan:
    """Where the demonstration works and how long it trains; `held_out_blocks` are scored in every domain.

    Nothing of it but `sync_interval` is a time: a busy machine trains the same steps on the same tokens.
    """

    folder: Path
    data: Path
    base_model: str = "smollm2"
    steps: int = 60
    sync_interval: float = 10.0
    max_length: int = 256
    batch_size: int = 2
    learning_rate: float = 1e-3
    held_out_blocks: int = 16
    seed: int = 0

    def worker_dir(self, worker: DemoWorker) -> Path:
        return self.folder / "workers" / worker.name

    def log(self, worker: DemoWorker) -> Path:
        return self.folder / "logs" / f"{worker.name}.log"

    def coordinator_command(self, port: int) -> list[str]:
        """The options of `fedmoe` that start the coordinator."""
        return [
            "coordinator",
            "--port",
            str(port),
            "--state-dir",
            str(self.folder / "coordinator"),
            "--strategy",
            "regmean",
        ]

    def serve_command(self, url: str, port: int) -> list[str]:
        """The options of `fedmoe` that serve the gateway and the experts of the coordinator at `url`."""
        return ["gateway", "serve", "--coordinator-url", url, "--base-model", self.base_model, "--port", str(port)]

    def commands_to_talk(self) -> list[str]:
        """The commands that bring the federation back and talk to its gateway, each in a terminal of its own."""
        talk = ["gateway", "generate", "Write a function that adds two numbers.", "--base-model", self.base_model]
        return [shlex.join(["fedmoe", *words]) for words in (self.coordinator_command(_PORT), talk)]

    def worker_command(self, worker: DemoWorker, url: str) -> list[str]:
        """The options of `fedmoe` that start a worker."""
        options = {
            "--coordinator-url": url,
            "--worker-id": worker.name,
            "--specialty": worker.expert,
            "--dataset": self.data / worker.domain / "train.jsonl",
            "--state-dir": self.worker_dir(worker),
            "--base-model": self.base_model,
            "--sync-interval": self.sync_interval,
            "--max-steps": self.steps,
            "--lr-scheduler-type": "linear",
            # A rate that falls over the steps needs at least one that the warm-up leaves.
            "--warmup-steps": min(WARMUP_STEPS, self.steps - 1),
            "--learning-rate": self.learning_rate,
            "--max-length": self.max_length,
            "--per-device-train-batch-size": self.batch_size,
            "--wire-dtype": "bf16",
            "--seed": self.seed,
        }
        return ["worker", *(str(word) for option in options.items() for word in option)]
