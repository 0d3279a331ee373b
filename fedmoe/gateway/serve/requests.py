"""Request bodies of the OpenAI interface: what is supported, in which bounds; no field is ignored silently.

Fields that only describe the caller (`user`, `metadata`) are taken; fields for what this server does not do are taken
at the values that ask for nothing, and refused otherwise.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    ValidatorFunctionWrapHandler,
    field_validator,
)

#: Continuations of one request: prompts times n.
MOST_CHOICES = 16
# Nearly 2^63, and the same for readers of JSON to whom every number is a double.
_SEED = 9_223_372_036_854_775_000


def _whole(value: object) -> object:
    """JSON has one kind of number: 7.0 is the integer 7."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


_Text = Annotated[str, StringConstraints(max_length=1 << 22)]
_Stop = Annotated[str, StringConstraints(min_length=1, max_length=256)]
_Token = Annotated[int, Field(ge=0, lt=1 << 31, strict=True), BeforeValidator(_whole)]
_Nothing = Annotated[dict[str, float], Field(max_length=0)] | None


class _RequestModel(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class StreamOptions(_RequestModel):
    """What comes with a stream."""

    include_usage: bool = False


class ResponseFormat(_RequestModel):
    """Plain text is the only form there is."""

    type: Literal["text"]


class _GenerationFields(_RequestModel):
    """Fields of both kinds of request."""

    model: Annotated[str, StringConstraints(min_length=1, max_length=200)]
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: _Stop | Annotated[list[_Stop], Field(max_length=4)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-_SEED, le=_SEED)] | None = None
    user: Annotated[str, StringConstraints(max_length=1000)] | None = None
    # At these values only they ask for nothing.
    frequency_penalty: Literal[0] | Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Literal[0] | Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: _Nothing = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def contradiction(self) -> str | None:
        """How two fields contradict each other, which no schema tells."""
        return "stream_options needs stream: true" if self.stream_options is not None and not self.stream else None


class TextPart(_RequestModel):
    """A part of a message; text is the only kind there is."""

    type: Literal["text"]
    text: _Text


class ChatMessage(_RequestModel):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: _Text | Annotated[list[TextPart], Field(min_length=1)]
    name: Annotated[str, StringConstraints(max_length=200)] | None = None
    # A client that sends an answer back sends these along.
    refusal: None = None
    tool_calls: Annotated[list[str], Field(max_length=0)] | None = None
    function_call: None = None
    audio: None = None
    annotations: Annotated[list[str], Field(max_length=0)] | None = None

    def plain(self) -> dict[str, str]:
        """Role and text, as chat templates read them."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": content}


class ChatRequest(_GenerationFields):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[str], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    store: Literal[False] | None = None
    metadata: dict[str, str] | None = None

    @property
    def most_new_tokens(self) -> int | None:
        """The limit the client set, if any."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """As in `Sampling`."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def contradiction(self) -> str | None:
        """How two fields contradict each other, which no schema tells."""
        if self.top_logprobs is not None and not self.logprobs:
            return "top_logprobs needs logprobs: true"
        return super().contradiction


class CompletionRequest(_GenerationFields):
    """`POST /v1/completions`."""

    prompt: (
        _Text
        | Annotated[list[_Text], Field(min_length=1, max_length=MOST_CHOICES)]
        | Annotated[list[_Token], Field(min_length=1)]
        | Annotated[list[Annotated[list[_Token], Field(min_length=1)]], Field(min_length=1, max_length=MOST_CHOICES)]
    )
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: Literal[False] | None = None
    suffix: None = None
    best_of: Literal[1] | None = None

    @field_validator("prompt", mode="wrap")
    @classmethod
    def _one_of_four_kinds(cls, value: object, check: ValidatorFunctionWrapHandler) -> object:
        try:
            return check(value)
        except ValidationError:
            # Of a union, pydantic would tell what each kind lacks, one after the other.
            raise ValueError(
                f"a prompt is a text or a list of token ids, neither empty, or a list of at most {MOST_CHOICES} of them"
            ) from None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts one by one, as text or as tokens."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [[token for token in self.prompt if isinstance(token, int)]]
        return self.prompt
