"""Plan of a worker before it starts: what it trains, its memory, its traffic; computed from settings alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from types import SimpleNamespace

from fedmoe.config import WorkerConfig
from fedmoe.lora.adapter import Layout
from fedmoe.lora.codec import encoded_size
from fedmoe.models.base_shape import selected
from fedmoe.models.step_memory import DEFAULT_MAX_LENGTH, StepShape, step_memory
from fedmoe.models.stored_base import StoredBase

ITEM_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
_GIB = 2**30


@dataclass(frozen=True, slots=True)
class Machine:
    """Where a worker will compute: device, precision, and bytes that are free there, None if not known."""

    device: str
    dtype: str
    available: int | None


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes at the peak of a step: base model and adapter; gradient and moments; activations with logits."""

    weights: int
    gradients_and_optimizer: int
    activations: int
    total: int
    available: int | None

    @property
    def fits(self) -> bool:
        """Whether so much is free, as far as that is known."""
        return self.available is None or self.total <= self.available


@dataclass(frozen=True, slots=True)
class Traffic:
    """What a worker exchanges: bytes of a push and of the weights that answer it, GB (1e9 bytes) an hour."""

    wire_dtype: str
    push_bytes: int
    answer_bytes: int
    sync_interval: float
    upload_gb_per_hour: float
    download_gb_per_hour: float


@dataclass(frozen=True, slots=True)
class WorkerPlan:
    """A worker before it starts; None stands for what is known only once the base model is loaded.

    `first_push_seconds` count from the first step on: loading and tokenising come before.
    """

    base_model: str
    base_parameters: int | None
    expert: str
    lora_r: int
    lora_alpha: float
    modules: int | None
    trainable_parameters: int | None
    max_length: int
    per_device_train_batch_size: int
    device: str
    dtype: str
    memory: MemoryPlan | None
    traffic: Traffic | None
    first_push_seconds: float

    def as_json(self) -> dict[str, object]:
        """JSON types only."""
        return asdict(self) | {"fits": self.memory.fits if self.memory is not None else None}

    def lines(self) -> list[str]:
        """The plan in words."""
        unknown = "known once the base model is loaded"
        size = f"{self.base_parameters:,} parameters, " if self.base_parameters is not None else ""
        lines = [
            f"plan: expert {self.expert} on {self.base_model} ({size}{self.dtype} on {self.device})",
            f"  adapter: rank {self.lora_r}, alpha {self.lora_alpha:g}, "
            + (
                f"{self.modules} modules, {self.trainable_parameters:,} trainable parameters"
                if self.modules
                else unknown
            ),
            f"  memory: {_memory_line(self.memory) if self.memory is not None else unknown}"
            f" (rows of {self.max_length} tokens, {self.per_device_train_batch_size} at once)",
        ]
        if (traffic := self.traffic) is not None:
            lines.append(
                f"  network: {_megabytes(traffic.push_bytes)} a push ({traffic.wire_dtype}) every "
                f"{traffic.sync_interval:g} s: {traffic.upload_gb_per_hour:.3g} GB an hour up, "
                f"{traffic.download_gb_per_hour:.3g} GB down at most, "
                "next to nothing where no other worker trains the expert"
            )
        return [*lines, f"  first push: {self.first_push_seconds:g} s after the first step begins, or when it is done"]


def _memory_line(memory: MemoryPlan) -> str:
    parts = (
        f"{memory.total / _GIB:.2f} GiB = weights {memory.weights / _GIB:.2f} + gradients and optimizer "
        f"{memory.gradients_and_optimizer / _GIB:.2f} + activations {memory.activations / _GIB:.2f}"
    )
    if memory.available is None:
        return parts
    there = f"{parts}, {memory.available / _GIB:.2f} are free"
    return there if memory.fits else f"{there}: too little, give a smaller --max-length or --gradient-checkpointing"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.3g} MB"


def worker_plan(
    config: WorkerConfig, base: StoredBase | None, theirs: Layout | None, least_interval: float, machine: Machine
) -> WorkerPlan:
    """The plan for a settled configuration; `theirs` is the layout of the federation's experts, if it has some."""
    layout = theirs or _layout(config, base)
    length = config.max_length or min(DEFAULT_MAX_LENGTH, (base and base.context) or DEFAULT_MAX_LENGTH)
    parameters = base.parameters() if base is not None else None
    interval = max(config.sync_interval, least_interval)
    return WorkerPlan(
        base_model=config.base_model,
        base_parameters=parameters,
        expert=config.specialty,
        lora_r=config.lora_r,
        lora_alpha=config.lora_alpha,
        modules=len(layout.modules) if layout is not None else None,
        trainable_parameters=layout.size if layout is not None else None,
        max_length=length,
        per_device_train_batch_size=config.per_device_train_batch_size,
        device=machine.device,
        dtype=machine.dtype,
        memory=_memory(config, base, layout, parameters, length, machine),
        traffic=_traffic(config, layout, interval) if layout is not None else None,
        first_push_seconds=interval,
    )


def _layout(config: WorkerConfig, base: StoredBase | None) -> Layout | None:
    """The adapter that these options make; None where the base model's modules are not known."""
    if base is None or base.shape is None:
        return None
    chosen = set(selected([module.name for module in base.shape.modules], config.target_modules))
    modules = tuple(module for module in base.shape.modules if module.name in chosen)
    return Layout(modules, config.lora_r) if modules else None


def _memory(
    config: WorkerConfig,
    base: StoredBase | None,
    layout: Layout | None,
    parameters: int | None,
    length: int,
    machine: Machine,
) -> MemoryPlan | None:
    if base is None or layout is None or parameters is None:
        return None
    item, batch = ITEM_BYTES[machine.dtype], config.per_device_train_batch_size
    settings = SimpleNamespace(**base.config)
    try:
        shape = StepShape.of(settings, layout.size, config.lora_r, length, batch, config.gradient_checkpointing, item)
    except (AttributeError, TypeError):  # a family of other settings
        return None
    return memory_plan(parameters, shape, machine.available)


def memory_plan(parameters: int, shape: StepShape, available: int | None = None) -> MemoryPlan:
    """The memory of a worker whose base model has so many parameters of `shape.item` bytes each."""
    step = step_memory(shape)
    weights = parameters * shape.item + step.adapter
    activations = step.total - step.adapter - step.optimizer
    return MemoryPlan(weights, step.optimizer, activations, weights + step.optimizer + activations, available)


def _traffic(config: WorkerConfig, layout: Layout, interval: float) -> Traffic:
    pushed, answered = encoded_size(layout, config.wire_dtype), encoded_size(layout, "fp32")
    an_hour = 3600 / interval / 1e9
    return Traffic(config.wire_dtype, pushed, answered, interval, pushed * an_hour, answered * an_hour)
