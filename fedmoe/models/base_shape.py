"""The shape of a base model by its config.json alone: parameters, linear modules, context; without weights or torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from fedmoe.lora.adapter import ModuleShape

# Families whose decoder layers have these seven linear modules.
_FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3"})
ALL_LINEAR = "all-linear"


@dataclass(frozen=True, slots=True)
class BaseShape:
    """A decoder's sizes; `width` is heads times head size, `key_width` that of keys and values."""

    family: str
    layers: int
    hidden: int
    width: int
    key_width: int
    head: int
    inner: int
    vocabulary: int
    tied: bool
    attention_bias: bool
    mlp_bias: bool

    @classmethod
    def of(cls, config: Mapping[str, object]) -> Self | None:
        """From the content of config.json; None for a family whose modules are not known here, or missing sizes."""
        family = str(config.get("model_type"))
        sizes = [config.get(key) for key in ("num_hidden_layers", "hidden_size", "num_attention_heads")]
        sizes += [config.get(key) for key in ("intermediate_size", "vocab_size")]
        if family not in _FAMILIES or not all(isinstance(size, int) and size > 0 for size in sizes):
            return None
        layers, hidden, heads, inner, vocabulary = (int(str(size)) for size in sizes)
        head = int(str(config.get("head_dim") or hidden // heads))
        groups = int(str(config.get("num_key_value_heads") or heads))
        bias, mlp_bias = bool(config.get("attention_bias")), bool(config.get("mlp_bias"))
        tied = bool(config.get("tie_word_embeddings"))
        widths = (heads * head, groups * head, head)
        return cls(family, layers, hidden, *widths, inner, vocabulary, tied, bias, mlp_bias)

    @property
    def modules(self) -> tuple[ModuleShape, ...]:
        """All linear modules but the output head, by the names that transformers gives them."""
        sides = {
            "self_attn.q_proj": (self.hidden, self.width),
            "self_attn.k_proj": (self.hidden, self.key_width),
            "self_attn.v_proj": (self.hidden, self.key_width),
            "self_attn.o_proj": (self.width, self.hidden),
            "mlp.gate_proj": (self.hidden, self.inner),
            "mlp.up_proj": (self.hidden, self.inner),
            "mlp.down_proj": (self.inner, self.hidden),
        }
        return tuple(
            ModuleShape(f"model.layers.{layer}.{name}", *side)
            for layer in range(self.layers)
            for name, side in sides.items()
        )

    @property
    def parameters(self) -> int:
        """Numbers in the model; tied embeddings count once."""
        linear = sum(module.in_features * module.out_features for module in self.modules)
        norms = 2 * self.hidden + (2 * self.head if self.family == "qwen3" else 0)
        biases = 0
        if self.family == "qwen2" or self.attention_bias:
            biases += self.width + 2 * self.key_width + (self.hidden if self.attention_bias else 0)
        if self.mlp_bias:
            biases += 2 * self.inner + self.hidden
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return linear + self.layers * (norms + biases) + self.hidden + embeddings


def selected(names: Sequence[str], targets: Sequence[str]) -> list[str]:
    """Of linear modules' names those that `targets` choose, which are ends of names or `all-linear`."""
    return [
        name
        for name in names
        if any(target == ALL_LINEAR or name == target or name.endswith(f".{target}") for target in targets)
    ]
