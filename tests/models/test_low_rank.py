"""The operation with a backward pass of its own, against what PyTorch makes of its parts."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from fedmoe.models.linear_terms import RowsTerm, linear_with_terms

# (start, stop, scale, rank): a gap before, between and after; neighbours without a gap; everything; nothing.
LAYOUTS = [
    [(1, 2, 2.0, 3), (3, 5, 0.5, 1)],
    [(0, 3, 2.0, 2), (3, 6, -1.5, 4)],
    [(0, 6, 0.25, 2)],
    [],
]


def parts(layout: list[tuple[int, int, float, int]], *middle: int) -> list[torch.Tensor]:
    """x, weight, bias and the factors, float64."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(6, *middle, 5), (4, 5), (4,)]
    for *_, rank in layout:
        shapes += [(rank, 5), (4, rank)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def terms_of(layout: list[tuple[int, int, float, int]], factors: list[torch.Tensor]) -> list[RowsTerm]:
    return [
        RowsTerm(start, stop, scale, a, b)
        for (start, stop, scale, _), a, b in zip(layout, factors[::2], factors[1::2], strict=True)
    ]


def composed(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, terms: list[RowsTerm]) -> torch.Tensor:
    found = functional.linear(x, weight, bias)
    for term in terms:
        rows = torch.zeros(len(x), *[1] * (x.ndim - 1), dtype=x.dtype)
        rows[term.start : term.stop] = term.scale
        found = found + rows * functional.linear(functional.linear(x, term.a), term.b)
    return found


@pytest.mark.parametrize("middle", [(), (3,), (2, 3)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_output_and_gradients_are_those_of_the_parts(
    layout: list[tuple[int, int, float, int]], middle: tuple[int, ...]
) -> None:
    x, weight, bias, *factors = parts(layout, *middle)
    leaves = [leaf.requires_grad_() for leaf in (x, *factors)]
    mine = linear_with_terms(x, weight, bias, terms_of(layout, factors))
    theirs = composed(x, weight, bias, terms_of(layout, factors))
    torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=1e-12)
    # A gradient that is not contiguous is what attention hands back.
    gradient = torch.randn(mine.transpose(0, -1).shape, dtype=torch.float64).transpose(0, -1)
    for one, other in zip(*(torch.autograd.grad(out, leaves, gradient) for out in (mine, theirs)), strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(
            linear_with_terms(x, weight, None, terms_of(layout, factors)), theirs - bias, atol=1e-12, rtol=1e-12
        )


def test_an_input_that_is_not_contiguous_is_taken() -> None:
    layout = LAYOUTS[0]
    x, weight, bias, *factors = parts(layout, 3)
    turned = x.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    mine = linear_with_terms(turned, weight, bias, terms_of(layout, factors))
    theirs = composed(turned, weight, bias, terms_of(layout, factors))
    torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=1e-12)
    one, other = (torch.autograd.grad(out.pow(2).sum(), turned)[0] for out in (mine, theirs))
    torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


def test_what_needs_no_gradient_gets_none() -> None:
    x, weight, bias, a, b = parts(LAYOUTS[2])
    b.requires_grad_()
    linear_with_terms(x, weight, bias, [RowsTerm(0, 6, 1.0, a, b)]).sum().backward()
    assert b.grad is not None
    assert x.grad is None
    assert a.grad is None
    assert not linear_with_terms(x, weight, bias, [RowsTerm(0, 6, 1.0, a, b.detach())]).requires_grad
