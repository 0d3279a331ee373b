"""How likely one text is under many adapters, in one batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from fedmoe.models.final_logits import selected_logprobs
from fedmoe.models.multilora import MultiLora


@torch.no_grad()  # type: ignore[untyped-decorator]
def log_likelihoods(
    model: PreTrainedModel, multi: MultiLora, text: Sequence[int], adapters: Sequence[str | None]
) -> list[float]:
    """ln p(text[1:] | text[0]) in nats under each adapter (None: the base model alone), in the order given.

    0 for a text of one token. Other threads may use the model meanwhile. Raises ValueError for an empty text and
    `UnknownAdapterError` for an adapter that is not there.
    """
    if not text:
        raise ValueError("a text needs at least one token; this one is empty")
    if len(text) == 1 or not adapters:
        return [0.0] * len(adapters)
    ids = torch.tensor([list(text)] * len(adapters), device=multi.device)
    with multi.rows(adapters):
        hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    states = hidden.reshape(-1, hidden.shape[-1])
    targets = np.tile(np.asarray(text[1:], np.int64), len(adapters))
    logprobs, _ = selected_logprobs(model, states, np.arange(len(targets)), targets)
    found: list[float] = logprobs.double().view(len(adapters), -1).sum(dim=1).tolist()
    return found
