"""LoRA on a model's linear layers, with all factors in one flat vector: optimizer, codec and merge need one pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from fedmoe.lora.adapter import Adapter, FloatVector, Layout, ModuleShape, ShapeError, initial_adapter
from fedmoe.models.linear_terms import RowsTerm, linear_with_terms

ALL_LINEAR = "all-linear"


class TargetError(ValueError):
    """A target module that the model does not have."""


class LoraLinear(nn.Module):  # type: ignore[misc]
    """A frozen linear layer plus a low-rank term: `y = base(x) + scale * (dropout(x) @ A^T) @ B^T`.

    A is r x in, B is out x r, both float32 leaves whose memory belongs to an `AttachedAdapter`.
    """

    lora_a: nn.Parameter
    lora_b: nn.Parameter

    def __init__(self, base_layer: nn.Linear, dropout: float) -> None:
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.dropout = dropout
        self.scale = 1.0
        #: Whether the low-rank term is computed; without it the layer is its base.
        self.active = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., in) -> (..., out), in the base layer's dtype."""
        if not self.active:
            return self.base_layer(x)
        if self._single_dtype(x):
            term = RowsTerm(0, len(x), self.scale, self.lora_a, self.lora_b)
            return linear_with_terms(x, self.base_layer.weight, self.base_layer.bias, [term])
        base = self.base_layer(x)
        # Under autocast the float32 factors are cast once per step; without it, mixed dtypes would not multiply.
        inner = x if torch.is_autocast_enabled(x.device.type) else x.to(self.lora_a.dtype)
        if self.dropout and self.training:
            inner = functional.dropout(inner, self.dropout)
        low_rank = functional.linear(functional.linear(inner, self.lora_a), self.lora_b)
        return torch.add(base, low_rank.to(base.dtype), alpha=self.scale)

    def _single_dtype(self, x: torch.Tensor) -> bool:
        """Whether layer and term can be one operation: all in float32, a plain linear layer, and nothing dropped."""
        return (
            type(self.base_layer) is nn.Linear
            and x.dtype == self.base_layer.weight.dtype == self.lora_a.dtype
            and not torch.is_autocast_enabled(x.device.type)
            and not (self.dropout and self.training)
        )


class AttachedAdapter:
    """An adapter in a model: one float32 `parameter` (size,) that every layer's A and B are views of.

    Its gradient is one flat vector too. Moving the model to another device afterwards would cut the views loose;
    `read` and `write` refuse then.
    """

    def __init__(self, model: nn.Module, layers: dict[str, LoraLinear], adapter: Adapter) -> None:
        self._model = model
        self._layers = layers
        self._device = next(iter(layers.values())).base_layer.weight.device
        self._allocate(adapter)

    def _allocate(self, adapter: Adapter) -> None:
        self.layout = adapter.layout
        self.alpha = adapter.alpha
        flat = torch.tensor(adapter.flat, dtype=torch.float32, device=self._device)
        self.parameter = nn.Parameter(flat)
        self.parameter.grad = torch.zeros_like(flat)
        for module in self.layout.modules:
            span, layer = self.layout.spans[module.name], self._layers[module.name]
            layer.scale = adapter.scale
            layer.lora_a = self._view(span.start, span.middle, (self.layout.rank, module.in_features))
            layer.lora_b = self._view(span.middle, span.stop, (module.out_features, self.layout.rank))

    def _view(self, start: int, stop: int, shape: tuple[int, int]) -> nn.Parameter:
        view = nn.Parameter(self.parameter.data[start:stop].view(shape))
        view.grad = self.parameter.grad[start:stop].view(shape)
        return view

    @property
    def grad(self) -> torch.Tensor:
        """The flat gradient, float32 (size,)."""
        return self.parameter.grad

    def zero_grad(self) -> None:
        """Zero the gradient in place; setting it to None would cut the layers' views loose."""
        self.parameter.grad.zero_()

    def read(self) -> FloatVector:
        """A copy of all factors, float32 (size,), in the order of `layout`."""
        self._check_views()
        flat: FloatVector = self.parameter.detach().cpu().numpy().copy()
        return flat

    def write(self, flat: FloatVector) -> None:
        """Replace all factors by `flat`, float32 (size,); raises ShapeError when it does not fit."""
        if flat.dtype != np.float32 or flat.shape != (self.layout.size,):
            raise ShapeError(f"expected {self.layout.size} float32 numbers, got {flat.dtype} of shape {flat.shape}")
        self._check_views()
        with torch.no_grad():
            self.parameter.copy_(torch.tensor(flat))

    def adapter(self) -> Adapter:
        """The current factors, copied."""
        return Adapter(self.layout, self.alpha, self.read())

    def load(self, adapter: Adapter) -> None:
        """Load an adapter for the same modules, of any rank and alpha; another rank makes a new `parameter`."""
        if adapter.layout.modules != self.layout.modules:
            mine, theirs = set(self.layout.modules), set(adapter.layout.modules)
            raise ShapeError(
                "the adapter's modules differ from the model's: missing or of other shape "
                f"{sorted(mine - theirs)[:3]}, not expected {sorted(theirs - mine)[:3]}"
            )
        if adapter.rank != self.layout.rank:
            self._allocate(adapter)
            return
        self.write(adapter.flat)
        self.alpha = adapter.alpha
        for layer in self._layers.values():
            layer.scale = adapter.scale

    @contextmanager
    def inactive(self) -> Iterator[None]:
        """The model computes what its base does while the context is open."""
        for layer in self._layers.values():
            layer.active = False
        try:
            yield
        finally:
            for layer in self._layers.values():
                layer.active = True

    def detach(self) -> None:
        """Give the model its own linear layers back; the adapter can no longer train but can still be read."""
        for name, layer in self._layers.items():
            replace_module(self._model, name, layer.base_layer)

    def _check_views(self) -> None:
        start = self.parameter.data_ptr()
        for name, span in self.layout.spans.items():
            layer = self._layers[name]
            if (
                layer.lora_a.data_ptr() != start + 4 * span.start
                or layer.lora_b.data_ptr() != start + 4 * span.middle
                or layer.lora_a.grad is None
                or layer.lora_b.grad is None
            ):
                raise RuntimeError(
                    f"the factors of {name} no longer share the adapter's memory; move the model before attaching, "
                    "and zero gradients with AttachedAdapter.zero_grad"
                )


def attach(
    model: nn.Module, target_modules: Sequence[str] | str, rank: int, alpha: float, dropout: float = 0.0, seed: int = 0
) -> AttachedAdapter:
    """Put LoRA on every linear layer named by `target_modules` and freeze the rest.

    A target is the end of a module name, as in PEFT (`q_proj`, `self_attn.q_proj`); `all-linear` is every linear
    layer but the output head. A starts random from `seed`, B at zero. Raises TargetError for unknown targets.
    """
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")
    targets = find_targets(model, target_modules)
    layout = Layout(tuple(ModuleShape(name, layer.in_features, layer.out_features) for name, layer in targets), rank)
    start = initial_adapter(layout, alpha, seed)
    model.requires_grad_(False)
    layers = {name: LoraLinear(layer, dropout).train(layer.training) for name, layer in targets}
    for name, layer in layers.items():
        replace_module(model, name, layer)
    return AttachedAdapter(model, layers, start)


def find_targets(model: nn.Module, target_modules: Sequence[str] | str) -> list[tuple[str, nn.Linear]]:
    """The linear layers that `target_modules` names, in the model's order; raises TargetError naming what exists."""
    targets = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    modules = dict(model.named_modules())
    if any(isinstance(module, LoraLinear) for module in modules.values()):
        raise TargetError("the model carries an adapter already; detach it first")
    linear = {name: module for name, module in modules.items() if isinstance(module, nn.Linear)}
    chosen: set[str] = set()
    for target in targets:
        if target == ALL_LINEAR:
            head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
            matched = {name for name, module in linear.items() if module is not head}
        else:
            matched = {name for name in linear if name == target or name.endswith(f".{target}")}
        if not matched:
            ends = sorted({name.rpartition(".")[2] for name in linear})
            raise TargetError(f"no linear layer is named {target!r}; the model has {', '.join(ends)}, or {ALL_LINEAR}")
        chosen |= matched
    if not chosen:
        raise TargetError(f"target_modules is empty; name at least one linear layer or {ALL_LINEAR}")
    return [(name, module) for name, module in linear.items() if name in chosen]


def replace_module(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put `layer` in the place of the module of that dotted name."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, layer)
