"""Sixteen prompts at once to a gateway server's `auto` or `gateway`, by the package that PYTHONPATH names.

    python -P benchmarks/lib/auto_work.py OPTIONS

A line `auto` or `gateway` on the standard input sends the prompts once and answers with processor and wall seconds,
`choices` with who answered the last prompts to `auto`. Only what both revisions have is used. The experts are random
adapters, the router is made of real features of real text, so that a prompt has as many likely experts as with trained
ones; what a choice is worth is not measured here.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedmoe.gateway.serve.auto_model import PromptRouter
from fedmoe.gateway.serve.catalogue import GATEWAY, Catalogue
from fedmoe.gateway.serve.service import GenerationRequest, Limits, Service
from fedmoe.gateway.serve.text import PromptEncoder
from fedmoe.inference.backend import ServedModel
from fedmoe.inference.batching.scheduler import TransformersBackend
from fedmoe.lora.adapter import Adapter, Layout, ModuleShape
from fedmoe.lora.prompt_statistics import PromptStatistics
from fedmoe.models.base import LoadedBase, load_base, stop_tokens
from fedmoe.models.lora_layers import ALL_LINEAR, find_targets
from fedmoe.models.prompt_features import prompt_features

RANK = 16
#: Modules of the standard library, one an expert: each has a vocabulary of its own.
SUBJECTS = (
    "_pydecimal",
    "email.message",
    "tarfile",
    "turtle",
    "ast",
    "asyncio.events",
    "sqlite3.dbapi2",
    "pydoc",
    "calendar",
    "http.client",
)


def texts(base: LoadedBase, count: int, length: int) -> list[list[list[int]]]:
    """For each expert the pieces of its source text, `length` tokens each."""
    pieces = []
    for name in SUBJECTS[:count]:
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        text = Path(spec.origin).read_text("utf-8")[:40_000]
        ids = base.tokenizer(text, add_special_tokens=False)["input_ids"]
        pieces.append([ids[start : start + length] for start in range(0, len(ids) - length, length)])
    return pieces


class Served:
    """A service without a network, its experts and the prompts."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        base = load_base(options["base"], device="cpu", dtype="fp32")
        targets = find_targets(base.model, ALL_LINEAR)
        layout = Layout(tuple(ModuleShape(name, each.in_features, each.out_features) for name, each in targets), RANK)
        pieces = texts(base, options["experts"], options["length"])
        names = [f"expert-{number}" for number in range(options["experts"])]
        backend = TransformersBackend(base, [module.name for module in layout.modules], 16)
        models = {}
        for number, name in enumerate([*names, GATEWAY]):
            flat = np.random.default_rng(number).normal(0.0, options["spread"], layout.size).astype(np.float32)
            models[name] = ServedModel(name, 1, f"{number:064x}")
            backend.load(models[name], Adapter(layout, float(RANK), flat))
        catalogue = Catalogue()
        catalogue.publish(models, 1.0)
        bodies = {
            name: PromptStatistics.of(prompt_features(base, own[1::2][:64])).to_bytes()
            for name, own in zip(names, pieces, strict=True)
        }
        router = PromptRouter(base)
        assert not router.follow(dict.fromkeys(names, "1"), bodies.__getitem__)
        vocabulary = int(base.model.config.get_text_config().vocab_size)
        prompter = PromptEncoder(base.tokenizer, vocabulary, 512, stop_tokens(base))
        self.service = Service(backend, catalogue, prompter, base.identity, Limits(512, 64, 64), router, lambda: 1)
        self.tokens = int(options["tokens"])
        # Every other piece is one that the statistics have not seen.
        self.prompts = [
            tuple(pieces[place % len(pieces)][2 * (place // len(pieces))]) for place in range(options["prompts"])
        ]
        self.choices: list[str] = []

    async def ask(self, model: str, prompt: tuple[int, ...]) -> str:
        request = GenerationRequest(model, (prompt,), 1, self.tokens, 0.0, 1.0, 1, None, ())
        async with await self.service.begin(request) as active:
            async for _ in active.chunks():
                pass
            return active.origin.model

    async def together(self, model: str) -> list[str]:
        return list(await asyncio.gather(*(self.ask(model, prompt) for prompt in self.prompts)))

    def run(self, model: str) -> dict[str, float]:
        cpu, wall = time.process_time(), time.perf_counter()
        answered = asyncio.run(self.together(model))
        spent = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
        if model == "auto":
            self.choices = answered
        return spent


def main() -> None:
    torch.set_num_threads(1)
    # Libraries print what they like; answers have a stream of their own.
    answers, sys.stdout = sys.stdout, sys.stderr
    served = Served(json.loads(sys.argv[1]))
    for line in sys.stdin:
        command = line.strip()
        answer: dict[str, float] | Sequence[str] = served.choices if command == "choices" else served.run(command)
        print(json.dumps(answer), file=answers, flush=True)
    served.service.close()
    served.service.backend.close()


if __name__ == "__main__":
    main()
