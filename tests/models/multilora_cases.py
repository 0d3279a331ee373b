"""What tests of many adapters on one model share: the tiny model, adapters of several ranks, and PEFT beside it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import peft
import pytest
import torch
from builders import random_adapter
from transformers import PreTrainedModel

from fedmoe.models.base import LoadedBase, load_base
from fedmoe.models.multilora import MultiLora
from fedmoe.models.tiny import tiny_model

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
#: Adapter -> (rank, alpha): all scales differ too.
SHAPES: Mapping[str, tuple[int, float]] = {"a": (4, 8.0), "b": (2, 8.0), "c": (8, 4.0)}


def with_adapters(device: str = "cpu", dtype: str = "fp32", trainable: bool = True) -> tuple[LoadedBase, MultiLora]:
    """The tiny model with the adapters of SHAPES."""
    base = load_base("tiny", device=device, dtype=dtype)
    multi = MultiLora(base.model)
    for seed, (name, (rank, alpha)) in enumerate(SHAPES.items()):
        multi.add(name, random_adapter(multi.layout(rank), seed, alpha=alpha), trainable=trainable)
    return base, multi


def random_ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """int64 (rows, length), tokens of the tiny model that end nothing."""
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (rows, length)))


def random_tokens(rng: np.random.Generator, length: int) -> tuple[int, ...]:
    return tuple(rng.integers(0, 256, length).tolist())


def _named(name: str) -> str:
    # PEFT warns of names that are a part of its own parameter names, as "a" is.
    return f"the-{name}"


class PeftReference:
    """The same adapters in PEFT, one at a time."""

    def __init__(self, multi: MultiLora, device: str = "cpu", names: Sequence[str] = tuple(SHAPES)) -> None:
        self.model: PreTrainedModel = tiny_model().eval().to(device)
        self.multi = multi
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT uses a name that transformers is renaming
            self.peft = peft.get_peft_model(self.model, self._config(names[0]), adapter_name=_named(names[0]))
            for name in names[1:]:
                self.peft.add_adapter(_named(name), self._config(name))
        for name in names:
            state = {}
            for module, a, b in multi.slot(name).adapter().factors():
                state[f"base_model.model.{module.name}.lora_A.weight"] = torch.tensor(a)
                state[f"base_model.model.{module.name}.lora_B.weight"] = torch.tensor(b)
            found = peft.set_peft_model_state_dict(self.peft, state, adapter_name=_named(name))
            assert not found.unexpected_keys
        self.peft.eval()

    def _config(self, name: str) -> peft.LoraConfig:
        slot = self.multi.slot(name)
        return peft.LoraConfig(
            r=slot.layout.rank, lora_alpha=slot.alpha, target_modules="all-linear", task_type="CAUSAL_LM"
        )

    def logits(self, name: str | None, ids: torch.Tensor) -> torch.Tensor:
        """Under one adapter, None being the base model."""
        if name is None:
            with self.peft.disable_adapter():
                return self.peft(ids).logits
        self.peft.set_adapter(_named(name))
        return self.peft(ids).logits

    def gradient(self, name: str) -> np.ndarray:
        """The accumulated gradient of an adapter as one vector in the layout's order."""
        gradients = {key: value.grad for key, value in self.peft.named_parameters()}
        layout = self.multi.slot(name).layout
        flat = np.empty(layout.size, np.float32)
        for module, a, b in layout.factors(flat):
            for factor, part in (("lora_A", a), ("lora_B", b)):
                gradient = gradients[f"base_model.model.{module.name}.{factor}.{_named(name)}.weight"]
                assert gradient is not None
                part[...] = gradient.cpu().numpy()
        return flat
