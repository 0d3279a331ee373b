"""The vLLM server in memory, with its streams of server-sent events."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import fake_vllm
import httpx2
from fake_vllm import FakeVllm

from fedmoe.inference.verify import Probe
from fedmoe.inference.vllm.backend import VllmBackend
from fedmoe.inference.vllm.engine import VllmEngine
from fedmoe.lora.adapter import Adapter, FloatArray

PROMPTS = ((3, 1, 4), (2, 7))


@dataclass
class StreamingFakeVllm(FakeVllm):
    """`say` replaces the model named in streams; `cut` ends streams after so many events, without a finish.

    Streams wait while `flowing` is clear.
    """

    say: str | None = None
    cut: int | None = None
    flowing: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.flowing.set()

    def _completion(self, body: Mapping[str, object], number: int) -> httpx2.Response:
        plain = {**body, "logprobs": body["logprobs"] if body["logprobs"] is not None else 0}
        if body.get("top_p") != 1.0 and float(str(body["top_p"])) < 0.01:
            plain["temperature"] = 0.0  # the likeliest token alone is in so small a nucleus
        if body.get("stream"):
            assert self.flowing.wait(20), "a test kept a stream waiting for ever"
        answer = super()._completion(plain, number)
        if not body.get("stream") or answer.status_code != 200:
            return answer
        (choice,) = json.loads(answer.content)["choices"]
        events = list(_events(self.say or str(body["model"]), choice, body["logprobs"] is not None))
        lines = [f"data: {json.dumps(event)}\n\n" for event in events[: self.cut]] + ["data: [DONE]\n\n"]
        return httpx2.Response(200, text="".join(lines), headers={"content-type": "text/event-stream"})


def _events(model: str, choice: dict[str, object], wanted: bool) -> Iterator[dict[str, object]]:
    """Two tokens an event, as the server sends them when it is faster than its reader; the reason comes last."""
    tokens, logprobs = choice["token_ids"], choice["logprobs"]
    assert isinstance(tokens, list)
    assert isinstance(logprobs, dict)
    for start in range(0, len(tokens), 2):
        part = {kind: logprobs[kind][start : start + 2] for kind in ("token_logprobs", "top_logprobs")}
        last = start + 2 >= len(tokens)
        yield {
            "model": model,
            "choices": [
                {
                    "index": 0,
                    "text": "",
                    "token_ids": tokens[start : start + 2],
                    "logprobs": part if wanted else None,
                    "finish_reason": choice["finish_reason"] if last else None,
                }
            ],
        }


def fake_backend(fake: StreamingFakeVllm, folder: Path) -> VllmBackend:
    engine = VllmEngine("http://fake", fake_vllm.MODEL, folder, transport=fake.transport)

    def reference(adapter: Adapter | None, wanted: Sequence[Probe]) -> list[FloatArray]:
        return [fake_vllm.expected_scores(adapter, probe.prompt, probe.tokens) for probe in wanted]

    return VllmBackend(engine, reference, PROMPTS, rows=4)
