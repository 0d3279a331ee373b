"""Maximum row length in tokens: limited by the base model's context and by the memory of a training step."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from fedmoe.runtime.machine import available_memory

if TYPE_CHECKING:
    import torch

#: Tokens in a row if nobody says otherwise and the model can take so many; the same on every machine.
DEFAULT_MAX_LENGTH = 1024
_GIB = 2**30
_SHORTEST = 8
#: Runtime and allocator, whatever the model.
_FIXED_BYTES = 16 << 20
#: Logits in float32, those of the chosen tokens, their log-probabilities, and gradients of them.
_LOGIT_COPIES = 5


class LengthError(ValueError):
    """A row that the base model, or the memory of this machine, cannot take."""


def resolve_max_length(asked: int | None, context: int) -> int:
    """`asked` tokens, by default `DEFAULT_MAX_LENGTH` or the model's `context` if that is shorter.

    Raises LengthError, with both values, for more than the context.
    """
    if asked is None:
        return min(DEFAULT_MAX_LENGTH, context)
    if asked > context:
        raise LengthError(
            f"--max-length {asked} is more than the base model's context of {context} tokens; give {context} or less"
        )
    return asked


@dataclass(frozen=True, slots=True)
class StepShape:
    """What the memory of a step depends on: sizes of the model, parameters of the adapter, and the batch.

    `width` is heads times head size, `inner` the feed-forward size in use for a token, `item` the bytes of an
    activation.
    """

    layers: int
    hidden: int
    width: int
    inner: int
    vocabulary: int
    adapter: int
    rank: int
    length: int
    batch: int
    item: int = 4
    checkpointing: bool = False

    @classmethod
    def of(
        cls, config: Any, adapter: int, rank: int, length: int, batch: int, checkpointing: bool, item: int = 4
    ) -> Self:
        """From a text model's settings, named as in config.json; raises AttributeError where a size is missing."""
        heads = config.num_attention_heads
        head = getattr(config, "head_dim", None) or config.hidden_size // heads
        inner = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
        inner *= getattr(config, "num_experts_per_tok", None) or 1
        sizes = (config.num_hidden_layers, config.hidden_size, heads * head, inner, config.vocab_size)
        return cls(*sizes, adapter, rank, length, batch, item, checkpointing)


@dataclass(frozen=True, slots=True)
class StepMemory:
    """What a training step takes beside the base model's weights, in bytes.

    `adapter` are its factors in float32, `optimizer` their gradient and two moments; `activations` are what the layers
    keep for the backward pass, and `logits` those of all tokens with their gradients.
    """

    adapter: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """The peak, with a fixed part for runtime and allocator."""
        return self.adapter + self.optimizer + self.activations + self.logits + _FIXED_BYTES


def step_memory(shape: StepShape) -> StepMemory:
    """The peak of a training step by its parts; meant to be at most a third too much.

    Measured on a CPU in float32 (tiny, SmolLM2; 256 to 1024 tokens; one and two rows) it was 3 to 27 % too much; for
    one row of 1024 tokens of SmolLM2, which took 2,015 MiB, half too much. Never compared on a GPU.

    For every token what the layers keep for the backward pass, or only each layer's input with checkpointing; a float
    mask of length x length a row, which attention keeps for each layer; logits as if every token were learned.
    """
    tokens = shape.length * shape.batch
    layer = (6 * shape.hidden + 6 * shape.width + 6 * shape.inner + 7 * shape.rank) * shape.item
    mask = shape.length * shape.length * shape.batch * shape.item
    activations = shape.layers * (tokens * layer + mask)
    if shape.checkpointing:
        # One layer is computed again, with gradients of about its own size.
        activations = shape.layers * tokens * shape.hidden * shape.item + 2 * (tokens * layer + mask)
    logits = _LOGIT_COPIES * tokens * shape.vocabulary * 4
    return StepMemory(4 * shape.adapter, 12 * shape.adapter, activations, logits)


def step_bytes(shape: StepShape) -> int:
    """The peak of a training step in bytes, beside the base model's weights; see `step_memory`."""
    return step_memory(shape).total


def largest_length(shape: StepShape, available: int) -> int | None:
    """The longest row, up to that of `shape`, with which a step fits; None if none does."""
    lengths = range(_SHORTEST, max(_SHORTEST, shape.length) + 1)
    fitting = bisect_right(lengths, available, key=lambda length: step_bytes(replace(shape, length=length)))
    return lengths[fitting - 1] if fitting else None


def check_memory(shape: StepShape, available: int) -> None:
    """Raises LengthError where a step does not fit into `available` bytes, naming what would fit."""
    needed = step_bytes(shape)
    if needed <= available:
        return
    length = largest_length(shape, available)
    choices = [f"--max-length {length}"] if length is not None else []
    if shape.batch > 1:
        batches = range(shape.batch - 1, 0, -1)
        fitting = next((size for size in batches if step_bytes(replace(shape, batch=size)) <= available), None)
        choices += [f"--per-device-train-batch-size {fitting}"] if fitting is not None else []
    if not shape.checkpointing and step_bytes(replace(shape, checkpointing=True)) <= available:
        choices.append("--gradient-checkpointing")
    advice = f"give {', or '.join(choices)}" if choices else "no shorter row fits: free memory, or take a smaller model"
    raise LengthError(
        f"a training step of {shape.batch} rows of {shape.length} tokens takes about {needed / _GIB:.2g} GiB beside "
        f"the base model, {available / _GIB:.2g} GiB are there; {advice}"
    )


def free_memory(device: torch.device, processes: int = 1) -> int:
    """Bytes that one of `processes` on this machine may still take for a step on `device`.

    CUDA: what the driver says is free, and what PyTorch holds unused. Elsewhere the machine's available memory.
    """
    if device.type == "cuda":
        import torch

        free = int(torch.cuda.mem_get_info(device)[0])
        return free + int(torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    return available_memory() // processes
