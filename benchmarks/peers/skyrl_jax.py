"""SkyRL's side of `bench_arena_throughput.py`: its JAX back end trains P adapters of one base model, no sampling.

The tokens are drawn at random: what they are does not change what is computed. The micro-batch is one policy's
samples, as it is at ours: whole batches of four policies and more do not fit into this machine's memory.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
import typing
from pathlib import Path

from lib.arena_workload import (
    ALPHA,
    LEARNING_RATE,
    NEW_TOKENS,
    RANK,
    SAMPLES,
    Spent,
    arguments,
    peak_memory,
    prompt,
    report,
)

# XLA takes as many threads as the process may use processors.
os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
os.environ["JAX_PLATFORMS"] = "cpu"

if sys.version_info < (3, 12):
    import typing_extensions

    # pydantic refuses the standard library's own on these versions.
    typing.TypedDict = typing_extensions.TypedDict

if typing.TYPE_CHECKING:
    from skyrl.backends.jax import JaxBackend
    from skyrl.tinker.types import Datum, PreparedModelPassBatch


def single_precision(model: Path, folder: Path) -> Path:
    """The same checkpoint, said to be float32: the back end computes in what `config.json` names."""
    for file in model.iterdir():
        if file.name != "config.json":
            (folder / file.name).symlink_to(file)
    config = json.loads((model / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    return folder


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--micro-batch", type=int, default=SAMPLES, help="sequences computed at once")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="skyrl-") as folder:
        model = single_precision(Path(chosen.model).resolve(), Path(folder))
        names = [f"policy_{index}" for index in range(chosen.policies)]
        backend = make_backend(model, names, chosen.micro_batch)
        batch = make_batch(model, names)
        loaded = peak_memory()
        first, *steps = [step(backend, names, batch) for _ in range(chosen.repeats + 1)]
    import jax

    report(
        steps,
        loaded,
        first_step_seconds=first.wall["learn"],
        sequence_tokens=sorted({len(one.chunks[0].tokens) for one in batch.all_model_inputs}),
        dtypes=sorted({str(leaf.dtype) for leaf in jax.tree.leaves(backend.non_lora_params)}),
        slots_bytes=sum(leaf.nbytes for leaf in jax.tree.leaves(backend.lora_params)),
    )


def make_backend(model: Path, names: list[str], micro_batch: int) -> JaxBackend:
    """All policies on one base model."""
    from skyrl.backends.jax import JaxBackend, JaxBackendConfig
    from skyrl.tinker.types import LoraConfig

    # One slot more than policies: the first stands for the base model.
    slots = len(names) + 1
    config = JaxBackendConfig(max_lora_adapters=slots, max_lora_rank=RANK, train_micro_batch_size=micro_batch)
    backend = JaxBackend(str(model), config)
    for index, name in enumerate(names):
        backend.create_model(name, LoraConfig(rank=RANK, alpha=ALPHA, seed=index))
    return backend


def make_batch(model: Path, names: list[str]) -> PreparedModelPassBatch:
    """The samples of all policies, mixed in one request."""
    from skyrl.tinker.engine import prepare_model_pass_batch
    from skyrl.tinker.types import ForwardBackwardInput
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    draw = random.Random(0)
    requests = {}
    for index, name in enumerate(names):
        start = tokenizer(prompt(index))["input_ids"]
        data = [datum(start, [draw.randrange(3, 49000) for _ in range(NEW_TOKENS)]) for _ in range(SAMPLES)]
        requests[name] = (name, ForwardBackwardInput(data=data, loss_fn="ppo"))
    return prepare_model_pass_batch(requests)


def datum(start: list[int], tokens: list[int]) -> Datum:
    """One sampled continuation as the back end wants it: every position predicts the next token."""
    from skyrl.tinker.types import Datum, EncodedTextChunk, LossFnInputs, ModelInput, TensorData

    sequence = [*start, *tokens]
    mask = [0.0] * (len(start) - 1) + [1.0] * len(tokens)
    advantage = 1.0 if tokens[0] % 2 else -1.0
    inputs = LossFnInputs(
        target_tokens=TensorData(data=sequence[1:]),
        weights=TensorData(data=mask),
        advantages=TensorData(data=[advantage * one for one in mask]),
        logprobs=TensorData(data=[-10.0 * one for one in mask]),
    )
    return Datum(loss_fn_inputs=inputs, model_input=ModelInput(chunks=[EncodedTextChunk(tokens=sequence[:-1])]))


def step(backend: JaxBackend, names: list[str], batch: PreparedModelPassBatch) -> Spent:
    """Forward and backward of all policies, then one optimizer step of each."""
    import jax
    from skyrl.tinker.types import AdamParams, OptimStepInput

    adam = AdamParams(learning_rate=LEARNING_RATE, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.0)
    spent = Spent()
    with spent.on("learn"):
        answers = backend.forward_backward(batch)
        metrics = [backend.optim_step(name, OptimStepInput(adam_params=adam)).metrics for name in names]
        jax.block_until_ready(jax.tree.leaves(backend.lora_params))
    assert set(answers) == set(names)
    assert all(one["skyrl.ai/grad_norm"] > 0 for one in metrics)
    return spent


if __name__ == "__main__":
    main()
