"""Our tasks on AReaL's own path (E7). Run with AReaL's environment: `make test-areal`."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pytest
from areal_cases import COUNTING

from fedmoe.areal.batch import TensorRow
from fedmoe.areal.config import ArealConfig, ArealError
from fedmoe.areal.rewards import Reward, episode_rows, lead_reward, seat_reward, team_reward
from fedmoe.arena.tasks.task import Episode, Lineup, Task, Team

if TYPE_CHECKING:
    from areal.api import ModelRequest, ModelResponse, RolloutWorkflow

    from fedmoe.areal.workflow import ArenaWorkflow, Opponent

pytestmark = [pytest.mark.areal, pytest.mark.filterwarnings("ignore")]
KEYS = {"input_ids", "attention_mask", "loss_mask", "logprobs", "versions", "rewards"}


class SayingEngine:
    """Answers each request with the next number's letter, that many times, and an end-of-sequence token."""

    def __init__(self, numbers: Sequence[int], stop_reason: str = "stop") -> None:
        self.requests: list[ModelRequest] = []
        self._numbers, self._stop_reason = list(numbers), stop_reason

    async def agenerate(self, request: ModelRequest) -> ModelResponse:
        from areal.api import ModelResponse

        count = self._numbers[len(self.requests) % len(self._numbers)]
        self.requests.append(request)
        await asyncio.sleep(0)
        tokens = [*request.tokenizer(chr(ord("a") + count) * count)["input_ids"], request.tokenizer.eos_token_id]
        return ModelResponse(
            input_tokens=list(request.input_ids),
            output_tokens=tokens,
            output_logprobs=[-0.1 * place for place in range(1, len(tokens) + 1)],
            output_versions=[5] * len(tokens),
            stop_reason=self._stop_reason,
            tokenizer=request.tokenizer,
        )


async def _silent(task: Task, episode: Episode, seat: int, rng: np.random.Generator) -> str:
    return ""


def _workflow(
    task: Task | str = COUNTING,
    lineup: Lineup | None = None,
    reward: Reward = seat_reward,
    opponent: Opponent | None = None,
) -> ArenaWorkflow:
    from areal.api.cli_args import GenerationHyperparameters

    from fedmoe.areal.workflow import ArenaWorkflow, random_opponent
    from fedmoe.models.tiny import tiny_tokenizer

    generation = GenerationHyperparameters(max_new_tokens=64)
    return ArenaWorkflow(task, generation, tiny_tokenizer(), lineup, reward, opponent or random_opponent)


def _episode(workflow: RolloutWorkflow, engine: SayingEngine, data: Mapping[str, object]) -> TensorRow | None:
    rows: TensorRow | None = asyncio.run(workflow.arun_episode(engine, data))
    return rows


def _play(workflow: RolloutWorkflow, engine: SayingEngine, data: Mapping[str, object]) -> TensorRow:
    rows = _episode(workflow, engine, data)
    assert rows is not None
    return rows


def test_an_episode_is_a_row_a_turn_that_passes_areals_own_check() -> None:
    from areal.infra.workflow_executor import check_trajectory_format

    engine = SayingEngine([3])
    rows = _play(_workflow(), engine, {"seed": 3})
    assert check_trajectory_format(rows, batch_size=2, expected_keys=KEYS)
    assert rows.keys() == KEYS
    assert rows["rewards"].tolist() == [1.0, 1.0]
    for row, request in enumerate(engine.requests):
        prompt, length = len(request.input_ids), int(rows["attention_mask"][row].sum())
        assert length == prompt + 4
        assert rows["input_ids"][row, :prompt].tolist() == request.input_ids
        assert rows["loss_mask"][row].tolist() == [0] * prompt + [1] * 4 + [0] * (rows["loss_mask"].shape[1] - length)
        assert rows["logprobs"][row, prompt:length].tolist() == pytest.approx([-0.1, -0.2, -0.3, -0.4])
        assert rows["versions"][row, :length].tolist() == [-1] * prompt + [5] * 4


def test_requests_are_what_the_engine_needs() -> None:
    engine = SayingEngine([3])
    workflow = _workflow()
    _play(workflow, engine, {"seed": 3})
    first, second = engine.requests
    assert first.gconfig.max_new_tokens == COUNTING.max_action_tokens
    assert first.gconfig.n_samples == 1
    assert set(first.gconfig.stop_token_ids) == {256, 258}
    assert first.rid != second.rid
    assert first.tokenizer.decode(first.input_ids).endswith("Round 0, seat 0: 3<|im_end|>\n<|im_start|>assistant\n")


def test_each_seat_is_rewarded_for_what_it_did() -> None:
    rows = _play(_workflow(lineup=Lineup.alone(2)), SayingEngine([4, 5]), {"seed": 4, "seats": [0, 1]})
    assert rows["rewards"].tolist() == [1.0, 0.5, 1.0, 0.5]


def test_a_team_shares_its_reward() -> None:
    workflow = _workflow(lineup=Lineup.together(2), reward=team_reward)
    assert _play(workflow, SayingEngine([4, 5]), {"seed": 4})["rewards"].tolist() == [0.75] * 4


def test_opponents_play_the_other_seats_and_are_not_trained_on() -> None:
    engine = SayingEngine([4])
    workflow = _workflow(lineup=Lineup((Team((0,)), Team((1,)))), reward=lead_reward, opponent=_silent)
    rows = _play(workflow, engine, {"seed": 4, "seats": [1]})
    assert rows["rewards"].tolist() == pytest.approx([0.8, 0.8])
    assert ["seat 1" in request.tokenizer.decode(request.input_ids) for request in engine.requests] == [True, True]


def test_a_random_opponent_is_the_same_for_the_same_seed() -> None:
    workflow = _workflow(lineup=Lineup.alone(2), reward=lead_reward)
    data = {"seed": 14, "seats": [0]}
    rewards = [_play(workflow, SayingEngine([4]), data)["rewards"].tolist() for _ in range(2)]
    assert rewards[0] == rewards[1]


def test_an_aborted_turn_rejects_the_episode() -> None:
    assert _episode(_workflow(), SayingEngine([3], "abort"), {"seed": 3}) is None


@pytest.mark.parametrize(
    "data",
    [{}, {"seed": -1}, {"seed": "3"}, {"seed": 3, "seats": []}, {"seed": 3, "seats": [0, 4]}, {"seed": 3, "seats": 0}],
)
def test_rows_of_data_that_say_nothing_are_refused(data: dict[str, object]) -> None:
    with pytest.raises(ArealError, match="needs a seed"):
        _play(_workflow(), SayingEngine([3]), data)


def test_tokens_without_log_probabilities_are_refused() -> None:
    from areal.api import ModelResponse

    from fedmoe.areal.workflow import turn_row

    with pytest.raises(ArealError, match="2 tokens with 1 log-probabilities"):
        turn_row(ModelResponse([1], [2, 3], [-0.5], [0, 0]), 1.0)


def test_grouped_episodes_train_areals_actor(config: ArealConfig, no_process_group: None) -> None:
    """As in AReaL's trainer: groups of episodes, advantages and PPO updates by AReaL; what paid becomes likelier."""
    import logging

    from areal.api.cli_args import NormConfig, PPOActorConfig
    from areal.infra.remote_inf_engine import GroupedRolloutWorkflow

    from fedmoe.areal.actor import ArealActor, PackingActor
    from fedmoe.areal.batch import Sequences

    engines: list[PackingActor] = []

    def normalising(settings: PPOActorConfig) -> PackingActor:
        settings.adv_norm = NormConfig(mean_level="batch", std_level="batch")
        engines.append(PackingActor(settings))
        return engines[-1]

    saying = SayingEngine([3, 6])  # of each group one episode is right and one wrong
    grouped = GroupedRolloutWorkflow(_workflow(), 2, logging.getLogger("test"))
    data = [_play(grouped, saying, {**row, "seed": 3}) for row in episode_rows(2, 1)]
    actor = ArealActor(config, engine=normalising)
    right, wrong = (Sequences.of([(ids[:-4], ids[-4:-1]) for ids in _said(data, reward)]) for reward in (1.0, 0.25))
    before = [np.concatenate(actor.score(which)).sum() for which in (right, wrong)]
    rollouts = [dict(rows) for rows in data]
    for rows, proximal in zip(rollouts, engines[0].compute_logp(rollouts), strict=True):
        rows["prox_logp"] = proximal
    engines[0].ppo_update(engines[0].compute_advantages(rollouts))
    after = [np.concatenate(actor.score(which)).sum() for which in (right, wrong)]
    assert after[0] > before[0]
    assert after[1] < before[1]


def _said(data: Sequence[TensorRow], reward: float) -> list[list[int]]:
    """The token ids of all rows that earned this."""
    return [
        ids[mask].tolist()
        for rows in data
        for ids, mask, earned in zip(rows["input_ids"], rows["attention_mask"], rows["rewards"], strict=True)
        if float(earned) == reward
    ]


def test_a_reasoning_task_is_played_by_name() -> None:
    pytest.importorskip("reasoning_gym")
    rows = _play(_workflow(task="reasoning:chain_sum"), SayingEngine([2]), {"seed": 0})
    assert rows["rewards"].shape == (1,)
    assert 0.0 <= float(rows["rewards"][0]) < 1.0


def test_the_client_of_an_unmodified_vllm_uses_vllms_own_routes() -> None:
    from areal.api import WeightUpdateMeta
    from areal.api.cli_args import InferenceEngineConfig

    from fedmoe.areal.stock_vllm import StockVllmBackend, StockVllmEngine

    backend = StockVllmBackend()
    assert backend.get_pause_request().endpoint == "/pause?mode=keep"
    assert backend.get_resume_request().endpoint == "/resume"
    meta = WeightUpdateMeta.from_disk("e", "t", "/tmp", use_lora=True, lora_name="solver", base_model_name="b")
    (request,) = backend.build_disk_weight_update_requests(meta.with_version(3)).requests
    assert request.endpoint == "/v1/load_lora_adapter"
    assert request.payload["lora_name"] == "solver-v3"
    assert request.payload["lora_path"].endswith("_v3")
    meta.lora_keep_versions = 2
    _, unload = backend.build_disk_weight_update_requests(meta.with_version(3)).requests
    assert (unload.endpoint, unload.payload) == ("/v1/unload_lora_adapter", {"lora_name": "solver-v1"})
    assert unload.best_effort  # it may be gone, or never have been there
    assert len(backend.build_disk_weight_update_requests(meta.with_version(1)).requests) == 1
    with pytest.raises(ArealError, match="adapters from disk only"):
        backend.build_disk_weight_update_requests(WeightUpdateMeta.from_disk("e", "t", "/tmp"))
    with pytest.raises(ArealError, match="adapters from disk only"):
        backend.build_distributed_weight_update_requests(meta, [])
    StockVllmEngine(InferenceEngineConfig(backend="vllm:d1"))
