"""Samples from many adapters in one batch, with a key-value cache; shared beginnings of prompts are computed once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from fedmoe.models.final_logits import UnsupportedModelError, logits_of
from fedmoe.models.multilora import MultiLora
from fedmoe.models.prefix_tree import Forest, batch_forests, grow_forests
from fedmoe.models.sample_batches import cut_batches, in_order

#: Nodes of a forest of prompts, which is a row of the batch that reads them.
_FOREST_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class SampleSpec:
    """One continuation to sample; `adapter` None is the base model. `temperature` 0 takes the likeliest token."""

    adapter: str | None
    prompt: tuple[int, ...]
    max_new_tokens: int
    temperature: float
    seed: int

    def __post_init__(self) -> None:
        if not self.prompt or self.max_new_tokens < 1:
            raise ValueError(
                f"a prompt of one token and one new token is the least, got {len(self.prompt)}, {self.max_new_tokens}"
            )
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be a number from 0 on, got {self.temperature}")


@dataclass(frozen=True, slots=True)
class SampleResult:
    """Tokens (a stop token included) and their log-probabilities at the temperature (1 where it is 0), float32 (T,)."""

    tokens: tuple[int, ...]
    logprobs: NDArray[np.float32]
    stopped: bool


@dataclass(frozen=True, slots=True)
class SamplingLimits:
    """How much is computed at once: rows decoded together, and tokens of prompts read together."""

    rows: int = 64
    prompt_tokens: int = 4096


class _FixedLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values in memory set aside beforehand: a token is written in place instead of copying all before it."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, length: int) -> None:
        super().__init__()
        self._keys, self._values, self._length = keys, values, length
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self._show()

    def _show(self) -> None:
        self.keys, self.values = self._keys[:, :, : self._length], self._values[:, :, : self._length]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        stop = self._length + key_states.shape[-2]
        self._keys[:, :, self._length : stop] = key_states
        self._values[:, :, self._length : stop] = value_states
        self._length = stop
        self._show()
        return self.keys, self.values

    def keep(self, rows: torch.Tensor) -> None:
        self._keys, self._values = self._keys[rows], self._values[rows]
        self._show()


@dataclass(frozen=True)
class PromptCache:
    """The cache that reading the prompts filled, which entries of it are real, and the first logits."""

    cache: Cache
    looks: torch.Tensor
    logits: torch.Tensor


def sample(
    model: PreTrainedModel,
    multi: MultiLora,
    specs: Sequence[SampleSpec],
    stop_tokens: frozenset[int],
    limits: SamplingLimits = SamplingLimits(),
) -> list[SampleResult]:
    """Sample every continuation; the same seed, prompt and weights give the same tokens.

    (Up to rounding: the other rows of a batch can change the last bits of a row's logits.) Rows of equal adapter and
    similar length are computed together. Raises FloatingPointError when a model's logits are not finite.
    """
    if model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise UnsupportedModelError("a model that trains with gradient checkpointing has no key-value cache; eval() it")
    batches = cut_batches([(spec.adapter or "", len(spec.prompt)) for spec in specs], limits.rows)
    parts = [_sample_part(model, multi, [specs[index] for index in batch], stop_tokens, limits) for batch in batches]
    return in_order(batches, parts)


@torch.no_grad()  # type: ignore[untyped-decorator]
def _sample_part(
    model: PreTrainedModel,
    multi: MultiLora,
    specs: Sequence[SampleSpec],
    stop_tokens: frozenset[int],
    limits: SamplingLimits,
) -> list[SampleResult]:
    room = max(spec.max_new_tokens for spec in specs)
    prompts = read_prompts(model, multi, specs, room, limits)
    decoded = [_DecodedRow(spec, stop_tokens) for spec in specs]
    with multi.decoding_rows([spec.adapter for spec in specs]) as rows:
        active = list(range(len(specs)))
        logits, looks = prompts.logits, prompts.looks
        positions = torch.tensor([len(spec.prompt) for spec in specs], device=multi.device)
        while True:
            tokens = _draw(logits, [decoded[row] for row in active])
            running = [place for place, row in enumerate(active) if not decoded[row].ended]
            if not running:
                return [row.sampled() for row in decoded]
            if len(running) < len(active):
                staying = torch.tensor(running, device=multi.device)
                rows.keep(staying)
                for layer in prompts.cache.layers:
                    layer.keep(staying)
                looks, positions, tokens = looks[staying], positions[staying], tokens[staying]
                active = [active[place] for place in running]
            looks = torch.cat([looks, looks.new_ones(len(active), 1)], dim=1)
            hidden = model.get_decoder()(
                input_ids=tokens[:, None],
                attention_mask=looks[:, None, None, :],
                position_ids=positions[:, None],
                past_key_values=prompts.cache,
                use_cache=True,
            ).last_hidden_state
            logits = logits_of(model, hidden[:, 0])
            positions = positions + 1


class _DecodedRow:
    """The tokens drawn for one row so far."""

    def __init__(self, spec: SampleSpec, stop_tokens: frozenset[int]) -> None:
        self.adapter = spec.adapter
        self.temperature = spec.temperature
        # All draws of a row come from its own seed, so its neighbours in the batch do not matter.
        self.draws = np.random.default_rng(spec.seed).random(spec.max_new_tokens)
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self._stop_tokens = stop_tokens

    @property
    def draw(self) -> float:
        return float(self.draws[len(self.tokens)])

    @property
    def stopped(self) -> bool:
        return bool(self.tokens) and self.tokens[-1] in self._stop_tokens

    @property
    def ended(self) -> bool:
        return self.stopped or len(self.tokens) == len(self.draws)

    def write(self, token: int, logprob: float) -> None:
        if not math.isfinite(logprob):
            raise FloatingPointError(f"the model's numbers for adapter {self.adapter} are not finite; nothing to draw")
        self.tokens.append(token)
        self.logprobs.append(logprob)

    def sampled(self) -> SampleResult:
        return SampleResult(tuple(self.tokens), np.array(self.logprobs, np.float32), self.stopped)


def _draw(logits: torch.Tensor, decoded: Sequence[_DecodedRow]) -> torch.Tensor:
    """One token a row by inverting its cumulative distribution; writes it into its row; returns int64 (rows,).

    `logits` float32 (rows, vocabulary) are overwritten: at this size new memory costs more than the arithmetic.
    """
    temperatures = torch.tensor([row.temperature for row in decoded], device=logits.device)
    highest, likeliest = logits.max(dim=-1, keepdim=True)
    logits.sub_(highest).div_(torch.where(temperatures > 0, temperatures, 1.0)[:, None])
    cumulative = logits.exp().cumsum_(dim=-1)
    total = cumulative[:, -1:]
    draws = torch.tensor([[row.draw] for row in decoded], device=logits.device, dtype=cumulative.dtype)
    # In float32 a draw can become 1, which is beyond the last token; one below it times the total never rounds up.
    draws = draws.clamp_(max=1 - 2**-24) * total
    # The clamp is for rows that are not numbers, which are refused below.
    drawn = torch.searchsorted(cumulative, draws, right=True).clamp_(max=logits.shape[-1] - 1)
    tokens = torch.where(temperatures[:, None] > 0, drawn, likeliest)
    chosen = (logits.gather(1, tokens) - total.log())[:, 0]
    tokens = tokens[:, 0]
    for row, token, logprob in zip(decoded, tokens.tolist(), chosen.tolist(), strict=True):
        row.write(token, logprob)
    return tokens


def read_prompts(
    model: PreTrainedModel, multi: MultiLora, specs: Sequence[SampleSpec], room: int, limits: SamplingLimits
) -> PromptCache:
    """Compute every distinct beginning once, then lay out the cache of every row."""
    # Forests of the distinct prompts of each adapter, and for every row its forest and path.
    forests: list[Forest] = []
    adapters: list[str | None] = []
    rows_of: dict[int, tuple[int, NDArray[np.int64]]] = {}
    for adapter in dict.fromkeys(spec.adapter for spec in specs):
        members = [row for row, spec in enumerate(specs) if spec.adapter == adapter]
        for forest in grow_forests([specs[row].prompt for row in members], _FOREST_TOKENS):
            for member, path in zip(forest.members, forest.paths, strict=True):
                rows_of[members[member]] = (len(forests), path)
            forests.append(forest)
            adapters.append(adapter)
    keys, values, hidden, starts = _read_forests(model, multi, forests, adapters, limits)
    longest = max(len(spec.prompt) for spec in specs)
    nodes = torch.zeros(len(specs), longest, dtype=torch.int64)
    looks = torch.zeros(len(specs), longest, dtype=torch.bool)
    last = torch.zeros(len(specs), dtype=torch.int64)
    for row, (place, path) in rows_of.items():
        flat = torch.from_numpy(path) + starts[place]
        nodes[row, : len(path)], looks[row, : len(path)], last[row] = flat, True, flat[-1]
    nodes, looks, last = nodes.to(multi.device), looks.to(multi.device), last.to(multi.device)
    layers = [_layer(key, value, nodes, room) for key, value in zip(keys, values, strict=True)]
    return PromptCache(Cache(layers=layers), looks, logits_of(model, hidden[last]))


def _layer(keys: torch.Tensor, values: torch.Tensor, nodes: torch.Tensor, room: int) -> _FixedLayer:
    """keys, values (all nodes, heads, width) -> a cache layer (rows, heads, longest + room, width)."""
    rows, longest = nodes.shape
    filled = []
    for source in (keys, values):
        buffer = source.new_empty(rows, source.shape[1], longest + room, source.shape[2])
        buffer[:, :, :longest] = source[nodes].transpose(1, 2)
        filled.append(buffer)
    return _FixedLayer(filled[0], filled[1], longest)


def _read_forests(
    model: PreTrainedModel,
    multi: MultiLora,
    forests: Sequence[Forest],
    adapters: Sequence[str | None],
    limits: SamplingLimits,
) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor, list[int]]:
    """Per layer the keys and values of all nodes (nodes, heads, width), the hidden states (nodes, width), and where
    each forest's nodes start."""
    keys: list[list[torch.Tensor]] = []
    values: list[list[torch.Tensor]] = []
    hiddens: list[torch.Tensor] = []
    starts: list[int] = []
    done = 0
    for part in _parts(forests, limits.prompt_tokens):
        ids, positions, mask = batch_forests([forests[index] for index in part], multi.device)
        cache = DynamicCache(config=model.config)
        with multi.rows([adapters[index] for index in part]):
            output = model.get_decoder()(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
            )
        keys.append([layer.keys.transpose(1, 2).flatten(0, 1) for layer in cache.layers])
        values.append([layer.values.transpose(1, 2).flatten(0, 1) for layer in cache.layers])
        hiddens.append(output.last_hidden_state.flatten(0, 1))
        width = ids.shape[1]
        starts += [done + place * width for place in range(len(part))]
        done += len(part) * width
    joined_keys, joined_values = ([torch.cat(layer) for layer in zip(*kind, strict=True)] for kind in (keys, values))
    return joined_keys, joined_values, torch.cat(hiddens), starts


def _parts(forests: Sequence[Forest], max_tokens: int) -> list[range]:
    """Neighbouring forests that are read together, at most `max_tokens` padded tokens (or a single longer one)."""
    parts: list[range] = []
    start = 0
    for stop in range(1, len(forests) + 1):
        longest = max(len(forest) for forest in forests[start : stop + 1])
        if stop == len(forests) or longest * (stop + 1 - start) > max_tokens:
            parts.append(range(start, stop))
            start = stop
    return parts
