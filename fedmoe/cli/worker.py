"""`fedmoe worker`: train one expert on local data."""

from __future__ import annotations

from typing import Annotated

import typer

from fedmoe.cli.options import ChatTemplateFile, ChatTemplateKwargs, DataMap, LongRows
from fedmoe.cli.output import given, importing
from fedmoe.config import DEFAULT_SYNC_INTERVAL, WorkerConfig
from fedmoe.runtime.logs import configure


def worker(
    coordinator_url: Annotated[
        str,
        typer.Option(
            envvar=["FEDMOE_WORKER_COORDINATOR_URL", "FEDMOE_COORDINATOR_URL"],
            help="Where the coordinator listens, http://HOST:PORT.",
        ),
    ],
    worker_id: Annotated[
        str, typer.Option(envvar="FEDMOE_WORKER_WORKER_ID", help="This worker's name, for example Worker-1-Python.")
    ],
    specialty: Annotated[
        str, typer.Option(envvar="FEDMOE_WORKER_SPECIALTY", help="The expert to train, for example python_expert.")
    ],
    dataset: Annotated[
        str, typer.Option(envvar="FEDMOE_WORKER_DATASET", help="A data file, a folder of them, or a hub id.")
    ],
    map: DataMap = None,
    long_rows: LongRows = None,
    # Text, so that one place judges it and names the range, whatever was given.
    sync_interval: Annotated[
        str | None,
        typer.Option(
            metavar="SECONDS", help=f"Seconds between pushes, 5 to 30 recommended. \\[default: {DEFAULT_SYNC_INTERVAL}]"
        ),
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(help="Base model: smollm2, tiny, a folder or a hub id. \\[default: Qwen/Qwen2.5-0.5B-Instruct]"),
    ] = None,
    chat_template: ChatTemplateFile = None,
    chat_template_kwargs: ChatTemplateKwargs = None,
    state_dir: Annotated[
        str | None, typer.Option(help="Identity and checkpoints. \\[default: runs/workers/ID]")
    ] = None,
    allow_changed_data: Annotated[
        bool | None, typer.Option(help="Go on where it was even if samples are gone or changed. \\[default: refuse]")
    ] = None,
    eval_dataset: Annotated[str | None, typer.Option(help="Held-out data to measure the loss on.")] = None,
    eval_split: Annotated[
        float | None, typer.Option(metavar="FRACTION", help="Hold out this share of the rows of --dataset instead.")
    ] = None,
    eval_steps: Annotated[int | None, typer.Option(help="Measure every so many steps. \\[default: 50]")] = None,
    early_stopping_patience: Annotated[
        int | None, typer.Option(help="Stop after so many held-out losses without improvement. \\[default: never]")
    ] = None,
    early_stopping_threshold: Annotated[
        float | None,
        typer.Option(help="Least fall of the held-out loss that counts as improvement, in nats. \\[default: 0]"),
    ] = None,
    max_steps: Annotated[
        int | None, typer.Option(help="Stop after so many optimizer steps. \\[default: never]")
    ] = None,
    num_train_epochs: Annotated[
        float | None, typer.Option(help="Stop after so many passes over the data, instead of --max-steps.")
    ] = None,
    max_unsynced: Annotated[
        float | None, typer.Option(help="Seconds to train on while the coordinator is away. \\[default: 600]")
    ] = None,
    wire_dtype: Annotated[str | None, typer.Option(help="Precision of updates: fp32 (default), bf16, int8.")] = None,
    start_from: Annotated[
        str | None, typer.Option(help="Refuse to join unless experts start from: initial or gateway. \\[default: any]")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Device: auto (default), cpu, cuda, cuda:1, mps.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Precision of computing: auto (default), bf16, fp16, fp32.")] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens in a packed row. \\[default: 1024, or the model's context if shorter]")
    ] = None,
    per_device_train_batch_size: Annotated[
        int | None, typer.Option(help="Rows per micro-batch. \\[default: 1]")
    ] = None,
    gradient_accumulation_steps: Annotated[
        int | None, typer.Option(help="Micro-batches per step. \\[default: 1]")
    ] = None,
    gradient_checkpointing: Annotated[bool | None, typer.Option(help="Less memory, more time.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Learning rate. \\[default: 1e-3]")] = None,
    lr_scheduler_type: Annotated[
        str | None, typer.Option(help="How the learning rate falls: constant (default), linear, cosine.")
    ] = None,
    warmup_steps: Annotated[
        int | None, typer.Option(help="Steps in which the learning rate rises. \\[default: 5]")
    ] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Weight decay. \\[default: 0]")] = None,
    max_grad_norm: Annotated[
        float | None, typer.Option(help="Gradients of a larger norm are scaled down. \\[default: 1]")
    ] = None,
    lora_r: Annotated[int | None, typer.Option(help="LoRA rank. \\[default: 16]")] = None,
    lora_alpha: Annotated[float | None, typer.Option(help="LoRA alpha. \\[default: 32]")] = None,
    lora_dropout: Annotated[float | None, typer.Option(help="Dropout before the LoRA layers. \\[default: 0]")] = None,
    target_modules: Annotated[
        list[str] | None, typer.Option(help="Ends of module names, repeatable. \\[default: all-linear]")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the order of the data. \\[default: 0]")] = None,
    send_statistics: Annotated[
        bool | None, typer.Option(help="Send statistics of the data for merging and routing. \\[default: on]")
    ] = None,
    token: Annotated[str | None, typer.Option(help="Join token; better as FEDMOE_TOKEN.", show_default=False)] = None,
) -> None:
    """Train one expert on local data; the data stay on this machine, updates and statistics of them go."""
    config = WorkerConfig(**given(**locals()))  # type: ignore[arg-type]
    configure()
    with importing("worker"):
        from fedmoe.cli.worker_setup import run_worker
    run_worker(config)
