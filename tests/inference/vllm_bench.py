"""What tests of the vLLM engine share: policies, a prompt, and a look at what an engine left where."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fake_vllm import FakeVllm

from fedmoe.inference.engine import AdapterKey, SampleRequest
from fedmoe.inference.vllm.engine import VllmEngine

ONE, TWO = AdapterKey("poet", 0), AdapterKey("critic", 0)
PROMPT = (3, 1, 4, 1, 5)
#: The live server has room for this many policies, versions and ranks.
POLICIES, STALENESS, RANK = 3, 1, 8
Make = Callable[..., VllmEngine]


def request(key: AdapterKey | None, seed: int = 0, temperature: float = 1.0, tokens: int = 8) -> SampleRequest:
    return SampleRequest(key, PROMPT, tokens, temperature, seed)


def folders(tmp_path: Path, folder: str = "adapters") -> list[str]:
    return sorted(path.name for path in (tmp_path / folder).iterdir() if path.is_dir())


def loads(fake: FakeVllm) -> list[str]:
    """Every name that was loaded, in order."""
    return [str(body["lora_name"]) for body in fake.bodies("/v1/load_lora_adapter") if body["lora_name"]]


def served(fake: FakeVllm) -> list[str]:
    """The keys of the policies' versions on the server."""
    return [name.rpartition(".")[0] for name in fake.adapters if not name.startswith("zeros@")]
