"""A frozen linear layer with low-rank terms on ranges of its rows, as one operation forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class RowsTerm:
    """Rows [start, stop) of a batch get `scale` * (x @ a^T) @ b^T on top; a (r, in), b (out, r), in the dtype of x."""

    start: int
    stop: int
    scale: float
    a: torch.Tensor
    b: torch.Tensor


def linear_with_terms(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, terms: Sequence[RowsTerm]
) -> torch.Tensor:
    """x (rows, ..., in) -> x @ weight^T + bias (rows, ..., out), plus the terms of its rows.

    `weight` and `bias` are frozen: gradients go to x and to the factors of the terms.
    """
    if not torch.is_grad_enabled():
        return _forward(x, weight, bias, terms)[0]
    spans = tuple((term.start, term.stop, term.scale) for term in terms)
    factors = [factor for term in terms for factor in (term.a, term.b)]
    out: torch.Tensor = _LinearWithTerms.apply(x, weight, bias, spans, *factors)
    return out


def _forward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, terms: Sequence[RowsTerm]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The output, and x @ a^T of every term, (rows of the term * ..., r)."""
    out = functional.linear(x, weight, bias)
    inners = []
    for term in terms:
        inner = _matrix(x, term.start, term.stop) @ term.a.t()
        _matrix(out, term.start, term.stop).addmm_(inner, term.b.t(), alpha=term.scale)
        inners.append(inner)
    return out, inners


def _matrix(tensor: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Rows [start, stop) of a tensor (rows, ..., n) as a matrix (rows * ..., n); a view of a contiguous one."""
    return tensor[start:stop].flatten(0, -2)


class _LinearWithTerms(torch.autograd.Function):  # type: ignore[misc]
    """One operation with its own backward pass.

    Composed of single operations, PyTorch would copy the whole output once a call and fill a gradient of full size with
    zeros for every adapter; here each adapter's term is added in place, forward and backward.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        spans: tuple[tuple[int, int, float], ...],
        *factors: torch.Tensor,
    ) -> torch.Tensor:
        pairs = zip(spans, factors[::2], factors[1::2], strict=True)
        out, inners = _forward(x, weight, bias, [RowsTerm(*span, a, b) for span, a, b in pairs])
        ctx.spans = spans
        ctx.save_for_backward(x, weight, *factors, *inners)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, *rest = ctx.saved_tensors
        count = len(ctx.spans)
        gradient = gradient.contiguous()
        back = gradient @ weight if ctx.needs_input_grad[0] else None
        gradients: list[torch.Tensor | None] = []
        for index, (start, stop, scale) in enumerate(ctx.spans):
            a, b, inner = rest[2 * index], rest[2 * index + 1], rest[2 * count + index]
            upstream = _matrix(gradient, start, stop)
            upstream_inner = (upstream @ b).mul_(scale)
            if back is not None:
                _matrix(back, start, stop).addmm_(upstream_inner, a)
            wants_a, wants_b = ctx.needs_input_grad[4 + 2 * index : 6 + 2 * index]
            gradients.append(upstream_inner.t() @ _matrix(x, start, stop) if wants_a else None)
            gradients.append((upstream.t() @ inner).mul_(scale) if wants_b else None)
        return back, None, None, None, *gradients
