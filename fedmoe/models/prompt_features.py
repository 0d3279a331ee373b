"""What a prompt looks like to the base model, as one vector: what a gateway routes by."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from fedmoe.lora.adapter import FloatMatrix
from fedmoe.models.base import LoadedBase

TokenIds = Sequence[int] | NDArray[np.int64]

#: Run every layer.
ALL_LAYERS = -1
# Positions of one batch, padding included: enough to keep a processor busy, little beside the model itself.
_BATCH_POSITIONS = 4096


def routing_layer(base: LoadedBase) -> int:
    """How many layers tell prompts apart best for their price: a quarter, which routes better than all (SmolLM2)."""
    layers = base.model.base_model
    return max(1, round(len(layers.layers) / 4)) if isinstance(getattr(layers, "layers", None), nn.ModuleList) else -1


def prompt_features(base: LoadedBase, token_id_lists: Sequence[TokenIds], layer: int | None = None) -> FloatMatrix:
    """The mean hidden state of each prompt, float32 (rows, hidden), in the order given.

    States are those after `layer` layers and the model's last norm; the layers above are not run. None takes
    `routing_layer`, -1 all. Position 0 is left out: its activations are huge and the same for every text; a prompt of
    one token has nothing else and uses it. The result does not depend on which prompts share a batch, up to rounding.
    No state of the model is touched, so other threads may use it meanwhile. Raises ValueError for an empty prompt.
    """
    return prefix_features(base, token_id_lists, [(len(ids),) for ids in token_id_lists], layer)


def prefix_features(
    base: LoadedBase, token_id_lists: Sequence[TokenIds], lengths: Sequence[Sequence[int]], layer: int | None = None
) -> FloatMatrix:
    """`prompt_features` of beginnings: the first n tokens of prompt i for every n in `lengths[i]`, in that order.

    A causal model's states of a beginning are those of the whole, so all beginnings of a text cost one pass. float32
    (sum of the numbers of lengths, hidden); raises ValueError for a length outside 1 to the prompt's own.
    """
    if len(lengths) != len(token_id_lists):
        raise ValueError(f"{len(token_id_lists)} prompts need as many lists of lengths, got {len(lengths)}")
    for place, (ids, wanted) in enumerate(zip(token_id_lists, lengths, strict=True)):
        if not all(1 <= length <= len(ids) for length in wanted):
            raise ValueError(f"prompt {place} has {len(ids)} tokens; lengths must be 1 to that, got {list(wanted)}")
    trunk = _trunk(base, routing_layer(base) if layer is None else layer)
    starts = np.cumsum([0, *map(len, lengths)])
    rows = np.empty((int(starts[-1]), base.model.config.get_text_config().hidden_size), np.float32)
    for places in _batches([max(wanted, default=0) for wanted in lengths]):
        ids_of_batch = [token_id_lists[place][: max(lengths[place])] for place in places]
        for place, states in zip(places, _hidden_states(trunk, ids_of_batch, base.device), strict=True):
            rows[starts[place] : starts[place + 1]] = _means(states, lengths[place])
    return rows


def _trunk(base: LoadedBase, layer: int) -> nn.Module:
    """The model, weights shared, without layers above `layer` and the output head (a fifth of a small one's work)."""
    body = base.model.base_model
    if layer == ALL_LAYERS:
        return body
    count = len(body.layers) if isinstance(getattr(body, "layers", None), nn.ModuleList) else 0
    if not 1 <= layer <= count:
        raise ValueError(f"layer must be 1 to {count}, or {ALL_LAYERS} for all of them, got {layer}")
    trunk = copy.copy(body)
    trunk.__dict__["_modules"] = dict(body._modules)
    trunk.layers = body.layers[:layer]
    return trunk


def _batches(sizes: Sequence[int]) -> Iterator[list[int]]:
    """Places in batches of similar size, so that little is padding; places of size 0 need no pass and are left out."""
    batch: list[int] = []
    for place in sorted((place for place, size in enumerate(sizes) if size), key=lambda place: sizes[place]):
        if batch and (len(batch) + 1) * sizes[place] > _BATCH_POSITIONS:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


@torch.inference_mode()  # type: ignore[untyped-decorator]
def _hidden_states(trunk: nn.Module, token_id_lists: Sequence[TokenIds], device: torch.device) -> list[torch.Tensor]:
    """The states of each prompt, (its tokens, hidden), from one pass padded on the right."""
    rows = [torch.tensor(np.asarray(ids, np.int64), device=device) for ids in token_id_lists]
    inputs = pad_sequence(rows, batch_first=True)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    states = trunk(input_ids=inputs, attention_mask=mask, use_cache=False).last_hidden_state
    return [state[: len(row)] for state, row in zip(states, rows, strict=True)]


def _means(states: torch.Tensor, lengths: Sequence[int]) -> FloatMatrix:
    """Means over positions 1 to n - 1 for every n, in float32; position 0 where there is no other."""
    wide = states.float()
    sums = torch.cumsum(wide[1:], dim=0)
    means = [sums[length - 2] / (length - 1) if length > 1 else wide[0] for length in lengths]
    found: FloatMatrix = torch.stack(means).cpu().numpy()
    return found


def row_energies(
    base: LoadedBase, token_id_lists: Sequence[TokenIds], projections: Mapping[str, FloatMatrix]
) -> FloatMatrix:
    """How loud each row p of `projections[module]` (R, n) answers a prompt, float32 (prompts, R).

    The mean over modules and positions (without position 0, as in `prompt_features`) of n (p'x)^2 / ||x||^2 for the
    module's inputs x (n,) on the bare base model; 1 for a unit row and inputs without any direction of their own.
    Raises ValueError for an empty prompt.
    """
    found = np.empty((len(token_id_lists), len(next(iter(projections.values())))), np.float32)
    if not all(len(ids) for ids in token_id_lists):
        raise ValueError("a prompt needs at least one token; one of these is empty")
    for places in _batches([len(ids) for ids in token_id_lists]):
        found[places] = _batch_energies(base, [token_id_lists[place] for place in places], projections)
    return found


def _batch_energies(base: LoadedBase, ids: Sequence[TokenIds], projections: Mapping[str, FloatMatrix]) -> FloatMatrix:
    lengths = torch.tensor([len(row) for row in ids], device=base.device)[:, None]
    positions = torch.arange(max(map(len, ids)), device=base.device)[None, :]
    counted = (positions < lengths) & ((positions > 0) | (lengths == 1))
    sums: list[torch.Tensor] = []
    mine = threading.get_ident()

    def hear(module: nn.Module, arguments: tuple[torch.Tensor, ...], rows: torch.Tensor) -> None:
        if threading.get_ident() != mine:  # another thread uses the model too
            return
        x = arguments[0].float()
        loud = (x @ rows.t()).square() * (x.shape[-1] / x.square().sum(dim=-1, keepdim=True).clamp_min(1e-30))
        sums.append((loud * counted[..., None]).sum(dim=1))

    with ExitStack() as hooks:
        for name, rows in projections.items():
            hook = partial(hear, rows=torch.from_numpy(rows).to(base.device))
            hooks.callback(base.model.get_submodule(name).register_forward_pre_hook(hook).remove)
        _hidden_states(base.model.base_model, ids, base.device)
    means: FloatMatrix = (torch.stack(sums).mean(dim=0) / counted.sum(dim=1, keepdim=True)).cpu().numpy()
    return means
