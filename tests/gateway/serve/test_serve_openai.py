"""The server as the official `openai` client sees it, over a real socket."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import numpy as np
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel
from serve_house import EXPERTS, Alone, Client, Served, serving, tiny_layout

from fedmoe.gateway.routers import ExpertCandidates
from fedmoe.gateway.serve.service import Limits
from fedmoe.inference.backend import ServedModel
from fedmoe.lora.adapter import Adapter

HELLO = [{"role": "user", "content": "Hello"}]


class FirstLetter:
    """Routes by the last token of the prompt."""

    experts = EXPERTS

    def candidates(self, prompts: Sequence[Sequence[int]]) -> list[ExpertCandidates] | None:
        return [self.by_letter(prompt) for prompt in prompts]

    def by_letter(self, prompt: Sequence[int]) -> ExpertCandidates:
        letter = Alone().base.tokenizer.decode(prompt[-1:])
        if letter == "t":
            # So unlikely that the gateway answers, whatever the likelihoods are.
            return ExpertCandidates(tuple(prompt), {"python": -1e6, "sql": -1e6})
        return ExpertCandidates(tuple(prompt), {{"p": "python", "n": "nobody"}[letter]: 1e6})

    def follow(self, listed: Mapping[str, str], fetch: Callable[[str], bytes]) -> Mapping[str, str]:
        return {}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    limits = Limits(prompt_tokens=256, output_tokens=64, generations=16)
    with serving(tmp_path_factory.mktemp("serve"), limits, router=FirstLetter()) as running:
        yield running


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[Client]:
    with served.client() as made:
        yield made


@pytest.fixture(scope="module")
def alone() -> Alone:
    return Alone()


def extra(answer: BaseModel) -> dict[str, object]:
    found = (answer.model_extra or {})["fedmoe"]
    assert isinstance(found, dict)
    return found


def test_all_models_are_listed_with_version_and_digest(client: Client, served: Served) -> None:
    cards = {card.id: extra(card) for card in client.models.list()}
    assert list(cards) == ["auto", "base", "gateway", *EXPERTS]
    coordinator = served.house.service.coordinator
    for name in EXPERTS:
        expert = coordinator.expert(name)
        assert (cards[name]["version"], cards[name]["digest"]) == (expert.version, expert.digest)
    assert cards["gateway"]["digest"] == coordinator.gateway().digest
    assert client.models.retrieve("python").id == "python"


@pytest.mark.parametrize("name", ["gateway", "python", "sql", "base"])
def test_a_greedy_chat_is_what_the_named_version_says_alone(
    client: Client, served: Served, alone: Alone, name: str
) -> None:
    answer = client.chat.completions.with_raw_response.create(
        model=name, messages=HELLO, temperature=0, max_completion_tokens=12
    )
    parsed, origin = answer.parse(), extra(answer.parse())
    adapter = served.adapters.get(str(origin["digest"]))
    assert (adapter is None) == (name == "base")
    expected = alone.tokens(adapter, alone.chat("Hello"), 12)
    assert parsed.choices[0].message.content == alone.text(expected)
    assert parsed.choices[0].message.role == "assistant"
    assert parsed.usage.completion_tokens == len(expected)
    assert parsed.usage.prompt_tokens == len(alone.chat("Hello"))
    assert parsed.usage.total_tokens == len(expected) + len(alone.chat("Hello"))
    assert answer.headers["x-fedmoe-model"] == name == parsed.model == origin["model"]
    assert answer.headers["x-fedmoe-version"] == str(origin["version"])
    assert answer.headers["x-fedmoe-digest"] == origin["digest"]
    assert origin["base"] == alone.base.identity.weights_hash
    assert origin["gateway_version"] == served.house.service.coordinator.gateway().version


def test_the_models_say_different_things(client: Client) -> None:
    texts = {
        client.completions.create(model=name, prompt="abc", temperature=0, max_tokens=16).choices[0].text
        for name in ("gateway", "python", "sql", "base")
    }
    assert len(texts) == 4


def test_a_stream_is_the_answer_in_pieces(client: Client) -> None:
    settings = {"model": "gateway", "messages": HELLO, "temperature": 0.8, "seed": 3, "max_tokens": 20}
    whole = client.chat.completions.create(**settings)
    chunks = list(client.chat.completions.create(**settings, stream=True, stream_options={"include_usage": True}))
    assert extra(chunks[0]) == extra(whole)
    assert chunks[0].choices[0].delta.role == "assistant"
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert said == whole.choices[0].message.content
    finishes = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert finishes[-1] == whole.choices[0].finish_reason
    assert set(finishes[:-1]) == {None}
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_streamed_text_is_the_text(client: Client) -> None:
    settings = {"model": "python", "prompt": "def f", "temperature": 0.5, "seed": 9, "max_tokens": 24}
    whole = client.completions.create(**settings)
    chunks = list(client.completions.create(**settings, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert extra(chunks[0]) == extra(whole)


def test_the_seed_fixes_the_draw(client: Client) -> None:
    settings = {"model": "sql", "prompt": "select", "temperature": 0.9, "max_tokens": 16}
    first, again, other = (client.completions.create(**settings, seed=seed) for seed in (5, 5, 6))
    assert first.choices[0].text == again.choices[0].text != other.choices[0].text
    assert first.system_fingerprint == again.system_fingerprint


def test_without_a_seed_answers_differ(client: Client) -> None:
    texts = {client.completions.create(model="base", prompt="x", max_tokens=12).choices[0].text for _ in range(4)}
    assert len(texts) > 1


def test_a_tiny_top_p_is_greedy(client: Client) -> None:
    settings = {"model": "python", "prompt": "abc", "max_tokens": 10}
    greedy = client.completions.create(**settings, temperature=0)
    nucleus = client.completions.create(**settings, temperature=1.5, top_p=1e-6, seed=1)
    assert nucleus.choices[0].text == greedy.choices[0].text


def test_a_stop_string_ends_the_text_before_itself_streamed_or_not(client: Client) -> None:
    settings = {"model": "gateway", "prompt": "abc", "temperature": 0, "max_tokens": 40}
    full = client.completions.create(**settings).choices[0].text
    stop = full[10:13]
    cut = client.completions.create(**settings, stop=[stop, "never there"])
    assert cut.choices[0].text == full[: full.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    chunks = list(client.completions.create(**settings, stop=stop, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == cut.choices[0].text
    assert chunks[-1].choices[0].finish_reason == "stop"
    # What was drawn after the stop string was complete is nobody's.
    assert cut.usage.completion_tokens < 40


def test_n_gives_as_many_choices_each_with_its_own_draw(client: Client) -> None:
    answer = client.chat.completions.create(model="python", messages=HELLO, n=3, seed=1, max_tokens=10)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in answer.choices}) == 3
    second = client.chat.completions.create(model="python", messages=HELLO, seed=2, max_tokens=10)
    assert second.choices[0].message.content == answer.choices[1].message.content
    chunks = client.chat.completions.create(model="python", messages=HELLO, n=3, seed=1, max_tokens=10, stream=True)
    said = ["", "", ""]
    for chunk in chunks:
        said[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert said == [choice.message.content for choice in answer.choices]


def test_prompts_come_as_text_or_tokens_one_or_several(client: Client, alone: Alone) -> None:
    tokens = alone.base.tokenizer("abc")["input_ids"]
    prompts: list[object] = ["abc", tokens, ["abc", "abd"], [tokens, tokens]]
    texts = []
    for prompt in prompts:
        answer = client.completions.create(model="sql", prompt=prompt, temperature=0, max_tokens=8)
        texts.append([choice.text for choice in answer.choices])
    assert [len(one) for one in texts] == [1, 1, 2, 2]
    assert texts[0][0] == texts[1][0] == texts[2][0] == texts[3][0] == texts[3][1] != texts[2][1]


def test_log_probabilities_are_the_models_own(client: Client) -> None:
    answers = [
        client.chat.completions.create(
            model="python", messages=HELLO, temperature=t, seed=4, max_tokens=1, logprobs=True, top_logprobs=5
        )
        for t in (0.0, 1.7)
    ]
    greedy, drawn = (answer.choices[0].logprobs.content[0] for answer in answers)
    assert len(greedy.top_logprobs) == 5
    assert greedy.top_logprobs[0].logprob == greedy.logprob
    values = [one.logprob for one in greedy.top_logprobs]
    assert values == sorted(values, reverse=True)
    assert [one.logprob for one in drawn.top_logprobs] == pytest.approx(values, abs=1e-4)
    assert drawn.logprob <= greedy.logprob
    text = client.completions.create(model="python", prompt="a", temperature=0, max_tokens=3, logprobs=2)
    found = text.choices[0].logprobs
    assert len(found.tokens) == len(found.token_logprobs) == 3
    assert [max(top.values()) for top in found.top_logprobs] == pytest.approx(found.token_logprobs)
    streamed = client.chat.completions.create(
        model="python", messages=HELLO, temperature=0, max_tokens=4, logprobs=True, stream=True
    )
    counted = [len(c.choices[0].logprobs.content) for c in streamed if c.choices[0].logprobs is not None]
    assert sum(counted) == 4


def test_auto_asks_the_router_and_says_who_answered(client: Client) -> None:
    routed = client.completions.create(model="auto", prompt="help", temperature=0, max_tokens=4)
    assert routed.model == extra(routed)["model"] == "python"
    undecided = client.completions.create(model="auto", prompt="halt", temperature=0, max_tokens=4)
    assert undecided.model == "gateway"


def test_a_router_that_names_nobody_is_an_error(client: Client) -> None:
    with pytest.raises(openai.InternalServerError, match="'nobody', which is not served"):
        client.completions.create(model="auto", prompt="n", max_tokens=4)


def test_an_unknown_model_is_not_found_and_says_what_there_is(client: Client) -> None:
    """Fault 80."""
    with pytest.raises(openai.NotFoundError, match="gateway, python, sql") as error:
        client.chat.completions.create(model="gpt-4", messages=HELLO)
    assert (error.value.code, error.value.param) == ("model_not_found", "model")


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": 3}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"max_tokens": 65}, "at most 64 tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": ""}, "stop"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"top_logprobs": 3}, "top_logprobs needs logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options needs stream"),
        ({"extra_body": {"best_of_breed": 1}}, "best_of_breed is not supported"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages.0"),
        ({"messages": [{"role": "user", "content": "x" * 300}]}, "256 tokens here, got 3"),
        ({"messages": [{"role": "user", "content": "x" * 20000}]}, "256 tokens here, got 20000 characters"),
    ],
)
def test_what_is_not_supported_is_refused_and_named(client: Client, wrong: dict[str, object], says: str) -> None:
    """Fault 80."""
    with pytest.raises(openai.BadRequestError, match=says) as error:
        client.chat.completions.create(**{"model": "gateway", "messages": HELLO, **wrong})
    assert error.value.type == "invalid_request_error"
    assert error.value.code


def test_what_asks_for_nothing_is_taken(client: Client) -> None:
    answer = client.chat.completions.create(
        model="gateway",
        messages=[{"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]}],
        presence_penalty=0,
        frequency_penalty=0.0,
        logit_bias={},
        response_format={"type": "text"},
        user="somebody",
        metadata={"a": "b"},
        store=False,
        temperature=0,
        max_tokens=5,
    )
    plain = client.chat.completions.create(model="gateway", messages=HELLO, temperature=0, max_tokens=5)
    assert answer.choices[0].message.content == plain.choices[0].message.content


@pytest.mark.parametrize("prompt", [[], [[]], [-1], {"a": 1}, ["a", 5], ["a"] * 17])
def test_what_is_no_prompt_is_told_what_one_is(served: Served, prompt: object) -> None:
    with httpx2.Client(base_url=served.url) as http:
        answer = http.post("/v1/completions", json={"model": "python", "prompt": prompt})
    assert answer.status_code == 400
    told = answer.json()["error"]
    assert told["param"] == "prompt"
    assert told["message"].startswith("prompt: a prompt is a text or a list of token ids, neither empty, or a list of")


@pytest.mark.parametrize("prompt", [[5, 300], "", []])
def test_prompts_that_are_none_are_refused(client: Client, prompt: object) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model="gateway", prompt=prompt)
    assert error.value.param == "prompt"


def test_errors_outside_the_interface_have_its_form(served: Served) -> None:
    with httpx2.Client(base_url=served.url) as http:
        for answer, status in (
            (http.get("/v1/nothing"), 404),
            (http.get("/v1/completions"), 405),
            (http.post("/v1/completions", content=b"{"), 400),
            (http.post("/v1/completions", content=b"[]", headers={"content-type": "application/json"}), 400),
            (http.post("/v1/completions", content=b"x" * (2 << 20)), 413),
            (http.get("/v1/models", headers={"host": "evil.example"}), 421),
        ):
            assert answer.status_code == status
            told = answer.json()["error"]
            assert set(told) == {"message", "type", "param", "code"}
            assert told["message"]


def test_more_than_fits_is_refused_and_comes_again_later(served: Served, client: Client) -> None:
    # 16 choices fill the house; the next request finds no place while they are under way.
    """Fault 80."""
    with client.completions.create(model="base", prompt="abc", n=16, max_tokens=64, stream=True) as stream:
        next(iter(stream))
        with pytest.raises(openai.RateLimitError, match="at most 16 may") as error:
            client.completions.create(model="base", prompt="abc")
        assert error.value.response.headers["retry-after"] == "1"
        for _ in stream:
            pass
    assert client.completions.create(model="base", prompt="abc", max_tokens=1).usage is not None


def test_a_client_that_goes_away_gives_its_place_back(served: Served, client: Client) -> None:
    """Fault 80."""
    with client.completions.create(model="python", prompt="abc", n=8, max_tokens=64, stream=True) as stream:
        next(iter(stream))
    assert_idle(served)
    body = {"model": "python", "prompt": "abc", "n": 16, "max_tokens": 64}
    with httpx2.Client(base_url=served.url, timeout=0.05) as impatient, pytest.raises(httpx2.ReadTimeout):
        impatient.post("/v1/completions", json=body)
    assert_idle(served)
    ended = served.service.counters.requests
    assert ended["python", "broken_off"] >= 2


def assert_idle(served: Served) -> None:
    """Soon nothing is computed, and there is room for as many as ever."""
    deadline = time.monotonic() + 20
    while (served.backend.busy() != (0, 0) or served.service._admitted) and time.monotonic() < deadline:
        time.sleep(0.005)
    assert served.backend.busy() == (0, 0)
    assert served.service._admitted == 0


def test_requests_for_all_models_at_once_are_answered_as_alone(client: Client, served: Served, alone: Alone) -> None:
    def ask(index: int) -> tuple[int, str, dict[str, object]]:
        name = ("gateway", "python", "sql", "base")[index % 4]
        prompt = "x" * (1 + 7 * index)
        answer = client.completions.create(model=name, prompt=prompt, temperature=0, max_tokens=4 + 3 * index)
        return index, answer.choices[0].text, extra(answer)

    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(ask, range(12)))
    for index, text, origin in found:
        prompt = alone.base.tokenizer("x" * (1 + 7 * index))["input_ids"]
        adapter = served.adapters.get(str(origin["digest"]))
        assert text == alone.text(alone.tokens(adapter, prompt, 4 + 3 * index))


def test_health_and_counters(served: Served, client: Client) -> None:
    client.completions.create(model="sql", prompt="abc", max_tokens=3)
    with httpx2.Client(base_url=served.url) as http:
        health = http.get("/healthz")
        assert health.json()["status"] == "ok"
        assert http.head("/healthz").status_code == http.head("/readyz").status_code == 200
        assert http.get("/readyz").json() == {"status": "ready"}
        page = http.get("/metrics").text
    lines = dict(line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#"))
    assert float(lines['fedmoe_serve_requests_total{ended="complete",model="sql"}']) >= 1
    assert float(lines["fedmoe_serve_completion_tokens_total"]) >= 3
    assert float(lines['fedmoe_serve_model_version{model="sql"}']) == 1
    requests = sum(float(value) for name, value in lines.items() if name.startswith("fedmoe_serve_requests_total"))
    assert float(lines["fedmoe_serve_request_duration_seconds_count"]) == requests
    assert 1 <= float(lines["fedmoe_serve_first_token_seconds_count"]) <= requests
    families = {family.name: family.type for family in text_string_to_metric_families(page)}
    text = (Path(__file__).parents[3] / "docs" / "metrics.md").read_text()
    listed = re.findall(r"^\| `(fedmoe_serve_\w+?)(?:_total)?` \| (\w+)", text, re.MULTILINE)
    assert dict(listed) == families
    assert all(math.isfinite(float(value)) for value in lines.values())


def test_an_adapter_that_overflows_fails_its_own_request_only(served: Served, client: Client) -> None:
    broken = ServedModel("broken", 1, "f" * 64)
    served.backend.load(broken, Adapter(tiny_layout(), 8.0, np.full(tiny_layout().size, 1e30, np.float32)))
    before = served.service.catalogue.snapshot.models
    served.watcher.close()
    served.service.catalogue.publish({**before, "broken": broken}, 1.0)
    with ThreadPoolExecutor(2) as pool:
        good = pool.submit(client.completions.create, model="python", prompt="abc", max_tokens=40, temperature=0)
        with pytest.raises(openai.InternalServerError, match="not finite"):
            client.completions.create(model="broken", prompt="abc", max_tokens=4)
        assert good.result().choices[0].finish_reason in ("stop", "length")
    stream = client.completions.create(model="broken", prompt="abc", max_tokens=4, stream=True)
    with stream, pytest.raises(openai.APIError, match="not finite"):
        list(stream)
