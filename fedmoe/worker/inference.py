"""An adapter on its base model, for people who want to try it."""

from __future__ import annotations

from fedmoe.lora.adapter import Adapter
from fedmoe.models.base import LoadedBase
from fedmoe.models.schedule import LoraConfig
from fedmoe.qwen_finetune import QwenLoRAExpert


def answer(adapter: Adapter, base: LoadedBase, prompt: str, max_new_tokens: int) -> str:
    """The greedy answer of `base` with `adapter` to one prompt."""
    targets = tuple(sorted({module.name for module in adapter.layout.modules}))
    expert = QwenLoRAExpert(base, LoraConfig(adapter.rank, adapter.alpha, target_modules=targets))
    expert.load_adapter(adapter)
    return expert.generate(prompt, max_new_tokens)
