"""Our tasks as AReaL workflows, so that a team with an AReaL cluster can train on them. Needs AReaL.

A workflow plays one episode with AReaL's inference engine. Every turn of the policy becomes one row, because what a
seat sees next need not begin with what it saw before; a row's reward is what its seat earned in the episode. Rows of an
episode vary in number, so normalise rewards or advantages by batch, not by groups of fixed size.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from areal import workflow_context
from areal.api import InferenceEngine, ModelRequest, ModelResponse, RolloutWorkflow
from areal.api.cli_args import GenerationHyperparameters
from areal.utils import stats_tracker
from areal.utils.data import concat_padded_tensors
from areal.utils.hf_utils import load_hf_tokenizer
from transformers import PreTrainedTokenizerFast

from fedmoe.areal.batch import TensorRow
from fedmoe.areal.config import ArealError
from fedmoe.areal.rewards import SEATS, SEED, Reward, seat_reward
from fedmoe.arena.rollout.chat import ChatCodec
from fedmoe.arena.tasks.registry import make_task
from fedmoe.arena.tasks.task import Episode, Lineup, PromptMessage, Task, check_lineup
from fedmoe.models.stop_tokens import end_marks

#: Plays the seats that the policy does not: from task, episode, seat and random state to an action.
Opponent = Callable[[Task, Episode, int, np.random.Generator], Awaitable[str]]


async def random_opponent(task: Task, episode: Episode, seat: int, rng: np.random.Generator) -> str:
    """The player of known, low strength: a random legal action."""
    return task.random_action(episode, seat, rng)


@dataclass(frozen=True, slots=True)
class _PolicyTurn:
    """One turn of the policy."""

    seat: int
    response: ModelResponse


class ArenaWorkflow(RolloutWorkflow):  # type: ignore[misc]
    """Plays episodes of one task: `lineup` says who stands where (default: the fewest seats, each for himself).

    A row of data (see `rewards.episode_rows`) has the `seed` of an episode and the `seats` that the policy fills; the
    others belong to `opponent`. `task` may be a name (`reasoning:chain_sum`), `tokenizer` the folder of one, so that
    AReaL can make workflows on other machines. `reward`: from an outcome to what a seat earned.
    """

    def __init__(
        self,
        task: Task | str,
        gconfig: GenerationHyperparameters,
        tokenizer: PreTrainedTokenizerFast | str,
        lineup: Lineup | None = None,
        reward: Reward = seat_reward,
        opponent: Opponent = random_opponent,
        max_prompt_tokens: int = 1024,
    ) -> None:
        self._task = make_task(task) if isinstance(task, str) else task
        self._tokenizer = load_hf_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
        self._codec = ChatCodec(self._tokenizer, max_prompt_tokens)
        self._lineup = lineup or Lineup.alone(self._task.seats[0])
        check_lineup(self._task, self._lineup)
        self._reward = reward
        self._opponent = opponent
        limit = min(gconfig.max_new_tokens, self._task.max_action_tokens)
        generation = gconfig.new_with_stop_and_pad_token_ids(self._tokenizer)
        # The mark that conversations teach ends an answer here as it does in every other engine.
        stops = sorted({*generation.stop_token_ids, *end_marks(self._tokenizer)})
        self._generation = generation.new(n_samples=1, max_new_tokens=limit, stop_token_ids=stops)

    async def arun_episode(self, engine: InferenceEngine, data: Mapping[str, object]) -> TensorRow | None:
        """One episode as padded tensors, a row a turn of the policy; None (rejected) when the engine gave up a turn.

        Keys: input_ids, attention_mask, loss_mask, logprobs, versions (rows x length), rewards (rows).
        """
        seed, seats = self._read(data)
        episode, rng = self._task.start(seed, self._lineup), np.random.default_rng([seed, 1])
        played: list[_PolicyTurn] = []
        while waiting := episode.to_act():
            ours = [seat for seat in waiting if seat in seats]
            responses = await asyncio.gather(*(self._ask(engine, episode.observe(seat)) for seat in ours))
            if any(response.stop_reason == "abort" or not response.output_tokens for response in responses):
                return None
            turns = [_PolicyTurn(seat, response) for seat, response in zip(ours, responses, strict=True)]
            actions = {turn.seat: self._codec.text(turn.response.output_tokens) for turn in turns}
            for seat in waiting:
                if seat not in seats:
                    actions[seat] = await self._opponent(self._task, episode, seat, rng)
            episode.act(actions)
            played += turns
        return self._finish(episode, played)

    def _read(self, data: Mapping[str, object]) -> tuple[int, frozenset[int]]:
        every = range(self._lineup.seats)
        seed, seats = data.get(SEED), data.get(SEATS, every)
        valid = isinstance(seats, Sequence) and len(seats) > 0 and set(seats) <= set(every)
        if not isinstance(seed, int) or seed < 0 or not isinstance(seats, Sequence) or not valid:
            raise ArealError(f"a row of data needs a {SEED} from 0 on and {SEATS} out of {[*every]}, got {dict(data)}")
        return seed, frozenset(seats)

    async def _ask(self, engine: InferenceEngine, messages: Sequence[PromptMessage]) -> ModelResponse:
        prompt = list(self._codec.prompt(messages))
        return await engine.agenerate(
            ModelRequest(rid=uuid.uuid4().hex, input_ids=prompt, gconfig=self._generation, tokenizer=self._tokenizer)
        )

    def _finish(self, episode: Episode, played: Sequence[_PolicyTurn]) -> TensorRow | None:
        if not played:
            return None
        outcome = episode.outcome()
        rewards = {seat: self._reward(outcome, self._lineup, seat) for seat in {turn.seat for turn in played}}
        stats_tracker.get(workflow_context.stat_scope()).scalar(
            reward=float(np.mean(list(rewards.values()))),
            turns=float(len(played)),
            completed=float(outcome.completed),
            valid=float(np.mean([outcome.valid[seat] for seat in rewards])),
        )
        rows: TensorRow = concat_padded_tensors([turn_row(turn.response, rewards[turn.seat]) for turn in played])
        return rows


def turn_row(response: ModelResponse, reward: float) -> TensorRow:
    """One turn in AReaL's form: tensors (1, L), the prompt with mask 0, log-probability 0 and version -1."""
    prompt, tokens = response.input_tokens, response.output_tokens
    if not len(tokens) == len(response.output_logprobs) == len(response.output_versions):
        raise ArealError(
            f"the engine answered {len(tokens)} tokens with {len(response.output_logprobs)} log-probabilities and "
            f"{len(response.output_versions)} versions; each token needs one of both"
        )
    row = {
        "input_ids": torch.tensor([*prompt, *tokens], dtype=torch.int32),
        "attention_mask": torch.ones(len(prompt) + len(tokens), dtype=torch.bool),
        "loss_mask": torch.tensor([0] * len(prompt) + [1] * len(tokens), dtype=torch.int32),
        "logprobs": torch.tensor([0.0] * len(prompt) + response.output_logprobs, dtype=torch.float32),
        "versions": torch.tensor([-1] * len(prompt) + response.output_versions, dtype=torch.int32),
        "rewards": torch.tensor(reward, dtype=torch.float32),
    }
    return {name: tensor[None] for name, tensor in row.items()}
