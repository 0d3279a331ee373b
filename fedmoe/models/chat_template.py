"""Chat template given in place of the tokenizer's own, its fixed arguments, and checks of both."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fedmoe.datasets.readers.text_rows import decode_json
from fedmoe.models.identity import BaseModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Advice where a template is the trouble.
OTHER_TEMPLATE = "give one with --chat-template FILE (in an arena's configuration: chat_template)"
# What rows and callers decide; a fixed value would overrule them without a word.
_NOT_FIXED = frozenset({"messages", "tools", "add_generation_prompt", "continue_final_message"})
_OWN_NAMES = frozenset({"raise_exception", "strftime_now", "bos_token", "eos_token", "pad_token", "unk_token"})
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_ASKED, _ANSWERED = "Ksaunpq one", "Vrelomti two"


class _Generation(Extension):
    """The tag `{% generation %}` of transformers, which marks answers."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@dataclass(frozen=True)
class ChatTemplate:
    """A template to use instead of the tokenizer's own (None: that one), and arguments that it always gets."""

    text: str | None = None
    kwargs: Mapping[str, object] = field(default_factory=dict)

    @classmethod
    def from_options(cls, file: str | Path | None, kwargs: str | Mapping[str, object] | None) -> ChatTemplate:
        """From the options: a Jinja file, and a JSON object as text or as it is; BaseModelError for what is neither."""
        values = _arguments(kwargs) if isinstance(kwargs, str) else dict(kwargs or {})
        for name in values:
            if name in _NOT_FIXED or not _NAME.fullmatch(name):
                raise BaseModelError(
                    f"the chat template's arguments cannot set {name!r}: every conversation decides it"
                )
        return cls(None if file is None else _read(Path(file).expanduser()), values)

    def apply(self, tokenizer: PreTrainedTokenizerBase, where: str) -> None:
        """Make it the tokenizer's template; `where` names the tokenizer in errors.

        The arguments become `set` statements at the template's head, so that whoever renders by this tokenizer has
        them. Raises BaseModelError for an argument that the template never asks for.
        """
        if self.text is not None:
            tokenizer.chat_template = self.text
        if not self.kwargs:
            return
        texts = templates_of(tokenizer)
        if not texts:
            raise BaseModelError(f"{where} has no chat template that the arguments could go to; {OTHER_TEMPLATE}")
        used = frozenset().union(*(variables(text, where) for text in texts.values()))
        unknown = sorted(self.kwargs.keys() - used)
        if unknown:
            asked = ", ".join(sorted(used - _NOT_FIXED - _OWN_NAMES)) or "none"
            raise BaseModelError(
                f"the chat template of {where} never asks for the argument {', '.join(unknown)}; it asks for: {asked}"
            )
        # The newline ends with the block and leaves the template's own first line at the start of a line.
        head = "".join(f"{{% set {name} = {_literal(value)} %}}" for name, value in self.kwargs.items()) + "\n"
        baked = {name: head + text for name, text in texts.items()}
        tokenizer.chat_template = baked if isinstance(tokenizer.chat_template, dict) else baked["default"]


def variables(template: str, where: str) -> frozenset[str]:
    """The variables that a template expects from its caller; raises BaseModelError where it is no Jinja template."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    try:
        environment.from_string(template)
        return frozenset(find_undeclared_variables(environment.parse(template)))
    except (TemplateError, RecursionError) as error:
        place = f" (line {line})" if (line := getattr(error, "lineno", None)) else ""
        raise BaseModelError(
            f"the chat template of {where} is no Jinja template: {error}{place}; mend it, or {OTHER_TEMPLATE}"
        ) from error


def templates_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """The tokenizer's templates by name; the one for conversations without tools is `default`."""
    own = getattr(tokenizer, "chat_template", None)
    if isinstance(own, dict):
        return {str(name): str(text) for name, text in own.items()}
    return {"default": str(own)} if own else {}


def template_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """The sha256 of the template that conversations are rendered by, or `none`."""
    texts = templates_of(tokenizer)
    return hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest() if texts else "none"


def rendered(
    tokenizer: PreTrainedTokenizerBase, answered: bool, template: str | None = None
) -> tuple[str, str, str] | str:
    """Render one conversation: the text before the question's words, from there to the end, after the answer's words.

    A template that refuses this conversation gives its reason (a str) instead. Where the words do not appear, the
    first part is all of the text and the others are empty.
    """
    turns = [{"role": "user", "content": _ASKED}, {"role": "assistant", "content": _ANSWERED}][: 1 + answered]
    settings = {"tokenize": False, "add_generation_prompt": not answered, "chat_template": template}
    try:
        text = str(tokenizer.apply_chat_template(turns, **settings))
    except Exception as error:  # templates are programs of their own and raise what they like
        return f"{type(error).__name__}: {error}"
    if _ASKED not in text or (answered and _ANSWERED not in text):
        return text, "", ""
    start = text.index(_ASKED)
    after = text[text.rindex(_ANSWERED) + len(_ANSWERED) :] if answered else ""
    return text[:start], text[start:], after


def _read(file: Path) -> str:
    try:
        text = file.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise BaseModelError(f"the chat template file {file} is not UTF-8 text; give a Jinja file") from error
    except OSError as error:
        raise BaseModelError(f"the chat template file {file} cannot be read: {error.strerror}") from error
    try:
        is_json = isinstance(json.loads(text), dict | list | str)
    except ValueError:
        is_json = False
    if is_json:
        raise BaseModelError(
            f"the chat template file {file} is JSON; give the template itself in a file of its own, such as a model's "
            "chat_template.jinja"
        )
    if "messages" not in variables(text, str(file)):
        raise BaseModelError(
            f"the chat template file {file} never asks for `messages`, so every conversation would read alike; give a "
            "Jinja template such as a model's chat_template.jinja"
        )
    return text


def _arguments(text: str) -> dict[str, object]:
    try:
        values = decode_json(text)
    except ValueError as error:
        raise BaseModelError(f"--chat-template-kwargs is no JSON: {error}; got {text[:80]!r}") from error
    if not isinstance(values, dict):
        raise BaseModelError(
            f'--chat-template-kwargs takes a JSON object, for example {{"enable_thinking": false}}; got {text[:80]!r}'
        )
    return values


def _literal(value: object) -> str:
    """A JSON value as Jinja writes it: as JSON does, but for null."""
    if value is None:
        return "none"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_literal(str(name))}: {_literal(inner)}" for name, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_literal, value)) + "]"
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError):
        raise BaseModelError(f"the chat template's arguments hold {str(value)[:40]}, which is no JSON value") from None
