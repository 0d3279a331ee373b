"""Second moments of the inputs of a base model's linear layers, gathered in one pass over batches."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import TracebackType
from typing import Self

import numpy as np
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from fedmoe.datasets.packing import Batch
from fedmoe.lora.adapter import FloatMatrix, FloatVector
from fedmoe.lora.moments import InputMoments, ModuleMoments, omega
from fedmoe.models.base import LoadedBase
from fedmoe.models.lora_layers import TargetError, find_targets
from fedmoe.models.packed import attention_mask


class MomentsCollector:
    """Gathers, for every module that `targets` names, what `InputMoments` holds, while the base model runs.

    Use it as a context: inside, each `add` runs the base model once over a batch; outside, the model has no hooks. The
    base must be bare (no adapter attached), so that every site and every later merge sees the same inputs. Sums are
    float32 on the base's device: features x (sketch_size + 1) numbers a module. Modules with fewer features than
    `sketch_size` keep all of G. Raises TargetError for targets that the model does not have, and for the output head.
    """

    def __init__(self, base: LoadedBase, targets: Sequence[str] | str, sketch_size: int = 32, seed: int = 0) -> None:
        if sketch_size < 1:
            raise ValueError(f"sketch_size must be at least 1, got {sketch_size}")
        self._base = base
        self._seed = seed
        self._layers = dict(find_targets(base.model, targets))
        head = base.model.get_output_embeddings()
        if any(layer is head for layer in self._layers.values()):
            raise TargetError("moments of the output head are not gathered; leave it out of the targets")
        self._sums = {name: _Sums(name, layer, sketch_size, seed) for name, layer in self._layers.items()}
        self._hooks: list[RemovableHandle] = []
        self._real: torch.Tensor | None = None
        self._tokens = 0

    def __enter__(self) -> Self:
        for name, layer in self._layers.items():
            self._hooks.append(layer.register_forward_pre_hook(partial(self._see, name)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def add(self, batch: Batch) -> None:
        """Run the base model over one packed batch and count every token that is no padding."""
        if not self._hooks:
            raise RuntimeError("the collector gathers inside its context only; use 'with MomentsCollector(...)'")
        inputs, positions, segments = (
            torch.from_numpy(array).to(self._base.device)
            for array in (batch.input_ids, batch.position_ids, batch.segment_ids)
        )
        self._real = segments >= 0
        try:
            with torch.inference_mode():
                # Without the output head: nothing here needs its logits.
                self._base.model.base_model(
                    input_ids=inputs,
                    attention_mask=attention_mask(segments),
                    position_ids=positions,
                    use_cache=False,
                )
        finally:
            self._real = None
        self._tokens += int(np.count_nonzero(batch.segment_ids >= 0))

    def moments(self) -> InputMoments:
        """The moments of all tokens so far; raises ValueError when there are none."""
        if not self._tokens:
            raise ValueError("no token was added; moments need at least one batch with text")
        modules = {name: ModuleMoments(*sums.means(self._tokens)) for name, sums in self._sums.items()}
        return InputMoments(modules, self._tokens, self._seed)

    def _see(self, name: str, layer: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        if self._real is None:
            raise RuntimeError("the model ran inside the collector's context without 'add'; its tokens have no mask")
        self._sums[name].add(arguments[0][self._real])


class _Sums:
    """Running sums of one module: of x^2, (n,), and of x (x' Omega), (n, q), both float32."""

    def __init__(self, name: str, layer: nn.Linear, columns: int, seed: int) -> None:
        features, device = layer.in_features, layer.weight.device
        test = omega(seed, name, features, min(columns, features))
        self._omega = torch.from_numpy(test).to(device)
        self._diagonal = torch.zeros(features, device=device)
        self._sketch = torch.zeros(test.shape, device=device)

    def add(self, x: torch.Tensor) -> None:
        """x (tokens, n) in the model's dtype."""
        wide = x.float()
        self._diagonal += wide.square().sum(dim=0)
        self._sketch.addmm_(wide.t(), wide @ self._omega)

    def means(self, tokens: int) -> tuple[FloatVector, FloatMatrix]:
        return (self._diagonal / tokens).cpu().numpy(), (self._sketch / tokens).cpu().numpy()
