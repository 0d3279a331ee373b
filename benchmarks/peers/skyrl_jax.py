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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from arena_workload import (
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
        measure(single_precision(Path(chosen.model).resolve(), Path(folder)), chosen)


def measure(model: Path, chosen: typing.Any) -> None:
    import jax
    from skyrl.backends.jax import JaxBackend, JaxBackendConfig
    from skyrl.tinker import types
    from skyrl.tinker.engine import prepare_model_pass_batch
    from transformers import AutoTokenizer

    # One slot more than policies: the first stands for the base model.
    config = JaxBackendConfig(
        max_lora_adapters=chosen.policies + 1, max_lora_rank=RANK, train_micro_batch_size=chosen.micro_batch
    )
    backend = JaxBackend(str(model), config)
    names = [f"policy_{index}" for index in range(chosen.policies)]
    for index, name in enumerate(names):
        backend.create_model(name, types.LoraConfig(rank=RANK, alpha=ALPHA, seed=index))
    tokenizer = AutoTokenizer.from_pretrained(model)
    draw = random.Random(0)
    requests = {}
    for index, name in enumerate(names):
        start = tokenizer(prompt(index))["input_ids"]
        data = [datum(types, start, [draw.randrange(3, 49000) for _ in range(NEW_TOKENS)]) for _ in range(SAMPLES)]
        requests[name] = (name, types.ForwardBackwardInput(data=data, loss_fn="ppo"))
    batch = prepare_model_pass_batch(requests)
    adam = types.AdamParams(learning_rate=LEARNING_RATE, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.0)
    loaded = peak_memory()
    steps = []
    for _ in range(chosen.repeats + 1):
        spent = Spent()
        with spent.on("learn"):
            answers = backend.forward_backward(batch)
            norms = [backend.optim_step(name, types.OptimStepInput(adam_params=adam)).metrics for name in names]
            jax.block_until_ready(jax.tree.leaves(backend.lora_params))
        assert set(answers) == set(names)
        assert all(norm["skyrl.ai/grad_norm"] > 0 for norm in norms)
        steps.append(spent)
    report(
        steps[1:],
        loaded,
        first_step_seconds=steps[0].wall["learn"],
        prompt_tokens=[len(start) for start in (tokenizer(prompt(index))["input_ids"] for index in range(len(names)))],
        dtypes=sorted({str(leaf.dtype) for leaf in jax.tree.leaves(backend.non_lora_params)}),
        slots_bytes=sum(leaf.nbytes for leaf in jax.tree.leaves(backend.lora_params)),
    )


def datum(types: typing.Any, start: list[int], tokens: list[int]) -> object:
    """One sampled continuation as the back end wants it: every position predicts the next token."""
    sequence = [*start, *tokens]
    silent = len(start) - 1
    mask = [0.0] * silent + [1.0] * len(tokens)
    advantage = 1.0 if tokens[0] % 2 else -1.0

    def tensor(values: list[float] | list[int]) -> object:
        return types.TensorData(data=values)

    inputs = types.LossFnInputs(
        target_tokens=tensor(sequence[1:]),
        weights=tensor(mask),
        advantages=tensor([advantage * one for one in mask]),
        logprobs=tensor([-10.0 * one for one in mask]),
    )
    chunk = types.EncodedTextChunk(tokens=sequence[:-1])
    return types.Datum(loss_fn_inputs=inputs, model_input=types.ModelInput(chunks=[chunk]))


if __name__ == "__main__":
    main()
