"""The protocol of a gateway server's backend: streams the tokens of one version of one model."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from fedmoe.lora.adapter import Adapter

Finish = Literal["stop", "length"]


class BackendError(RuntimeError):
    """A backend that cannot generate, or does not have the version asked for."""


@dataclass(frozen=True, slots=True, order=True)
class ServedModel:
    """One version of one model by content: its name, the coordinator's version, and the digest of its weights.

    The digest is part of the identity: a coordinator that starts anew gives old version numbers to other weights.
    """

    name: str
    version: int
    digest: str

    def __str__(self) -> str:
        return f"{self.name}@{self.version}.{self.digest[:16]}"


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """How tokens are drawn: `temperature` 0 takes the likeliest; `top_p` 1 cuts nothing; `seed` fixes the draws.

    `alternatives`: how many of the likeliest tokens to report beside the one drawn; None: no log-probabilities at all.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    alternatives: int | None = None


@dataclass(frozen=True, slots=True)
class ContinuationRequest:
    """A request for one continuation; `model` None is the base model alone."""

    model: ServedModel | None
    prompt: tuple[int, ...]
    sampling: SamplingOptions


@dataclass(frozen=True, slots=True)
class Likelihood:
    """Natural log-probability of the token drawn, and the likeliest tokens with theirs, falling.

    All are the model's own: before temperature and top_p.
    """

    chosen: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class DecodingStep:
    """The next token; `finish` says that it is the last and why. A last step may come without a token.

    A token that ended the text by itself ("stop") is given like any other.
    """

    token: int | None
    finish: Finish | None = None
    likelihood: Likelihood | None = None


class Backend(Protocol):
    """A source of tokens that holds several adapters at once; `load` and `unload` may block, from any thread."""

    def load(self, model: ServedModel, adapter: Adapter) -> None:
        """Make a version available; raises BackendError for one that is there or does not fit."""

    def unload(self, model: ServedModel) -> None:
        """Release a version once nothing generates with it; new generations are refused from the call on."""

    def loaded(self) -> frozenset[ServedModel]:
        """The versions that can be generated with."""

    def generate(self, request: ContinuationRequest) -> AsyncGenerator[DecodingStep, None]:
        """The tokens as they come; closing the generator before its end gives up the rest.

        Raises BackendError for a version that is not loaded, and when generation fails.
        """

    def log_likelihoods(self, pairs: Sequence[tuple[Sequence[int], ServedModel]]) -> list[float]:
        """ln p(text[1:] | text[0]) in nats for each text under its model; may take as long as a pass over each.

        Raises BackendError for a version that is not loaded; it must stay loaded meanwhile.
        """

    def busy(self) -> tuple[int, int]:
        """How many generations are computed now, and how many wait."""

    def close(self) -> None:
        """Cancel all generations and release what the backend holds."""
