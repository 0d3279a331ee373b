"""The loss matrix: base, experts and a gateway of a higher rank on the same blocks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from fedmoe.datasets.tokens.packing import Block, pack
from fedmoe.datasets.tokens.tokenized_sample import TokenizedSample
from fedmoe.gateway.evaluate import BASE, ROUTED_BY, evaluate, held_out_blocks, routed_to
from fedmoe.gateway.retained_gain import retained_gains
from fedmoe.gateway.routers import SequenceRouter
from fedmoe.lora.adapter import Adapter
from fedmoe.lora.algebra import stack
from fedmoe.models.base import LoadedBase
from fedmoe.models.prompt_features import features_width
from fedmoe.models.training_config import LoraConfig
from fedmoe.qwen_finetune import QwenLoRAExpert


def random_adapters(base: LoadedBase) -> tuple[Adapter, Adapter]:
    expert = QwenLoRAExpert(base, LoraConfig(r=4, lora_alpha=8.0))
    layout, alpha = expert.attached.layout, float(expert.attached.alpha)
    expert.attached.detach()
    random = np.random.default_rng(0)
    one, two = (Adapter(layout, alpha, random.normal(0, 0.2, layout.size).astype(np.float32)) for _ in range(2))
    return one, two


def random_blocks() -> list[Block]:
    random = np.random.default_rng(1)
    ids = [random.integers(3, 200, 40) for _ in range(4)]
    return pack([TokenizedSample(tokens, tokens.copy()) for tokens in ids], 64, seed=0)


def test_the_matrix_scores_every_adapter_on_every_domain(base: LoadedBase) -> None:
    one, two = random_adapters(base)
    gateway = stack([(0.5, one), (0.5, two)])
    blocks = random_blocks()
    matrix = evaluate(base, {"one": one, "two": two, "gateway": gateway}, {"left": blocks[:2], "right": blocks[2:]})
    assert list(matrix.losses) == [BASE, "one", "two", "gateway"]
    assert matrix.tokens == {"left": 78, "right": 78}
    seen = {round(losses[domain], 6) for losses in matrix.losses.values() for domain in losses}
    assert len(seen) == 8
    alone = QwenLoRAExpert(base, LoraConfig(r=8, lora_alpha=8.0))
    alone.load_adapter(gateway)
    assert alone.evaluate(blocks[2:], 1).loss == pytest.approx(matrix.losses["gateway"]["right"], rel=1e-5)
    alone.attached.detach()


def test_the_losses_of_blocks_are_those_of_each_block_alone(base: LoadedBase) -> None:
    one, two = random_adapters(base)
    blocks = random_blocks()
    whole = evaluate(base, {"one": one, "two": two}, {"all": blocks}, batch_size=3)
    single = evaluate(base, {"one": one}, {str(place): [block] for place, block in enumerate(blocks)})
    assert whole.block_tokens == {"all": [39] * 4}
    expected = [single.losses["one"][str(place)] for place in range(4)]
    assert whole.block_losses["one"]["all"] == pytest.approx(expected, rel=1e-5)
    assert whole.losses["one"]["all"] == pytest.approx(np.mean(expected), rel=1e-5)
    assert retained_gains(whole, {"all": "one"}, ["two"]).domains[0].own_gain.value == pytest.approx(
        whole.losses[BASE]["all"] - whole.losses["one"]["all"]
    )


def test_held_out_data_is_read_as_training_data_is(base: LoadedBase, tmp_path: Path) -> None:
    file = tmp_path / "held_out.jsonl"
    lines = [{"text": f"select {number} from numbers where n > {number}"} for number in range(30)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    blocks = held_out_blocks(file, base, 64)
    assert {len(block.input_ids) for block in blocks} == {64}
    text = base.tokenizer.decode([int(token) for block in blocks for token in block.input_ids])
    assert all(line["text"] in text for line in lines)
    again = held_out_blocks(file, base, 64, limit=2)
    assert [block.input_ids.tolist() for block in again] == [block.input_ids.tolist() for block in blocks[:2]]


def test_blocks_are_routed_by_what_was_said_and_not_by_the_chat_templates_frame(
    base: LoadedBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = [f"{number} times {number} is how much, and why is it not {number + 1}?" for number in range(10, 16)]
    turns = [[{"role": "user", "content": one}, {"role": "assistant", "content": "Because."}] for one in said]
    file = tmp_path / "chat.jsonl"
    file.write_text("\n".join(json.dumps({"messages": one}) for one in turns))
    seen: list[str] = []

    def heard(model: object, multi: object, pairs: Sequence[tuple[Sequence[int], str]]) -> list[float]:
        (text,) = {tuple(text) for text, _ in pairs}
        seen.append(base.tokenizer.decode(list(text)))
        return [0.0] * len(pairs)

    monkeypatch.setattr("fedmoe.gateway.evaluate.log_likelihoods", heard)
    one, two = random_adapters(base)
    undecided = SequenceRouter(("one", "two"), np.zeros((features_width(base), 2)), np.zeros(2))
    blocks = {"chat": held_out_blocks(file, base, 96)}
    routed_to(base, undecided, {"one": one, "two": two, "gateway": one}, blocks, "gateway")
    assert sorted(seen) == [text[:ROUTED_BY] for text in said]
