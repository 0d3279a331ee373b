"""Stop tokens and context length of a base model."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from fedmoe.models.chat_template import rendered

#: The context of a model that names no limit.
UNLIMITED = 1 << 30
# Tokenizers without a limit say 1e30.
_NO_LIMIT = 1_000_000_000


def stop_token_ids(tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None) -> frozenset[int]:
    """The tokens that end an answer: all end-of-sequence tokens, and the marks that conversations teach.

    Those of the tokenizer, those of the generation settings, and `end_marks`. Empty where nothing is named.
    """
    own = tokenizer.eos_token_id
    configured = getattr(generation_config, "eos_token_id", None)
    more = list(configured) if isinstance(configured, list | tuple) else [configured]
    return frozenset(int(token) for token in [own, *more, *end_marks(tokenizer)] if token is not None)


def end_marks(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The special tokens that the chat template puts behind the last answer; none without a template or such tokens.

    Ordinary text there (a newline, say) is no mark: it may stand within any answer.
    """
    if not getattr(tokenizer, "chat_template", None):
        return ()
    parts = rendered(tokenizer, answered=True)
    if isinstance(parts, str) or not parts[2].strip():
        return ()
    special = special_tokens(tokenizer)
    # The tail alone: a mark is a token of its own wherever it stands.
    tail = tokenizer(parts[2], add_special_tokens=False)["input_ids"]
    return tuple(token for token in tail if token in special and str(tokenizer.decode([token])).strip())


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The ids that no ordinary text is made of: special and added tokens."""
    return frozenset((*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()))


def strip_stop_tokens(tokens: Sequence[int], stops: frozenset[int]) -> list[int]:
    """A generated answer without the tokens that ended it, be they marked special or not."""
    return [token for token in tokens if token not in stops]


def context_of(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[int, str]:
    """How many tokens fit, and which setting says so.

    `max_position_embeddings` (lengthened by yarn where the settings say from which length) or the tokenizer's
    `model_max_length`, whichever is less. A sliding window limits what is attended to, not the length.
    """
    text = config.get_text_config()
    limits: list[tuple[int, str]] = []
    positions = getattr(text, "max_position_embeddings", None)
    if isinstance(positions, int):
        limits.append((max(positions, _yarn_length(text)), "max_position_embeddings of config.json"))
    named = tokenizer.model_max_length
    if named is not None and named < _NO_LIMIT:
        limits.append((int(named), "model_max_length of tokenizer_config.json"))
    return min(limits, default=(UNLIMITED, "nothing"))


def _yarn_length(text: PretrainedConfig) -> int:
    scaling = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    if scaling.get("rope_type", scaling.get("type")) != "yarn":
        return 0
    original = scaling.get("original_max_position_embeddings") or 0
    return int(original * float(scaling.get("factor") or 1.0))
