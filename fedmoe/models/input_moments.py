"""Second moments of the inputs of a base model's linear layers, gathered in one pass over batches.

An input counts as much as the loss cares for what the layers make of it: its weight is the squared gradient of the
summed loss with respect to the outputs of all layers that it goes into. That is the input half of the Fisher
information as K-FAC factors it (Martens and Grosse 2015). Unweighted, words that the base model is sure of and the
first position, whose activations are huge, drown what matters.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Self

import numpy as np
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from fedmoe.datasets.tokens.packing import Batch
from fedmoe.lora.adapter import FloatMatrix, FloatVector
from fedmoe.lora.moments import InputMoments, ModuleMoments, omega
from fedmoe.models.base import LoadedBase
from fedmoe.models.lora_layers import TargetError, find_targets
from fedmoe.models.packed import check_model, count_targets, token_losses
from fedmoe.runtime.device import autocast

# Gradients of single tokens are small for float16.
_LOSS_SCALE = 256.0


class MomentsCollector:
    """Gathers the `InputMoments` of every module that `targets` names while the base model runs.

    Use it as a context: inside, each `add` runs the base model once over a batch, forward and back; outside, the model
    has no hooks. The base must be bare (no adapter attached), so that every site and every later merge sees the same
    inputs. Sums are float32 on the base's device: features x (sketch_size + 1) numbers a module. Modules with fewer
    features than `sketch_size` keep all of G. Raises TargetError for targets that the model does not have, and for the
    output head.
    """

    def __init__(self, base: LoadedBase, targets: Sequence[str] | str, sketch_size: int = 64, seed: int = 0) -> None:
        if sketch_size < 1:
            raise ValueError(f"sketch_size must be at least 1, got {sketch_size}")
        self._base = base
        self._seed = seed
        self._layers = dict(find_targets(base.model, targets))
        head = base.model.get_output_embeddings()
        if any(layer is head for layer in self._layers.values()):
            raise TargetError("moments of the output head are not gathered; leave it out of the targets")
        check_model(base.model)
        self._sums = {name: _Sums(name, layer, sketch_size, seed) for name, layer in self._layers.items()}
        self._hooks: list[RemovableHandle] = []
        self._inputs: dict[str, torch.Tensor] = {}
        self._weights: dict[str, torch.Tensor] = {}
        self._adding = False
        self._tokens = 0

    def __enter__(self) -> Self:
        # The base is frozen: gradients flow because its first activations ask for them.
        embeddings = self._base.model.get_input_embeddings()
        self._hooks.append(embeddings.register_forward_hook(lambda _, __, output: output.detach().requires_grad_()))
        for name, layer in self._layers.items():
            self._hooks.append(layer.register_forward_hook(partial(self._see, name)))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def add(self, batch: Batch) -> None:
        """Run the base model over one packed batch and count every token that is no padding.

        A batch without a labelled token has no gradient and is left out.
        """
        if not self._hooks:
            raise RuntimeError("the collector gathers inside its context only; use 'with MomentsCollector(...)'")
        if count_targets(batch) == 0:
            return
        self._adding = True
        try:
            with torch.enable_grad(), autocast(self._base.device, self._base.dtype):
                losses, _ = token_losses(self._base.model, batch, self._base.device)
            # Summed, so that a token's gradient does not depend on its batch.
            (losses.sum() * _LOSS_SCALE).backward()
            self._gather(torch.from_numpy(batch.segment_ids >= 0).to(self._base.device))
        finally:
            self._adding = False
            self._inputs.clear()
            self._weights.clear()
        self._tokens += int(np.count_nonzero(batch.segment_ids >= 0))

    def moments(self) -> InputMoments:
        """The moments of all tokens so far; raises ValueError when there are none."""
        if not self._tokens:
            raise ValueError("no labelled token was added; moments need at least one batch with text to learn from")
        modules = {name: ModuleMoments(*sums.means(self._tokens)) for name, sums in self._sums.items()}
        return InputMoments(modules, self._tokens, self._seed)

    def _see(self, name: str, layer: nn.Module, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if not self._adding:
            raise RuntimeError("the model ran inside the collector's context without 'add'; its tokens have no mask")
        self._inputs[name] = arguments[0].detach()
        output.register_hook(partial(self._weigh, name))

    def _weigh(self, name: str, gradient: torch.Tensor) -> None:
        self._weights[name] = (gradient.float() / _LOSS_SCALE).square().sum(dim=-1)

    def _gather(self, real: torch.Tensor) -> None:
        """Layers with one input share its weight, so that they still have one G and their sketches add up."""
        shared: dict[tuple[int, torch.Size], list[str]] = {}
        for name, inputs in self._inputs.items():
            shared.setdefault((inputs.data_ptr(), inputs.shape), []).append(name)
        for names in shared.values():
            weights = torch.zeros(real.shape, device=real.device)
            for name in names:
                # A layer whose output the loss does not depend on gets no gradient, and gives its input no weight.
                if name in self._weights:
                    weights = weights + self._weights[name]
            for name in names:
                self._sums[name].add(self._inputs[name][real], weights[real])


class _Sums:
    """Running sums of one module: of w x^2, (n,), and of w x (x' Omega), (n, q), both float32."""

    def __init__(self, name: str, layer: nn.Linear, columns: int, seed: int) -> None:
        features, device = layer.in_features, layer.weight.device
        test = omega(seed, name, features, min(columns, features))
        self._omega = torch.from_numpy(test).to(device)
        self._diagonal = torch.zeros(features, device=device)
        self._sketch = torch.zeros(test.shape, device=device)

    def add(self, x: torch.Tensor, weights: torch.Tensor) -> None:
        """x (tokens, n) in the model's dtype, weights (tokens,) float32."""
        wide = x.float() * weights.sqrt()[:, None]
        self._diagonal += wide.square().sum(dim=0)
        self._sketch.addmm_(wide.t(), wide @ self._omega)

    def means(self, tokens: int) -> tuple[FloatVector, FloatMatrix]:
        return (self._diagonal / tokens).cpu().numpy(), (self._sketch / tokens).cpu().numpy()
