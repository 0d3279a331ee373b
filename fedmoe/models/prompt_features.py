"""Prompt features: mean hidden states of the base model, by which a gateway routes."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from fedmoe.lora.adapter import FloatMatrix
from fedmoe.models.base import LoadedBase

TokenIds = Sequence[int] | NDArray[np.int64]

# Positions of one batch, padding included: enough to keep a processor busy, little beside the model itself.
_BATCH_POSITIONS = 4096


def routing_depths(base: LoadedBase) -> tuple[int, ...]:
    """The numbers of layers after which hidden states are taken: four even steps up to a quarter of the layers.

    Early layers still have the words, later ones what they are about; together they route better than any one of them,
    and a quarter of the layers better than all (SmolLM2). Fewer steps where a quarter has fewer than four layers.
    """
    quarter = max(1, round(len(_layers(base)) / 4))
    return tuple(sorted({-(-quarter * step // 4) for step in (1, 2, 3, 4)}))


def features_width(base: LoadedBase) -> int:
    """The length of one prompt's features at `routing_depths`."""
    return len(routing_depths(base)) * int(base.model.config.get_text_config().hidden_size)


def prompt_features(
    base: LoadedBase, token_id_lists: Sequence[TokenIds], depths: Sequence[int] | None = None
) -> FloatMatrix:
    """The mean hidden states of each prompt, float32 (rows, depths x hidden), in the order given.

    States are those after each of `depths` layers (None: `routing_depths`), every position scaled to mean square 1; the
    layers above are not run. Position 0 is left out: its activations are huge and the same for every text; a prompt of
    one token has nothing else and uses it. The result does not depend on which prompts share a batch, up to rounding.
    No state of the model is touched, so other threads may use it meanwhile. Raises ValueError for an empty prompt.
    """
    return prefix_features(base, token_id_lists, [(len(ids),) for ids in token_id_lists], depths)


def prefix_features(
    base: LoadedBase,
    token_id_lists: Sequence[TokenIds],
    lengths: Sequence[Sequence[int]],
    depths: Sequence[int] | None = None,
) -> FloatMatrix:
    """`prompt_features` of beginnings: the first n tokens of prompt i for every n in `lengths[i]`, in that order.

    A causal model's states of a beginning are those of the whole, so all beginnings of a text cost one pass. float32
    (sum of the numbers of lengths, depths x hidden); raises ValueError for a length outside 1 to the prompt's own.
    """
    if len(lengths) != len(token_id_lists):
        raise ValueError(f"{len(token_id_lists)} prompts need as many lists of lengths, got {len(lengths)}")
    for place, (ids, prefixes) in enumerate(zip(token_id_lists, lengths, strict=True)):
        if not all(1 <= length <= len(ids) for length in prefixes):
            raise ValueError(f"prompt {place} has {len(ids)} tokens; lengths must be 1 to that, got {list(prefixes)}")
    looked = routing_depths(base) if depths is None else depths
    starts = np.cumsum([0, *map(len, lengths)])
    hidden = int(base.model.config.get_text_config().hidden_size)
    rows = np.empty((int(starts[-1]), len(looked) * hidden), np.float32)
    for places in _batches([max(prefixes, default=0) for prefixes in lengths]):
        ids_of_batch = [token_id_lists[place][: max(lengths[place])] for place in places]
        for place, states in zip(places, _hidden_states(base, ids_of_batch, looked), strict=True):
            # Over positions 1 to n - 1, in float32; position 0 where there is no other.
            sums = torch.cumsum(states[1:], dim=0)
            means = [sums[length - 2] / (length - 1) if length > 1 else states[0] for length in lengths[place]]
            rows[starts[place] : starts[place + 1]] = torch.stack(means).cpu().numpy()
    return rows


def _layers(base: LoadedBase) -> nn.ModuleList:
    layers = getattr(base.model.base_model, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(f"{type(base.model).__name__} keeps its layers elsewhere than in a list `layers`; no routing")
    return layers


def _trunk(base: LoadedBase, depths: Sequence[int], heard: dict[int, torch.Tensor]) -> nn.Module:
    """The model, weights shared, without layers above the last depth and the output head (a fifth of a small one's).

    It fills `heard`, depth -> states. Its layers are copies, so that the model's own are hooked by nobody.
    """
    layers = _layers(base)
    if not depths or not all(1 <= depth <= len(layers) for depth in depths):
        raise ValueError(f"depths must be 1 to {len(layers)}, at least one, got {list(depths)}")
    trunk = copy.copy(base.model.base_model)
    trunk.__dict__["_modules"] = dict(trunk._modules)
    trunk.layers = nn.ModuleList(
        _heard(layer, place + 1, heard) if place + 1 in depths else layer
        for place, layer in enumerate(layers[: max(depths)])
    )
    return trunk


def _heard(layer: nn.Module, depth: int, heard: dict[int, torch.Tensor]) -> nn.Module:
    def hear(_: nn.Module, __: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        heard[depth] = output[0] if isinstance(output, tuple) else output

    copied = copy.copy(layer)
    copied.__dict__["_forward_hooks"] = OrderedDict(layer._forward_hooks)
    copied.register_forward_hook(hear)
    return copied


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
def _hidden_states(base: LoadedBase, ids: Sequence[TokenIds], depths: Sequence[int]) -> list[torch.Tensor]:
    """The states of each prompt, float32 (its tokens, depths x hidden), mean square 1 at every depth, from one pass."""
    heard: dict[int, torch.Tensor] = {}
    rows = [torch.tensor(np.asarray(row, np.int64), device=base.device) for row in ids]
    # Padded on the right, where nothing before looks.
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    _trunk(base, depths, heard)(input_ids=pad_sequence(rows, batch_first=True), attention_mask=mask, use_cache=False)
    states = [functional.rms_norm(heard[depth].float(), heard[depth].shape[-1:]) for depth in depths]
    return [state[: len(row)] for state, row in zip(torch.cat(states, dim=-1), ids, strict=True)]
