"""The model `auto` on real features: prompts like those of an expert's worker go to that expert."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import wait_until
from live import push_headers
from serve_house import Served, serving, tiny

from fedmoe.gateway.routers import SequenceRouter, choose
from fedmoe.gateway.serve.auto_model import PromptRouter
from fedmoe.gateway.serve.service import Limits
from fedmoe.lora.adapter import Adapter
from fedmoe.lora.prompt_statistics import PromptStatistics
from fedmoe.models.multilora import MultiLora
from fedmoe.models.prompt_features import prompt_features
from fedmoe.runtime.errors import RefusedError

LETTERS = {"python": range(97, 107), "sql": range(48, 58), "law": range(65, 75)}


def prompts(expert: str, seed: int, count: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.choice(list(LETTERS[expert]), 24).tolist() for _ in range(count)]


def statistics(expert: str, seed: int = 0) -> bytes:
    return PromptStatistics.of(prompt_features(tiny(), prompts(expert, seed, 64))).to_bytes()


@dataclass
class Shelf:
    """Statistics to fetch, by expert; remembers who asked."""

    bodies: dict[str, bytes] = field(default_factory=dict)
    fetched: list[str] = field(default_factory=list)

    def fetch(self, expert: str) -> bytes:
        self.fetched.append(expert)
        if expert not in self.bodies:
            raise RefusedError("forbidden", "this token may not read it.")
        return self.bodies[expert]


def followed(*experts: str) -> tuple[PromptRouter, Shelf]:
    router, shelf = PromptRouter(tiny()), Shelf({expert: statistics(expert) for expert in experts})
    assert router.follow(dict.fromkeys(experts, "1"), shelf.fetch) == {}
    return router, shelf


def share_found(router: PromptRouter, expert: str) -> float:
    return float(np.mean([likeliest_of(router, prompt) == expert for prompt in prompts(expert, 9, 10)]))


def likeliest_of(router: PromptRouter, prompt: Sequence[int]) -> str:
    found = router.candidates([prompt])
    assert found is not None
    return max(found[0].log_priors, key=lambda name: found[0].log_priors[name])


def test_prompts_find_their_expert() -> None:
    router, _ = followed("python", "sql")
    assert router.experts == ("python", "sql")
    assert all(share_found(router, expert) >= 0.9 for expert in router.experts)


def test_experts_that_look_alike_are_all_candidates() -> None:
    undecided = SequenceRouter(("python", "sql"), np.zeros((64, 2)), np.zeros(2))
    found = PromptRouter(tiny(), undecided).candidates([(97, 98, 99)])
    assert found is not None
    assert found[0].text == (97, 98, 99)
    assert found[0].log_priors == pytest.approx(dict.fromkeys(("python", "sql"), np.log(0.5)))


def test_one_expert_is_nothing_to_choose_between() -> None:
    router, _ = followed("python")
    assert not router.experts
    assert router.candidates([(97, 98, 99)]) is None


def test_an_expert_that_arrives_is_routed_to_and_one_that_leaves_is_not() -> None:
    router, shelf = followed("python", "sql")
    shelf.bodies["law"] = statistics("law")
    router.follow({"python": "1", "sql": "1", "law": "1"}, shelf.fetch)
    assert share_found(router, "law") >= 0.9
    router.follow({"python": "1", "sql": "1"}, shelf.fetch)
    assert router.experts == ("python", "sql")
    router.follow({"sql": "1"}, shelf.fetch)
    assert not router.experts


def test_only_statistics_that_changed_are_fetched() -> None:
    router, shelf = followed("python", "sql")
    router.follow({"python": "1", "sql": "2"}, shelf.fetch)
    assert shelf.fetched == ["python", "sql", "sql"]


def test_statistics_that_cannot_be_had_leave_the_old_ones() -> None:
    router, shelf = followed("python", "sql")
    del shelf.bodies["sql"]
    failed = router.follow({"python": "1", "sql": "2", "law": "1"}, shelf.fetch)
    assert failed == dict.fromkeys(("sql", "law"), "this token may not read it.")
    assert router.experts == ("python", "sql")
    shelf.bodies["sql"] = statistics("law")
    assert router.follow({"python": "1", "sql": "2"}, shelf.fetch) == {}
    assert [likeliest_of(router, prompt) for prompt in prompts("law", 9, 10)].count("sql") >= 9


def refused(body: bytes) -> str:
    router, shelf = followed("python", "sql")
    shelf.bodies["law"] = body
    failed: Mapping[str, str] = router.follow({"python": "1", "sql": "1", "law": "1"}, shelf.fetch)
    assert router.experts == ("python", "sql")
    assert set(failed) == {"law"}
    return failed["law"]


def test_what_is_no_statistics_is_left_out_and_said() -> None:
    assert refused(b"not statistics")


def test_statistics_of_another_base_model_are_left_out_and_said() -> None:
    features = np.random.default_rng(0).normal(size=(64, 7)).astype(np.float32)
    assert "7 numbers, this base model's features 64" in refused(PromptStatistics.of(features).to_bytes())


def test_statistics_that_make_no_router_leave_the_old_one() -> None:
    router, shelf = followed("python", "sql")
    same = PromptStatistics.of(np.ones((4, 64), np.float32)).to_bytes()
    shelf.bodies = {"python": same, "sql": same}
    failed = router.follow({"python": "2", "sql": "2"}, shelf.fetch)
    assert all("no expert has two prompts that differ" in why for why in failed.values())
    assert share_found(router, "python") >= 0.9


def send(served: Served, expert: str) -> None:
    """A worker of the expert discloses what its prompts are like."""
    body = statistics(expert)
    with served.house.client() as http:
        sent = {"expert": expert, "worker": "w1", "kind": "prompts"}
        answer = http.post("/push_data_statistics", params=sent, content=body, headers=push_headers(body))
    assert answer.status_code == 200, answer.text


def test_auto_is_there_once_the_workers_of_two_experts_have_told_of_their_prompts(tmp_path: Path) -> None:
    with serving(tmp_path, Limits(256, 64, 16)) as served, served.client() as client:
        send(served, "python")
        served.watcher.poll()
        assert "auto" not in [card.id for card in client.models.list()]
        send(served, "sql")
        deadline = time.monotonic() + 20
        while "auto" not in [card.id for card in client.models.list()]:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        for expert in ("python", "sql"):
            (prompt,) = prompts(expert, 9, 1)
            assert client.completions.create(model="auto", prompt=prompt, max_tokens=2).model == expected(
                served, prompt
            )


def test_prompts_that_are_routed_together_are_given_to_whom_each_alone_is_given(tmp_path: Path) -> None:
    with serving(tmp_path, Limits(256, 64, 32)) as served:
        send(served, "python")
        send(served, "sql")
        wait_until(lambda: "auto" in served.service.names())
        asked = [tuple(prompt[: 4 + 3 * place]) for place, prompt in enumerate(prompts("python", 9, 6))]
        asked += [tuple(prompt[: 5 + 3 * place]) for place, prompt in enumerate(prompts("sql", 9, 6))]
        together = served.service._routing.route(asked)
    assert together == [expected(served, prompt) for prompt in asked]
    assert len(set(together)) > 1


def expected(served: Served, prompt: Sequence[int]) -> str:
    """By the rule itself: what the router thinks, and what every model alone gives the prompt."""
    router = PromptRouter(tiny())
    router.follow({"python": "1", "sql": "1"}, statistics)
    found = router.candidates([prompt])
    assert found is not None
    coordinator = served.house.service.coordinator
    adapters = {name: expert.adapter for name, expert in coordinator.experts.items()}
    adapters["gateway"] = coordinator.gateway().adapter
    alone = {name: likelihood_alone(adapters[name], prompt) for name in (*found[0].log_priors, "gateway")}
    return choose(found[0], alone, "gateway")


def likelihood_alone(adapter: Adapter, text: Sequence[int]) -> float:
    """One token after the other, each from the whole logits."""
    base = tiny()
    multi = MultiLora(base.model)
    multi.add("only", adapter)
    with torch.no_grad(), multi.rows(["only"]):
        logits = base.model(input_ids=torch.tensor([list(text)])).logits[0].double()
    return sum(float(logits[place].log_softmax(-1)[token]) for place, token in enumerate(text[1:]))
