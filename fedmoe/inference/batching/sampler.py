"""Draws one token per row: temperature, top-p, and log-probabilities where requested.

Drawn by the Gumbel-max rule: argmax of z / T + g with g from the Gumbel distribution is a draw from softmax(z / T)
(Gumbel 1954). The last bits of z depend on who else is in the batch, and here they count only where two tokens tie;
with the inverse of the cumulative distribution they would count at the border of every token, so that one seed would
not give one text.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from fedmoe.inference.backend import ContinuationRequest, DecodingStep, Finish, Likelihood


class BatchRow:
    """One generation in the batch and its tokens so far."""

    def __init__(self, request: ContinuationRequest, stop_tokens: frozenset[int]) -> None:
        self.request = request
        self.adapter = None if request.model is None else str(request.model)
        self.tokens: list[int] = []
        self.likelihood: Likelihood | None = None
        #: Set when the caller no longer wants the rest.
        self.given_up = False
        self._stop_tokens = stop_tokens

    @property
    def room(self) -> int:
        """How long the whole text can get, in tokens."""
        return len(self.request.prompt) + self.request.sampling.max_new_tokens

    @property
    def finish(self) -> Finish | None:
        """Why there is no next token, if so."""
        if self.tokens and self.tokens[-1] in self._stop_tokens:
            return "stop"
        return "length" if len(self.tokens) >= self.request.sampling.max_new_tokens else None

    def step(self) -> DecodingStep:
        """The token drawn last."""
        return DecodingStep(self.tokens[-1], self.finish, self.likelihood)

    def noise(self, vocabulary: int) -> NDArray[np.float32]:
        """Gumbel noise for the next token, float32 (vocabulary,): it follows from seed and place alone."""
        key = self.request.sampling.seed % (1 << 64), len(self.tokens)
        generator = np.random.Generator(np.random.Philox(key=np.array(key, np.uint64)))
        waits = generator.standard_exponential(vocabulary, dtype=np.float32)
        return -np.log(np.maximum(waits, np.float32(1e-30)))


def draw(logits: torch.Tensor, rows: Sequence[BatchRow]) -> frozenset[int]:
    """Draw a token for every row; returns the rows that cannot go on, because their numbers are not finite.

    `logits` float32 (rows, vocabulary) are overwritten.
    """
    broken = frozenset((~logits.amax(dim=-1).isfinite()).nonzero()[:, 0].tolist())
    if broken:
        logits[list(broken)] = 0.0
    asking = [index for index, row in enumerate(rows) if row.request.sampling.alternatives is not None]
    own = logits[asking].log_softmax(dim=-1)
    warm = [index for index, row in enumerate(rows) if row.request.sampling.temperature > 0]
    if warm:
        logits[warm] = _noisy(logits[warm], [rows[index] for index in warm])
    for row, token in zip(rows, logits.argmax(dim=-1).tolist(), strict=True):
        row.tokens.append(token)
    for place, index in enumerate(asking):
        row, alternatives = rows[index], rows[index].request.sampling.alternatives or 0
        top = own[place].topk(min(alternatives, own.shape[-1]))
        pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        row.likelihood = Likelihood(float(own[place, row.tokens[-1]]), tuple(pairs))
    return broken


def _noisy(logits: torch.Tensor, rows: Sequence[BatchRow]) -> torch.Tensor:
    """z / T without what lies outside the nucleus, plus each row's noise; all of it (rows, vocabulary)."""
    temperatures = torch.tensor([[row.request.sampling.temperature] for row in rows], device=logits.device)
    # Relative to the highest, so that a very small temperature makes no infinity out of it.
    scores = (logits - logits.amax(dim=-1, keepdim=True)).div_(temperatures)
    # Leave each row the likeliest tokens that together reach its top_p (Holtzman et al. 2020); the likeliest stays.
    if cut := [index for index, row in enumerate(rows) if row.request.sampling.top_p < 1.0]:
        shares = torch.tensor([[rows[index].request.sampling.top_p] for index in cut], device=scores.device)
        ordered, order = scores[cut].sort(dim=-1, descending=True)
        probabilities = ordered.softmax(dim=-1)
        outside = probabilities.cumsum(dim=-1) - probabilities >= shares
        outside[:, 0] = False
        scores[cut] = torch.empty_like(ordered).scatter_(1, order, ordered.masked_fill_(outside, -torch.inf))
    noise = np.stack([row.noise(logits.shape[-1]) for row in rows])
    return scores.add_(torch.from_numpy(noise).to(logits.device))
