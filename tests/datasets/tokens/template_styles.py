"""Chat templates of our own that behave as those of well-known model families, and tokenizers for them.

What each does: `chatml` has a default system prompt (SmolLM2); `tools` renders calls and puts tool answers into user
turns (Qwen2.5); `thinking` drops the reasoning of earlier turns and opens an empty thought in the last (Qwen3);
`headers` has header marks, an end-of-turn mark that is not the end of text, and a role of its own for tools (Llama 3);
`brackets` has no generation prompt, wants turns to alternate and call ids (Mistral); `reasoning` opens a thought for
the answer to come and leaves it out of answered turns (DeepSeek-R1's distillates).
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

_CALLS = (
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }}{{ c.function.arguments | tojson }}</tool_call>"
    "{% endfor %}"
)
_CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_TOOLS = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}"
    "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}"
    "\n<tool_response>{{ m.content }}</tool_response>"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif %}"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}" + _CALLS + "<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_THINKING = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n"
    "{% endif %}{{ m.content.split('</think>')[-1] }}" + _CALLS + "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_HEADERS = (
    "<|begin|>{% for m in messages %}<|head|>{{ 'ipython' if m.role == 'tool' else m.role }}<|/head|>\n\n"
    "{{ m.content | trim }}" + _CALLS + "<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}"
)
_BRACKETS = (
    "<s>{% for m in messages %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
    "{% elif m.role == 'tool' %}[TOOL]{{ m.content }}[/TOOL]"
    "{% elif m.role == 'assistant' %}"
    "{% if loop.first or messages[loop.index0 - 1].role == 'assistant' %}{{ raise_exception('roles must alternate') }}"
    "{% endif %} {{ m.content }}" + _CALLS + "</s>"
    "{% else %}{{ raise_exception('no role ' + m.role) }}{% endif %}{% endfor %}"
)
_REASONING = (
    "<|begin|>{% for m in messages %}"
    "{% if m.role == 'user' %}<|User|>{{ m.content }}"
    "{% elif m.role == 'tool' %}<|Tool|>{{ m.content }}"
    "{% elif m.role == 'assistant' %}<|Assistant|>{{ m.content.split('</think>')[-1] }}" + _CALLS + "<|end|>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)


@dataclass(frozen=True)
class Style:
    """A template, its special tokens, the end of a turn, and what it puts before a learned answer of the last turn."""

    template: str
    special: tuple[str, ...]
    end_of_turn: str
    end_of_text: str
    before_last: str = ""
    before_each: str = ""
    tools: bool = True


STYLES = {
    "chatml": Style(_CHATML, ("<|im_start|>", "<|im_end|>"), "<|im_end|>", "<|im_end|>", tools=False),
    "tools": Style(_TOOLS, ("<|im_start|>", "<|im_end|>", "<|endoftext|>"), "<|im_end|>", "<|im_end|>"),
    "thinking": Style(
        _THINKING, ("<|im_start|>", "<|im_end|>"), "<|im_end|>", "<|im_end|>", before_last="<think>\n\n</think>\n\n"
    ),
    "headers": Style(_HEADERS, ("<|begin|>", "<|head|>", "<|/head|>", "<|eot|>", "<|eos|>"), "<|eot|>", "<|eos|>"),
    "brackets": Style(_BRACKETS, ("<s>", "</s>"), "</s>", "</s>", before_last=" ", before_each=" "),
    "reasoning": Style(
        _REASONING, ("<|begin|>", "<|User|>", "<|Assistant|>", "<|Tool|>", "<|end|>"), "<|end|>", "<|end|>"
    ),
}


def tokenizer_of(style: Style) -> PreTrainedTokenizerFast:
    """One token a byte, and the style's special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = RawTokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(list(style.special))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=style.end_of_text, pad_token=style.special[0])
    tokenizer.chat_template = style.template
    return tokenizer
