"""`fedmoe worker`: train one expert on local data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import typer

from fedmoe.cli.options import (
    BASE_MODEL_OPTIONS,
    DEVICE_OPTIONS,
    JOIN_TOKEN,
    LONG_ROWS,
    MAP,
    AsJson,
    OptionText,
    configured,
)
from fedmoe.cli.output import CommandError, importing
from fedmoe.config import DEFAULT_SYNC_INTERVAL, WorkerConfig
from fedmoe.runtime.logs import configure

DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the plan (memory, traffic), and end before anything is loaded.")
]
_OPTIONS: Mapping[str, OptionText] = {
    "coordinator_url": typer.Option(
        envvar=["FEDMOE_WORKER_COORDINATOR_URL", "FEDMOE_COORDINATOR_URL"],
        help="Where the coordinator listens, http://HOST:PORT.",
    ),
    "worker_id": "This worker's name, for example Worker-1-Python.",
    "specialty": "The expert to train, for example python_expert.",
    "dataset": "A data file, a folder of them, or a hub id.",
    "map": MAP,
    "long_rows": LONG_ROWS,
    "sync_interval": typer.Option(
        metavar="SECONDS", help=f"Seconds between pushes, 5 to 30 recommended. [default: {DEFAULT_SYNC_INTERVAL}]"
    ),
    **BASE_MODEL_OPTIONS,
    "state_dir": "Identity and checkpoints. [default: runs/workers/ID]",
    "allow_changed_data": "Go on where it was even if samples are gone or changed. [default: refuse]",
    "eval_dataset": "Held-out data to measure the loss on.",
    "eval_split": typer.Option(metavar="FRACTION", help="Hold out this share of the rows of --dataset instead."),
    "eval_steps": "Measure every so many steps. [default: 50]",
    "early_stopping_patience": "Stop after so many held-out losses without improvement. [default: never]",
    "early_stopping_threshold": "Least fall of the held-out loss that counts as improvement, in nats. [default: 0]",
    "max_steps": "Stop after so many optimizer steps. [default: never]",
    "num_train_epochs": "Stop after so many passes over the data, instead of --max-steps.",
    "max_unsynced": "Seconds to train on while the coordinator is away. [default: 600]",
    "wire_dtype": "Precision of updates: fp32 (default), bf16, int8.",
    "start_from": "Refuse to join unless experts start from: initial or gateway. [default: any]",
    **DEVICE_OPTIONS,
    "max_length": "Tokens in a packed row. [default: the federation's, else 1024, or the model's context if shorter]",
    "per_device_train_batch_size": "Rows per micro-batch. [default: 1]",
    "gradient_accumulation_steps": "Micro-batches per step. [default: 1]",
    "gradient_checkpointing": "Less memory, more time.",
    "learning_rate": "Learning rate. [default: 1e-3]",
    "lr_scheduler_type": "How the learning rate falls: constant (default), linear, cosine.",
    "warmup_steps": "Steps in which the learning rate rises. [default: 5]",
    "weight_decay": "Weight decay. [default: 0]",
    "max_grad_norm": "Gradients of a larger norm are scaled down. [default: 1]",
    "lora_r": "LoRA rank. [default: the federation's, 16 for its first expert]",
    "lora_alpha": "LoRA alpha. [default: the federation's, 32 for its first expert]",
    "lora_dropout": "Dropout before the LoRA layers. [default: 0]",
    "target_modules": "Ends of module names, repeatable. [default: the federation's, all-linear for its first]",
    "seed": "Seed of the order of the data. [default: 0]",
    "send_statistics": "Send statistics of the data for merging and routing. [default: on]",
    "report_to": typer.Option(
        metavar="NAMES", help="Also send metrics to: trackio, wandb, mlflow, with commas between. [default: none]"
    ),
    "token": JOIN_TOKEN,
}


@configured(WorkerConfig, _OPTIONS)
def worker(config: WorkerConfig, dry_run: DryRun = False, as_json: AsJson = False) -> None:
    """Train one expert on local data; the data stay on this machine, updates and statistics of them go."""
    if as_json and not dry_run:
        raise CommandError("--json prints the plan of --dry-run; add --dry-run, or drop --json")
    configure()
    with importing("worker"):
        from fedmoe.cli.worker_start import start_worker
    start_worker(config, dry_run, as_json)
