"""Many adapters in one batch give what each gives alone, forward and backward, and keep out of each other's way."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from builders import random_adapter
from multilora_cases import DEVICES, SHAPES, PeftReference, random_ids, with_adapters

from fedmoe.lora.adapter import Adapter, ModuleShape, ShapeError
from fedmoe.models.base import LoadedBase
from fedmoe.models.lora_layers import TargetError
from fedmoe.models.multilora import MultiLora, UnknownAdapterError
from fedmoe.models.tiny import tiny_model

ORDERS = {
    "neighbours": ("a", "a", "b", "b", "c", "c"),
    "interleaved": ("b", "a", "c", "a", "b", "c"),
    "with the base": (None, "a", None, "b", "c", None),
    "the base in the middle": ("c", None, "c", "a", None, "a"),
    "one adapter": ("b",) * 6,
    "the base alone": (None,) * 6,
}
Names = Sequence[str | None]


def logits_of(base: LoadedBase, multi: MultiLora, names: Names, ids: torch.Tensor) -> torch.Tensor:
    with multi.rows(names):
        logits: torch.Tensor = base.model(ids.to(multi.device), use_cache=False).logits
    return logits


def backward(
    base: LoadedBase, multi: MultiLora, names: Names, ids: torch.Tensor, weights: Sequence[float]
) -> dict[str, np.ndarray]:
    """The gradient of every adapter of sum_i weights[i] * (mean squared logit of row i); gradients are left empty."""
    losses = logits_of(base, multi, names, ids).float().pow(2).mean(dim=(1, 2))
    (losses * torch.tensor(weights, device=losses.device)).sum().backward()
    found = {}
    for name in multi.names:
        gradient = multi.slot(name).parameter.grad
        if gradient is not None:
            found[name] = gradient.cpu().numpy().copy()
            multi.slot(name).parameter.grad = None
    return found


@pytest.fixture
def pair() -> tuple[LoadedBase, MultiLora]:
    return with_adapters()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("names", ORDERS.values(), ids=ORDERS.keys())
def test_every_row_gets_the_logits_peft_gives_its_adapter_alone(names: Names, device: str) -> None:
    base, multi = with_adapters(device)
    reference = PeftReference(multi, device)
    ids = random_ids(6, 11)
    with torch.no_grad():
        mine = logits_of(base, multi, names, ids)
        for row, name in enumerate(names):
            theirs = reference.logits(name, ids[row : row + 1].to(device))[0]
            torch.testing.assert_close(mine[row], theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("names", list(ORDERS.values())[:4], ids=list(ORDERS)[:4])
def test_every_adapter_gets_the_gradient_peft_gives_it_alone(names: Names, device: str) -> None:
    base, multi = with_adapters(device)
    reference = PeftReference(multi, device)
    ids, weights = random_ids(6, 11), [1.0, -2.0, 0.5, 3.0, 1.5, -1.0]
    mine = backward(base, multi, names, ids, weights)
    assert set(mine) == set(names) - {None}
    for name in mine:
        rows = [row for row, given in enumerate(names) if given == name]
        theirs = reference.logits(name, ids[rows].to(device)).pow(2).mean(dim=(1, 2))
        (theirs * torch.tensor([weights[row] for row in rows], device=device)).sum().backward()
        expected = reference.gradient(name)
        np.testing.assert_allclose(mine[name], expected, atol=1e-5 * np.abs(expected).max(), rtol=1e-4)
    assert all(parameter.grad is None for parameter in base.model.parameters())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["bf16", pytest.param("fp16", marks=pytest.mark.gpu)])
def test_half_precision_stays_near_float32(device: str, dtype: str) -> None:
    # bfloat16 keeps 8 bits (steps of 0.4 %), float16 11: after two layers logits are within 3 % of the largest one,
    # and gradients point the same way.
    (base, multi), (exact_base, exact) = with_adapters(device, dtype), with_adapters(device)
    names, ids = ORDERS["with the base"], random_ids(6, 11)
    with torch.no_grad():
        rough, fine = logits_of(base, multi, names, ids).float(), logits_of(exact_base, exact, names, ids)
    assert (rough - fine).abs().max() <= 0.03 * fine.abs().max()
    found, expected = (backward(*each, names, ids, [1.0] * 6) for each in ((base, multi), (exact_base, exact)))
    for name in SHAPES:
        one, other = found[name], expected[name]
        assert np.dot(one, other) / np.linalg.norm(one) / np.linalg.norm(other) > 0.99
        assert found[name].dtype == np.float32


@pytest.mark.parametrize("device", DEVICES)
def test_half_precision_rows_equal_those_of_the_adapter_alone_up_to_rounding(device: str) -> None:
    base, multi = with_adapters(device, "bf16")
    names, ids = ORDERS["interleaved"], random_ids(6, 11)
    with torch.no_grad():
        together = logits_of(base, multi, names, ids).float()
        for row, name in enumerate(names):
            alone = logits_of(base, multi, [name], ids[row : row + 1])[0].float()
            assert (together[row] - alone).abs().max() <= 0.02 * alone.abs().max()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("names", ORDERS.values(), ids=ORDERS.keys())
def test_decoding_rows_give_what_rows_give(names: Names, device: str) -> None:
    base, multi = with_adapters(device)
    ids = random_ids(6, 1)
    with torch.no_grad():
        plain = logits_of(base, multi, names, ids)
    with multi.decoding_rows(names) as rows:
        decoded = base.model(ids.to(device), use_cache=False).logits
        assert not decoded.requires_grad
        torch.testing.assert_close(decoded, plain, atol=1e-5, rtol=1e-5)
        kept = torch.tensor([5, 0, 3], device=device)
        rows.keep(kept)
        again = base.model(ids.to(device)[kept], use_cache=False).logits
        torch.testing.assert_close(again, plain[kept], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_generation_by_transformers_equals_pefts(device: str) -> None:
    base, multi = with_adapters(device)
    reference = PeftReference(multi, device)
    ids = random_ids(3, 7).to(device)
    mask = torch.ones_like(ids)
    with multi.rows(["c", "a", None]):
        mine = base.model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=6, eos_token_id=None)
    for row, name in enumerate(["c", "a", None]):
        logits = ids[row : row + 1]
        for _ in range(6):
            with torch.no_grad():
                token = reference.logits(name, logits)[:, -1].argmax(dim=-1, keepdim=True)
            logits = torch.cat([logits, token], dim=1)
        assert mine[row].tolist() == logits[0].tolist()


def test_a_gradient_does_not_change_when_other_rows_do(pair: tuple[LoadedBase, MultiLora]) -> None:
    names, ids = ("a", "a", "b", "c", "b"), random_ids(5, 9)
    before = backward(*pair, names, ids, [1.0] * 5)
    other_rows = torch.cat([ids[:2], random_ids(3, 9, seed=1)])
    np.testing.assert_array_equal(backward(*pair, names, other_rows, [1.0] * 5)["a"], before["a"])
    huge = backward(*pair, names, ids, [1.0, 1.0, 1e20, -1e20, 1e20])
    np.testing.assert_array_equal(huge["a"], before["a"])
    assert np.abs(huge["b"]).max() > 1e15 * np.abs(before["b"]).max()


def test_a_gradient_is_that_of_the_rows_alone(pair: tuple[LoadedBase, MultiLora]) -> None:
    ids = random_ids(5, 9)
    together = backward(*pair, ("b", "a", "b", "a", None), ids, [1.0] * 5)
    alone = backward(*pair, ("a", "a"), ids[[1, 3]], [1.0] * 2)
    assert set(alone) == {"a"}
    np.testing.assert_allclose(together["a"], alone["a"], atol=1e-6 * np.abs(alone["a"]).max(), rtol=1e-5)


def test_rows_whose_numbers_overflow_leave_the_others_alone(pair: tuple[LoadedBase, MultiLora]) -> None:
    base, multi = pair
    multi.add("wild", random_adapter(multi.layout(2), 9, 1e20, 1.0))
    ids, names = random_ids(4, 1), ("a", "wild", "b", None)
    with torch.no_grad():
        fine = logits_of(base, multi, ("a", "a", "b", None), ids)
        plain = logits_of(base, multi, names, ids)
    with multi.decoding_rows(names):
        decoded = base.model(ids, use_cache=False).logits
    for found in (plain, decoded):
        assert not torch.isfinite(found[1]).all()
        torch.testing.assert_close(found[[0, 2, 3]], fine[[0, 2, 3]], atol=1e-5, rtol=1e-5)


def test_two_threads_at_once_give_what_each_gives_alone(pair: tuple[LoadedBase, MultiLora]) -> None:
    base, multi = pair
    multi.add("frozen", random_adapter(multi.layout(3), 7, alpha=3.0))
    ids, decoded_ids = random_ids(4, 9), random_ids(3, 1)
    expected = backward(base, multi, ("a", "b", None, "a"), ids, [1.0] * 4)
    with multi.decoding_rows(["frozen", None, "c"]):
        expected_logits = base.model(decoded_ids, use_cache=False).logits
    start = threading.Barrier(2)
    found: dict[str, list[np.ndarray]] = {"trained": [], "decoded": []}

    def train() -> None:
        start.wait()
        for _ in range(20):
            found["trained"].append(backward(base, multi, ("a", "b", None, "a"), ids, [1.0] * 4)["a"])

    def decode() -> None:
        start.wait()
        for _ in range(60):
            with multi.decoding_rows(["frozen", None, "c"]):
                found["decoded"].append(base.model(decoded_ids, use_cache=False).logits.numpy())

    threads = [threading.Thread(target=one) for one in (train, decode)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(found["trained"]), len(found["decoded"])) == (20, 60)
    for gradient in found["trained"]:
        np.testing.assert_allclose(gradient, expected["a"], atol=1e-6 * np.abs(expected["a"]).max(), rtol=1e-5)
    for logits in found["decoded"]:
        np.testing.assert_allclose(logits, expected_logits.numpy(), atol=1e-5, rtol=1e-5)


def test_an_adapter_that_is_removed_or_replaced_serves_the_running_batch_to_its_end(
    pair: tuple[LoadedBase, MultiLora],
) -> None:
    base, multi = pair
    ids = random_ids(2, 5)
    with torch.no_grad():
        before = logits_of(base, multi, ["a", "b"], ids)
        with multi.rows(["a", "b"]):
            multi.remove("a")
            multi.replace("b", random_adapter(multi.layout(6), 11, alpha=2.0))
            torch.testing.assert_close(base.model(ids, use_cache=False).logits, before, atol=0, rtol=0)
        after = logits_of(base, multi, [None, "b"], ids)
    assert (after - before).abs().amax(dim=(1, 2)).min() > 1e-2
    assert multi.names == ("b", "c")
    assert multi.slot("b").adapter().rank == 6
    assert multi.slot("b").trainable


def test_rows_are_those_of_the_innermost_block(pair: tuple[LoadedBase, MultiLora]) -> None:
    base, multi = pair
    ids = random_ids(1, 5)
    with torch.no_grad():
        a, b, none = (logits_of(base, multi, [name], ids) for name in ("a", "b", None))
        with multi.rows(["a"]):
            with multi.rows(["b"]):
                torch.testing.assert_close(base.model(ids).logits, b, atol=0, rtol=0)
            with pytest.raises(RuntimeError, match="broken off"), multi.rows([None]):
                raise RuntimeError("broken off")
            torch.testing.assert_close(base.model(ids).logits, a, atol=0, rtol=0)
        torch.testing.assert_close(base.model(ids).logits, none, atol=0, rtol=0)


def test_an_adapter_that_is_not_there_is_named(pair: tuple[LoadedBase, MultiLora]) -> None:
    _, multi = pair
    with pytest.raises(UnknownAdapterError, match=r"no adapter 'd'; there are: a, b, c"), multi.rows(["a", "d"]):
        pass
    for action in (multi.remove, multi.slot):
        with pytest.raises(UnknownAdapterError, match="'d'"):
            action("d")
    with pytest.raises(UnknownAdapterError, match="'d'"):
        multi.replace("d", multi.slot("a").adapter())


def test_a_batch_of_another_size_is_refused(pair: tuple[LoadedBase, MultiLora]) -> None:
    base, multi = pair
    with multi.rows(["a", "b"]), pytest.raises(ShapeError, match="3 rows, adapters were named for 2"):
        base.model(random_ids(3, 4))
    with multi.decoding_rows(["a", "b"]), pytest.raises(ShapeError, match="1 rows, adapters were named for 2"):
        base.model(random_ids(1, 1))


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("trainable", [True, False])
def test_numbers_that_are_not_finite_are_refused_and_change_nothing(
    pair: tuple[LoadedBase, MultiLora], number: float, trainable: bool
) -> None:
    _, multi = pair
    good = multi.slot("a").adapter()
    flat = good.flat.copy()
    flat[17] = number
    broken = Adapter(good.layout, good.alpha, flat)
    with pytest.raises(ShapeError, match="not finite"):
        multi.add("d", broken, trainable)
    with pytest.raises(ShapeError, match="not finite"):
        multi.replace("a", broken)
    np.testing.assert_array_equal(multi.slot("a").adapter().flat, good.flat)
    assert "d" not in multi.names


def test_numbers_the_compute_dtype_cannot_hold_are_refused() -> None:
    _, multi = with_adapters(dtype="fp16")
    too_large = random_adapter(multi.layout(2), 0, 1e5, 2.0)
    with pytest.raises(ShapeError, match="float16"):
        multi.add("d", too_large)


def test_a_taken_name_and_other_modules_are_refused(pair: tuple[LoadedBase, MultiLora]) -> None:
    _, multi = pair
    with pytest.raises(ShapeError, match="'a' is there already"):
        multi.add("a", multi.slot("a").adapter())
    factors = {"elsewhere": (np.ones((2, 3), np.float32), np.ones((4, 2), np.float32))}
    with pytest.raises(ShapeError, match="other modules"):
        multi.add("d", Adapter.from_factors(factors, 2.0))


def test_an_adapter_comes_out_as_it_went_in(pair: tuple[LoadedBase, MultiLora]) -> None:
    _, multi = pair
    for seed, (name, (rank, alpha)) in enumerate(SHAPES.items()):
        given, taken = random_adapter(multi.layout(rank), seed, alpha=alpha), multi.slot(name).adapter()
        np.testing.assert_array_equal(taken.flat, given.flat)
        assert (taken.alpha, taken.layout) == (given.alpha, given.layout)
    taken = multi.slot("a").adapter()
    with torch.no_grad():
        multi.slot("a").parameter.zero_()
    assert taken.flat.any()


def test_frozen_adapters_get_no_gradient_and_let_it_through() -> None:
    base, multi = with_adapters(trainable=False)
    embedded = base.model.get_input_embeddings()(random_ids(2, 5)).requires_grad_()
    with multi.rows(["a", None]):
        base.model(inputs_embeds=embedded, use_cache=False).logits.sum().backward()
    assert embedded.grad is not None
    assert embedded.grad.abs().amax(dim=(1, 2)).min() > 0
    assert all(multi.slot(name).parameter.grad is None for name in SHAPES)


def test_detaching_gives_the_model_back_as_it_was(pair: tuple[LoadedBase, MultiLora]) -> None:
    base, multi = pair
    fresh, ids = tiny_model().eval(), random_ids(2, 6)
    assert [name for name, _ in base.model.named_modules()] != [name for name, _ in fresh.named_modules()]
    multi.detach()
    assert [name for name, _ in base.model.named_modules()] == [name for name, _ in fresh.named_modules()]
    with torch.no_grad(), multi.rows(["a", "b"]):
        torch.testing.assert_close(base.model(ids).logits, fresh(ids).logits, atol=0, rtol=0)


def test_chosen_modules_only_are_adapted() -> None:
    model = tiny_model().eval()
    with pytest.raises(TargetError, match="no_such_layer"):
        MultiLora(model, ["no_such_layer"])
    multi = MultiLora(model, ["q_proj", "down_proj"])
    ends = {module.name.rpartition(".")[2] for module in multi.modules}
    assert ends == {"q_proj", "down_proj"}
    assert ModuleShape("model.layers.1.mlp.down_proj", 128, 64) in multi.modules
    with pytest.raises(TargetError, match="already"):
        MultiLora(model)
