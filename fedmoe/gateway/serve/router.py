"""The router of the model `auto`, as the server sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from fedmoe.gateway.rerank import Candidates


class Router(Protocol):
    """Knows who may answer a request to the model `auto`; any thread may ask while another brings it up to date."""

    @property
    def experts(self) -> tuple[str, ...]:
        """The experts it chooses between; fewer than two: there is no model `auto`."""
        ...

    def candidates(self, prompt: Sequence[int]) -> Candidates | None:
        """The likely experts, None while there are not two; may take as long as a pass over the prompt."""
        ...

    def follow(self, listed: Mapping[str, str], fetch: Callable[[str], bytes]) -> Mapping[str, str]:
        """Choose from now on between the experts in `listed`, by the prompt statistics that the values name.

        `fetch` gets an expert's, and is asked for new ones only. Returns why an expert is left out, by name; what
        `fetch` raises for an expert leaves that one out.
        """
        ...
