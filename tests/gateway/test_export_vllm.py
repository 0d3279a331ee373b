"""Exports on a real vLLM server: the PEFT folder beside the base model, and the merged folder as a model of its own."""

from __future__ import annotations

import os
from pathlib import Path

import httpx2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from small_models import exportable, layout_of

from fedmoe.gateway.export import ExportSource, export_peft
from fedmoe.gateway.export_merged import export_merged
from fedmoe.inference.vllm.server import SERVED_NAME, VllmServer, VllmSettings
from fedmoe.lora.adapter import Adapter
from fedmoe.models.base import load_base, prepare_base
from fedmoe.models.lora_layers import attach

pytestmark = pytest.mark.vllm

PROMPT = [int(token) for token in np.random.default_rng(2).integers(500, 40_000, 40)]
#: Nats; both float32 but other kernels. The merged folder keeps the base model's bfloat16: its weights are rounded.
TOLERANCE, ROUNDED = 5e-4, 5e-2
RANK = 8


@pytest.fixture(scope="module")
def source() -> ExportSource:
    base = load_base("smollm2", "cpu", "fp32")
    layout = layout_of(base.model, rank=RANK)
    flat = np.random.default_rng(0).normal(0, 0.03, layout.size).astype(np.float32)
    return exportable(prepare_base("smollm2"), Adapter(layout, 2.0 * RANK, flat))


@pytest.fixture(scope="module")
def expected(source: ExportSource) -> NDArray[np.float32]:
    """Our log-probabilities of the token after the prompt, float32 (vocabulary,)."""
    base = load_base("smollm2", "cpu", "fp32")
    attached = attach(base.model, [module.name for module in source.adapter.layout.modules], RANK, 1.0)
    attached.load(source.adapter)
    with torch.inference_mode():
        logits = base.model(torch.tensor([PROMPT])).logits[0, -1]
    return np.asarray(logits.log_softmax(-1).numpy(), np.float32)


def serve(model: Path, folder: Path) -> VllmServer:
    settings = VllmSettings(Path(os.environ["FEDMOE_VLLM_PYTHON"]), model, max_loras=1, max_rank=RANK)
    return VllmServer(settings, folder / "server.log")


def post(server: VllmServer, path: str, body: dict[str, object]) -> httpx2.Response:
    answer = httpx2.post(f"{server.url}{path}", json=body, timeout=300)
    assert answer.status_code == 200, answer.text
    return answer


def likeliest(server: VllmServer, model: str) -> dict[int, float]:
    """Log-probabilities of the likeliest tokens after the prompt, by token id."""
    body = {"model": model, "prompt": PROMPT, "max_tokens": 1, "temperature": 1.0, "logprobs": 5}
    answer = post(server, "/v1/completions", body | {"return_tokens_as_token_ids": True}).json()
    top = answer["choices"][0]["logprobs"]["top_logprobs"][0]
    return {int(name.removeprefix("token_id:")): float(logprob) for name, logprob in top.items()}


def largest_gap(found: dict[int, float], expected: NDArray[np.float32]) -> float:
    assert len(found) >= 5
    return max(abs(logprob - float(expected[token])) for token, logprob in found.items())


def test_the_peft_folder_gives_our_numbers(source: ExportSource, expected: NDArray[np.float32], tmp_path: Path) -> None:
    export_peft(source, tmp_path / "gateway")
    with serve(prepare_base("smollm2"), tmp_path) as server:
        plain = largest_gap(likeliest(server, SERVED_NAME), expected)
        post(server, "/v1/load_lora_adapter", {"lora_name": "gateway", "lora_path": str(tmp_path / "gateway")})
        assert largest_gap(likeliest(server, "gateway"), expected) < TOLERANCE
    assert plain > 0.1


def test_the_merged_folder_is_served_as_a_model(
    source: ExportSource, expected: NDArray[np.float32], tmp_path: Path
) -> None:
    export_merged(source, prepare_base("smollm2"), tmp_path / "merged")
    with serve(tmp_path / "merged", tmp_path) as server:
        assert largest_gap(likeliest(server, SERVED_NAME), expected) < ROUNDED
