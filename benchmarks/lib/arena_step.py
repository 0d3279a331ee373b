"""FedMoE's side of `bench_arena_throughput.py`: full steps of P policies in one batch, in a process of its own."""

from __future__ import annotations

from lib.harness import pin_threads

pin_threads(1)

import numpy as np  # noqa: E402  # threads are pinned first
import torch  # noqa: E402

from fedmoe.arena.learning.config import LearningConfig  # noqa: E402
from fedmoe.arena.learning.learner import Learner  # noqa: E402
from fedmoe.arena.learning.policies import Policies  # noqa: E402
from fedmoe.arena.modes.advantages import group_advantages  # noqa: E402
from fedmoe.arena.rollout.episodes import Example, PlayedTurn, Player  # noqa: E402
from fedmoe.inference.engine import Sample, SampleRequest  # noqa: E402
from fedmoe.inference.transformers_engine import TransformersEngine  # noqa: E402
from fedmoe.lora.adapter import initial_adapter  # noqa: E402
from fedmoe.models.base import load_base  # noqa: E402
from fedmoe.models.multilora import MultiLora  # noqa: E402
from lib.arena_workload import (  # noqa: E402
    ALPHA,
    LEARNING_RATE,
    MODULES,
    NEW_TOKENS,
    RANK,
    SAMPLES,
    Spent,
    arguments,
    peak_memory,
    prompt,
    report,
    reward,
)


class Table:
    """P policies on one base model, and what a step of all of them is."""

    def __init__(self, model: str, dtype: str, count: int, micro_batch_tokens: int) -> None:
        base = load_base(model, "cpu", dtype)
        multi = MultiLora(base.model, MODULES)
        self.engine = TransformersEngine(base, multi)
        # Every completion has the same length, as it has at the peers.
        self.engine._stop_tokens = frozenset()
        config = LearningConfig(learning_rate=LEARNING_RATE, warmup_steps=1, micro_batch_tokens=micro_batch_tokens)
        self.policies = Policies(Learner(base, multi, config), self.engine, 0, None)
        self.prompts: dict[str, tuple[int, ...]] = {}
        for index in range(count):
            name = f"policy_{index}"
            self.prompts[name] = tuple(base.tokenizer(prompt(index))["input_ids"])
            self.policies.add(name, initial_adapter(multi.layout(RANK), ALPHA, index))
        self.adapter_bytes = multi.layout(RANK).size * 4

    def requests(self, step: int) -> list[SampleRequest]:
        """All samples of a step."""
        return [
            SampleRequest(self.policies.key(name), tokens, NEW_TOKENS, 1.0, 1000 * step + index)
            for name, tokens in self.prompts.items()
            for index in range(SAMPLES)
        ]

    def examples(self, samples: list[Sample]) -> list[Example]:
        """What to learn from them."""
        rewards = np.array([reward(one.tokens) for one in samples])
        owners = [index // SAMPLES for index in range(len(samples))]
        advantages = group_advantages(rewards, owners)
        names = list(self.prompts)
        return [
            Example(
                names[owner],
                PlayedTurn(
                    0,
                    Player(names[owner], self.policies.key(names[owner]), learning=True),
                    self.prompts[names[owner]],
                    one.tokens,
                    "",
                    one.logprobs,
                    one.stopped,
                ),
                float(advantage),
                float(value),
            )
            for owner, one, advantage, value in zip(owners, samples, advantages, rewards, strict=True)
        ]

    def step(self, number: int) -> Spent:
        """Sample, learn, publish the new versions and let the old ones go."""
        spent = Spent()
        with spent.on("sample"):
            samples = self.engine.sample(self.requests(number))
        assert all(len(one.tokens) == NEW_TOKENS for one in samples)
        with spent.on("learn"):
            updates = self.policies.learner.update(self.examples(samples), NEW_TOKENS)
        with spent.on("publish"):
            self.policies.learned(updates, {}, dict.fromkeys(self.prompts, 0))
            self.policies.let_go(())
        return spent


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), required=True)
    parser.add_argument("--micro-batch-tokens", type=int, default=4096)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    table = Table(chosen.model, chosen.dtype, chosen.policies, chosen.micro_batch_tokens)
    loaded = peak_memory()
    steps = [table.step(number) for number in range(chosen.repeats + 1)][1:]
    report(
        steps,
        loaded,
        adapter_bytes=table.adapter_bytes,
        prompt_tokens=[len(tokens) for tokens in table.prompts.values()],
    )


if __name__ == "__main__":
    main()
