"""Versions arrive under load: nothing fails, nothing is mixed, and what is old is gone at the end."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import pytest
import torch
from serve_house import EXPERTS, Alone, Client, Served, serving

from fedmoe.gateway.serve.service import Limits
from fedmoe.inference.batching import sampler, scheduler

CLIENTS, TOKENS = 8, 12


@pytest.mark.parametrize(("requests", "versions"), [(50, 4), pytest.param(200, 10, marks=pytest.mark.slow)])
def test_requests_while_versions_arrive(tmp_path: Path, requests: int, versions: int) -> None:
    with serving(tmp_path, Limits(64, 64, 64)) as served, served.client() as client:
        done: list[tuple[str, dict[str, object], str]] = []

        def push_versions() -> None:
            """One after the other, spread over the requests."""
            for version in range(versions):
                while len(done) < version * requests // (versions + 1):
                    time.sleep(0.002)
                served.push(EXPERTS[version % 2], 1000 + version)

        pushing = threading.Thread(target=push_versions)
        pushing.start()
        with ThreadPoolExecutor(CLIENTS) as pool:
            # `map` raises what any of them raised: there are no errors.
            for answer in pool.map(lambda index: ask(client, index), range(requests)):
                done.append(answer)
        pushing.join()
        assert len(done) == requests
        assert_not_mixed(served, done, versions)
        assert_old_versions_go(served)


def ask(client: Client, index: int) -> tuple[str, dict[str, object], str]:
    """One greedy answer, every other one streamed: its prompt, who the server says made it, its text."""
    name = random.Random(index).choice(["gateway", *EXPERTS])
    prompt = "ab" * (1 + index % 5)
    if index % 2:
        chunks = list(
            client.completions.create(model=name, prompt=prompt, temperature=0, max_tokens=TOKENS, stream=True)
        )
        origin = (chunks[0].model_extra or {})["fedmoe"]
        return prompt, origin, "".join(chunk.choices[0].text for chunk in chunks)
    answer = client.completions.create(model=name, prompt=prompt, temperature=0, max_tokens=TOKENS)
    return prompt, (answer.model_extra or {})["fedmoe"], answer.choices[0].text


def assert_not_mixed(served: Served, done: list[tuple[str, dict[str, object], str]], versions: int) -> None:
    """Every text is what the version it names says alone; other versions would have said something else."""
    alone = Alone()
    expected: dict[tuple[str, str], str] = {}
    for prompt, origin, text in done:
        digest = str(origin["digest"])
        if (prompt, digest) not in expected:
            tokens = alone.tokens(served.adapters[digest], alone.base.tokenizer(prompt)["input_ids"], TOKENS)
            expected[prompt, digest] = alone.text(tokens)
        assert text == expected[prompt, digest]
    used = {digest for _, digest in expected}
    assert len(used) > versions, "too few versions were met by a request: the test says little"
    for prompt in {prompt for prompt, _ in expected}:
        texts = [text for (asked, _), text in expected.items() if asked == prompt]
        assert len(set(texts)) > len(texts) // 2


def assert_old_versions_go(served: Served) -> None:
    coordinator = served.house.service.coordinator
    newest = {coordinator.gateway().digest, *(expert.digest for expert in coordinator.experts.values())}
    deadline = time.monotonic() + 20
    while {model.digest for model in served.backend.loaded()} != newest and time.monotonic() < deadline:
        time.sleep(0.01)
    assert {model.digest for model in served.backend.loaded()} == newest
    assert {model.digest for model in served.service.catalogue.snapshot.models.values()} == newest


def test_an_answer_ends_on_the_version_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 81."""
    overtaken, steps, draw = threading.Event(), count(), sampler.draw

    def waiting_draw(logits: torch.Tensor, rows: Sequence[sampler.BatchRow]) -> frozenset[int]:
        """The model waits after its fifth token: on busy cores the answer would be there before the version."""
        if next(steps) == 5:
            assert overtaken.wait(60)
        return draw(logits, rows)

    monkeypatch.setattr(scheduler, "draw", waiting_draw)
    with serving(tmp_path, Limits(64, 256, 64)) as served, served.client() as client:
        settings = {"model": "python", "prompt": "abc", "temperature": 0, "max_tokens": 256, "stream": True}
        with client.completions.create(**settings) as stream:
            chunks = iter(stream)
            first = next(chunks)
            before = str(first.model_extra["fedmoe"]["digest"])
            served.push("python", 77)
            while served.service.catalogue.snapshot.models["python"].digest == before:
                time.sleep(0.002)
            held, running = served.backend.loaded(), served.backend.busy()[0]
            overtaken.set()
            text = first.choices[0].text + "".join(chunk.choices[0].text for chunk in chunks)
        alone = Alone()
        tokens = alone.tokens(served.adapters[before], alone.base.tokenizer("abc")["input_ids"], 256)
        assert text == alone.text(tokens)
        assert running == 1, "it ended too soon to be overtaken"
        assert before in {model.digest for model in held}
        assert_old_versions_go(served)
