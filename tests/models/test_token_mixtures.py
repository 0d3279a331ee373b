"""Every token its own mixture of adapters, against a dense reference."""

from __future__ import annotations

import pytest
import torch
from multilora_cases import SHAPES, random_ids, with_adapters

from fedmoe.lora.adapter import ShapeError
from fedmoe.models.base import LoadedBase
from fedmoe.models.multilora import MultiLora, UnknownAdapterError

NAMES = tuple(SHAPES)
ROWS, LENGTH = 3, 11


@pytest.fixture(scope="module")
def pair() -> tuple[LoadedBase, MultiLora]:
    return with_adapters(trainable=False)


def logits(base: LoadedBase, multi: MultiLora, weights: torch.Tensor) -> torch.Tensor:
    with multi.mixed(NAMES, lambda module, x: weights, ROWS):
        found: torch.Tensor = base.model(random_ids(ROWS, LENGTH), use_cache=False).logits
    return found


def test_a_token_gets_the_weighted_sum_of_the_dense_products(pair: tuple[LoadedBase, MultiLora]) -> None:
    base, multi = pair
    layer = base.model.get_submodule(multi.modules[0].name)
    draws = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, LENGTH, layer.base_layer.in_features, generator=draws)
    weights = torch.rand(ROWS, LENGTH, len(NAMES), generator=draws)
    with multi.mixed(NAMES, lambda module, seen: weights, ROWS):
        found = layer(x)
    expected = layer.base_layer(x).detach()
    for place, name in enumerate(NAMES):
        adapter = multi.slot(name).adapter()
        a, b = adapter.module(multi.modules[0].name)
        dense = torch.from_numpy(adapter.scale * b @ a)
        expected += weights[..., [place]] * (x @ dense.T)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_one_whole_adapter_for_each_row_is_what_rows_does(pair: tuple[LoadedBase, MultiLora]) -> None:
    base, multi = pair
    chosen = torch.eye(len(NAMES))[:, None, :].expand(ROWS, LENGTH, len(NAMES))
    with torch.no_grad(), multi.rows(NAMES):
        expected = base.model(random_ids(ROWS, LENGTH), use_cache=False).logits
    torch.testing.assert_close(logits(base, multi, chosen), expected, atol=1e-5, rtol=1e-5)


def test_weights_of_zero_are_the_base_model(pair: tuple[LoadedBase, MultiLora]) -> None:
    base, multi = pair
    with torch.no_grad():
        expected = base.model(random_ids(ROWS, LENGTH), use_cache=False).logits
    found = logits(base, multi, torch.zeros(ROWS, LENGTH, len(NAMES)))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def test_weights_that_do_not_fit_are_refused(pair: tuple[LoadedBase, MultiLora]) -> None:
    base, multi = pair
    with pytest.raises(ShapeError, match="a weight for each of 3 experts and token"):
        logits(base, multi, torch.ones(ROWS, LENGTH, 2))
    with pytest.raises(UnknownAdapterError), multi.mixed(["nobody"], lambda module, x: x, 1):
        pass
