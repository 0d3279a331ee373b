"""The log-probabilities of given tokens under many adapters in one batch, with gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from transformers import PreTrainedModel

from fedmoe.lora.adapter import FloatArray
from fedmoe.models.final_logits import selected_logprobs
from fedmoe.models.multilora import MultiLora
from fedmoe.models.prefix_tree import Forest, batch_forests, grow_forests


@dataclass(frozen=True, slots=True)
class Continuation:
    """Tokens after a prompt, neither empty, under an adapter (None: the base model alone)."""

    adapter: str | None
    prompt: tuple[int, ...]
    tokens: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.prompt or not self.tokens:
            raise ValueError(f"prompt and tokens must not be empty, got {len(self.prompt)} and {len(self.tokens)}")


@dataclass(frozen=True)
class MicroBatch:
    """Rows that fit into memory together: a forest a row, rows of one adapter neighbours.

    `members[row][k]` is the continuation (its index in what was given) of the row's k-th path.
    """

    adapters: tuple[str | None, ...]
    forests: tuple[Forest, ...]

    def members(self) -> list[int]:
        """The continuations in it, in the order `token_logprobs` gives their tokens."""
        return [member for forest in self.forests for member in forest.members]


def plan_micro_batches(continuations: Sequence[Continuation], max_tokens: int, max_row: int = 256) -> list[MicroBatch]:
    """Pack continuations into micro-batches of at most `max_tokens` padded tokens, rows of at most `max_row`.

    Common beginnings of one policy's sequences are computed once. A single longer sequence is a micro-batch of its own.
    """
    longest = max((len(each.prompt) + len(each.tokens) for each in continuations), default=0)
    # A row must have room for a long prompt and several continuations of it, or the prompt would be computed for each.
    max_row = min(max(max_row, 2 * longest), max_tokens)
    rows: list[tuple[str | None, Forest]] = []
    for adapter in dict.fromkeys(each.adapter for each in continuations):
        members = [index for index, each in enumerate(continuations) if each.adapter == adapter]
        # The last token predicts nothing, so it needs no node.
        sequences = [continuations[index].prompt + continuations[index].tokens[:-1] for index in members]
        for forest in grow_forests(sequences, max_row):
            rows.append((adapter, replace(forest, members=tuple(members[member] for member in forest.members))))
    rows.sort(key=lambda row: -len(row[1]))
    batches: list[list[tuple[str | None, Forest]]] = []
    for row in rows:
        # Rows come longest first, so the first row of a batch is its padded length.
        if batches and (len(batches[-1]) + 1) * len(batches[-1][0][1]) <= max_tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    ordered = [sorted(batch, key=lambda row: (row[0] is None, row[0] or "")) for batch in batches]
    return [MicroBatch(tuple(row[0] for row in batch), tuple(row[1] for row in batch)) for batch in ordered]


@dataclass(frozen=True)
class TokenLogprobs:
    """For every token of a micro-batch's continuations, one after the other: log-probability and entropy, float32 (n,).

    `owners`: which continuation each token belongs to, int64 (n,). Entropy carries no gradient.
    """

    logprobs: torch.Tensor
    entropies: torch.Tensor
    owners: torch.Tensor


def token_logprobs(
    model: PreTrainedModel,
    multi: MultiLora,
    batch: MicroBatch,
    continuations: Sequence[Continuation],
    temperature: float = 1.0,
) -> TokenLogprobs:
    """Natural log-probabilities at `temperature` of the tokens of every continuation in `batch`, with gradients.

    Call inside `multi.rows(batch.adapters)`.
    """
    device = multi.device
    ids, positions, mask = batch_forests(batch.forests, device)
    decoder = model.get_decoder()
    hidden = decoder(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).last_hidden_state
    predictors, targets, owners = _targets(batch, continuations, ids.shape[1])
    nodes, places = np.unique(predictors, return_inverse=True)
    order = np.argsort(places, kind="stable")
    chosen = hidden.flatten(0, 1)[torch.from_numpy(nodes).to(device)]
    logprobs, entropies = selected_logprobs(model, chosen, places[order], targets[order], temperature)
    back = torch.from_numpy(np.argsort(order)).to(device)
    return TokenLogprobs(logprobs[back], entropies[back], torch.from_numpy(owners).to(device))


def _targets(
    batch: MicroBatch, continuations: Sequence[Continuation], width: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For every token: the flat place of the node that predicts it, the token itself, and its continuation."""
    predictors, targets, owners = [], [], []
    for row, forest in enumerate(batch.forests):
        for member, path in zip(forest.members, forest.paths, strict=True):
            prompt, tokens = continuations[member].prompt, continuations[member].tokens
            predictors.append(row * width + path[len(prompt) - 1 :])
            targets.append(np.array(tokens, np.int64))
            owners.append(np.full(len(tokens), member, np.int64))
    return np.concatenate(predictors), np.concatenate(targets), np.concatenate(owners)


#: Positions of one pass over texts, padding included: beside the model itself it takes little memory.
_TEXT_POSITIONS = 2048


@torch.no_grad()  # type: ignore[untyped-decorator]
def log_likelihoods(
    model: PreTrainedModel, multi: MultiLora, pairs: Sequence[tuple[Sequence[int], str | None]]
) -> list[float]:
    """ln p(text[1:] | text[0]) in nats for each text under its adapter (None: the base model alone), in that order.

    0 for a text of one token. Texts of similar length share a pass, which changes nothing but the last bits. Other
    threads may use the model meanwhile. Raises ValueError for an empty text and `UnknownAdapterError` for an adapter
    that is not there.
    """
    if not all(text for text, _ in pairs):
        raise ValueError("a text needs at least one token; one of these is empty")
    likelihoods = [0.0] * len(pairs)
    longest_first = sorted(
        (place for place, (text, _) in enumerate(pairs) if len(text) > 1), key=lambda place: -len(pairs[place][0])
    )
    while longest_first:
        count = max(1, _TEXT_POSITIONS // len(pairs[longest_first[0]][0]))
        batch, longest_first = longest_first[:count], longest_first[count:]
        # Rows of one adapter are neighbours, which costs fewer products.
        batch.sort(key=lambda place: (pairs[place][1] is None, pairs[place][1] or ""))
        for place, likelihood in zip(batch, _together(model, multi, [pairs[place] for place in batch]), strict=True):
            likelihoods[place] = likelihood
    return likelihoods


def _together(
    model: PreTrainedModel, multi: MultiLora, pairs: Sequence[tuple[Sequence[int], str | None]]
) -> list[float]:
    """Of texts of two tokens or more, in one pass."""
    lengths = [len(text) for text, _ in pairs]
    width, device = max(lengths), multi.device
    ids = torch.tensor([[*text, *[0] * (width - len(text))] for text, _ in pairs], device=device)
    # Padded on the right, where nothing before looks; without padding the faster causal attention needs no mask.
    real = torch.arange(width, device=device)[None, :] < torch.tensor(lengths, device=device)[:, None]
    mask = None if min(lengths) == width else real.long()
    with multi.rows([adapter for _, adapter in pairs]):
        hidden = model.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    targets = ids[:, 1:][real[:, 1:]].cpu().numpy()
    logprobs, _ = selected_logprobs(model, hidden[:, :-1][real[:, 1:]], np.arange(len(targets)), targets)
    parts = logprobs.double().split([length - 1 for length in lengths])
    return [float(part.sum()) for part in parts]


@torch.no_grad()  # type: ignore[untyped-decorator]
def score_tokens(
    model: PreTrainedModel, multi: MultiLora, adapter: str | None, prompt: Sequence[int], tokens: Sequence[int]
) -> FloatArray:
    """The log-probability (temperature 1) of each of `tokens` after `prompt` under an adapter, float32 (T,)."""
    continuation, length = [Continuation(adapter, tuple(prompt), tuple(tokens))], len(prompt) + len(tokens)
    (batch,) = plan_micro_batches(continuation, length, length)
    with multi.rows(batch.adapters):
        scored = token_logprobs(model, multi, batch, continuation)
    return np.asarray(scored.logprobs.cpu().numpy(), np.float32)
