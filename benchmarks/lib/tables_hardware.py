"""Tables of docs/hardware.md: memory by base model, rank and length; the estimate against what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace

from fedmoe.lora.adapter import Layout
from fedmoe.lora.codec import encoded_size
from fedmoe.models.base_shape import BaseShape
from fedmoe.models.known_bases import KNOWN_BASES
from fedmoe.models.step_memory import StepShape
from fedmoe.worker.plan import MemoryPlan, memory_plan
from lib.table_text import results, table

RANKS = (8, 16, 64)
LENGTHS = (512, 1024, 2048)
_BASES = (
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    "Qwen/Qwen2.5-0.5B-Instruct",
    "meta-llama/Llama-3.2-1B-Instruct",
    "Qwen/Qwen2.5-1.5B-Instruct",
    "Qwen/Qwen2.5-7B-Instruct",
)
_GIB = 2**30
#: Of bfloat16, in which a GPU trains.
_ITEM = 2


def memory_by_base() -> str:
    """One row of `batch` 1 in bfloat16, all linear modules adapted."""
    rows = []
    for name in _BASES:
        shape = BaseShape.of(KNOWN_BASES[name])
        assert shape is not None
        for rank in RANKS:
            layout = Layout(shape.modules, rank)
            plans = [_plan(KNOWN_BASES[name], layout, shape.parameters, length, False) for length in LENGTHS]
            least = _plan(KNOWN_BASES[name], layout, shape.parameters, LENGTHS[-1], True)
            rows.append(
                [
                    name.partition("/")[2].removesuffix("-Instruct"),
                    str(rank),
                    f"{layout.size / 1e6:.1f}",
                    f"{encoded_size(layout, 'fp32') / 1e6:.0f} / {encoded_size(layout, 'int8') / 1e6:.0f}",
                    f"{plans[0].weights / _GIB:.2f}",
                    f"{plans[0].gradients_and_optimizer / _GIB:.2f}",
                    *(f"{plan.total / _GIB:.1f}" for plan in plans),
                    f"{least.total / _GIB:.1f}",
                ]
            )
    header = ["base model", "rank", "trainable, M", "push MB, fp32 / int8", "weights", "gradients, optimizer"]
    lengths = [f"all, {length} tokens" for length in LENGTHS]
    return table([*header, *lengths, f"{LENGTHS[-1]} with checkpointing"], rows)


def _plan(
    config: Mapping[str, object], layout: Layout, parameters: int, length: int, checkpointing: bool
) -> MemoryPlan:
    shape = StepShape.of(SimpleNamespace(**config), layout.size, layout.rank, length, 1, checkpointing, _ITEM)
    return memory_plan(parameters, shape)


def memory_estimate() -> str:
    """The estimate against the peak of real steps."""
    rows = []
    for row in results("memory_estimate")["rows"]:
        excess = 100 * (row["estimated_mib"] / row["measured_mib"] - 1)
        rows.append(
            [
                row["base"],
                f"{row['batch']} x {row['length']}" + (", checkpointing" if row["checkpointing"] else ""),
                f"{row['measured_mib']:,}",
                f"{row['estimated_mib']:,}",
                f"{excess:+.0f} %",
            ]
        )
    return table(["base model", "rows x tokens", "measured, MiB", "estimated, MiB", "difference"], rows)
