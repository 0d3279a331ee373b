"""Policy-gradient steps for many policies in one batch: one forward and backward, everything else per policy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from fedmoe.arena.learning.config import LearningConfig
from fedmoe.arena.learning.loss import AGGREGATIONS, LOSSES, LossStatistics, LossTokens, combined, k3
from fedmoe.arena.rollout.episodes import Example
from fedmoe.lora.adapter import Adapter, FloatVector, Layout, ShapeError
from fedmoe.models.base import LoadedBase
from fedmoe.models.final_logits import check_causal_model
from fedmoe.models.multilora import MultiLora, UnknownAdapterError
from fedmoe.models.policy_logprobs import Continuation, MicroBatch, TokenLogprobs, plan_micro_batches, token_logprobs
from fedmoe.models.tree_attention import use_tree_attention


@dataclass(frozen=True, slots=True)
class PolicyUpdate:
    """What one update did to one policy. `entropy` in nats a token, `gradient_norm` before clipping.

    `moved`: k3 estimate of KL(weights that sampled || weights before the update), nats a token.
    """

    loss: float
    entropy: float
    gradient_norm: float
    learning_rate: float
    tokens: int
    moved: float
    statistics: LossStatistics


@dataclass(frozen=True)
class AdamState:
    """One policy's AdamW: first and second moments, float32 (size,) in the layout's order, and steps made."""

    first: FloatVector
    second: FloatVector
    steps: int


class PolicyLearner(Protocol):
    """Trains the policies of a run by examples; see `Learner`, which does it in this process."""

    micro_batch_tokens: int

    def layout(self, rank: int) -> Layout:
        """The layout of an adapter of `rank` for the base model."""

    def add(self, name: str, adapter: Adapter) -> None:
        """A new policy that starts from `adapter`."""

    def adapter(self, name: str) -> Adapter:
        """The current factors of a policy, copied."""

    def score(self, name: str, prompt: tuple[int, ...], tokens: tuple[int, ...]) -> FloatVector:
        """The policy's log-probability of each of `tokens` after `prompt`, float32 (T,)."""

    def replace(self, name: str, adapter: Adapter, state: AdamState | None = None) -> None:
        """Give a policy other factors; without `state` the optimizer starts anew."""

    def optimizer_state(self, name: str) -> AdamState:
        """The policy's optimizer, copied."""

    def learning_rate(self, name: str) -> float:
        """The policy's learning rate after warm-up."""

    def set_learning_rate(self, name: str, rate: float) -> None:
        """Change it from the next step on."""

    def update(self, examples: Sequence[Example], max_tokens: int) -> dict[str, PolicyUpdate]:
        """Train every policy that has examples; `max_tokens` is the limit of an action."""


class _LivePolicy:
    """A live adapter with an optimizer of its own."""

    def __init__(self, name: str, multi: MultiLora, adapter: Adapter, config: LearningConfig) -> None:
        self.name = name
        self._multi = multi
        self._config = config
        self.rate = config.learning_rate
        self.steps = 0
        multi.add(name, adapter, trainable=True)
        self._new_optimizer()

    def _new_optimizer(self) -> None:
        self.parameter = self._multi.slot(self.name).parameter
        self.optimizer = torch.optim.AdamW(
            [self.parameter], lr=self.rate, weight_decay=self._config.weight_decay, betas=(0.9, 0.95), fused=True
        )

    def replace(self, adapter: Adapter, state: AdamState | None) -> None:
        """Other factors, of any rank; without `state` the optimizer starts anew."""
        size = adapter.layout.size
        if state and (state.first.shape, state.second.shape) != ((size,), (size,)):
            raise ShapeError(f"policy {self.name}: moments of {state.first.shape} do not fit an adapter of {size}")
        self._multi.replace(self.name, adapter)
        self._new_optimizer()
        self.steps = state.steps if state else 0
        if state and state.steps:
            device = self.parameter.device
            self.optimizer.state[self.parameter] = {
                "step": torch.tensor(float(state.steps), device=device),
                "exp_avg": torch.tensor(state.first, device=device),
                "exp_avg_sq": torch.tensor(state.second, device=device),
            }

    def state(self) -> AdamState:
        moments = self.optimizer.state.get(self.parameter)
        if not moments:
            zeros = np.zeros(self.parameter.numel(), np.float32)
            return AdamState(zeros, zeros.copy(), self.steps)
        first, second = (moments[name].to("cpu", copy=True).numpy() for name in ("exp_avg", "exp_avg_sq"))
        return AdamState(first, second, self.steps)

    def gradient_norm(self) -> float:
        """The length of the accumulated gradient."""
        gradient = self.parameter.grad
        return 0.0 if gradient is None else float(torch.linalg.vector_norm(gradient))

    def step(self, norm: float) -> float:
        """One step from the accumulated gradient of length `norm`; returns the learning rate used."""
        rate = self.rate * min(1.0, (self.steps + 1) / max(1, self._config.warmup_steps))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if self.parameter.grad is not None and norm > self._config.max_grad_norm:
            self.parameter.grad.mul_(self._config.max_grad_norm / norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        return rate


class Learner(PolicyLearner):
    """Trains policies on examples, all of them in the same micro-batches; blind to tasks and modes.

    A policy trained beside others gets the gradient it would get alone: its loss is divided by its own constants.
    `when_short` is called when memory ran out in the middle of an update and returns the `micro_batch_tokens` to try
    again with, or raises; without it the error is raised.
    """

    def __init__(self, base: LoadedBase, multi: MultiLora, config: LearningConfig) -> None:
        check_causal_model(base.model)
        if (base.device.type, base.dtype) == ("cpu", torch.bfloat16):
            use_tree_attention(base.model)
        self.config = config
        self.micro_batch_tokens = config.micro_batch_tokens
        self.when_short: Callable[[str], int] | None = None
        self._model = base.model
        self._multi = multi
        self._policies: dict[str, _LivePolicy] = {}

    def layout(self, rank: int) -> Layout:
        return self._multi.layout(rank)

    def add(self, name: str, adapter: Adapter) -> None:
        self._policies[name] = _LivePolicy(name, self._multi, adapter, self.config)

    def adapter(self, name: str) -> Adapter:
        return self._multi.slot(name).adapter()

    def score(self, name: str, prompt: tuple[int, ...], tokens: tuple[int, ...]) -> FloatVector:
        """The live policy's log-probability (temperature 1) of each of `tokens` after `prompt`, float32 (T,)."""
        continuations = [Continuation(name, prompt, tokens)]
        (batch,) = plan_micro_batches(continuations, len(prompt) + len(tokens), len(prompt) + len(tokens))
        with torch.no_grad(), self._multi.rows(batch.adapters):
            scored = token_logprobs(self._model, self._multi, batch, continuations)
        return np.asarray(scored.logprobs.cpu().numpy(), np.float32)

    def replace(self, name: str, adapter: Adapter, state: AdamState | None = None) -> None:
        self._policies[name].replace(adapter, state)

    def optimizer_state(self, name: str) -> AdamState:
        return self._policies[name].state()

    def learning_rate(self, name: str) -> float:
        return self._policies[name].rate

    def set_learning_rate(self, name: str, rate: float) -> None:
        if not rate > 0:
            raise ValueError(f"a learning rate must be positive, got {rate}")
        self._policies[name].rate = rate

    def update(self, examples: Sequence[Example], max_tokens: int) -> dict[str, PolicyUpdate]:
        """Train every policy that has examples; `max_tokens` is the limit of an action.

        All weights change only after all gradients are there: whatever fails, a gradient that is not finite too,
        changes no policy (beyond the epochs already done).
        """
        unknown = sorted({example.policy for example in examples} - set(self._policies))
        if unknown:
            raise UnknownAdapterError(f"no policies {unknown} to train; there are: {sorted(self._policies)}")
        if not examples:
            return {}
        reports: dict[str, PolicyUpdate] = {}
        proximal: dict[int, FloatVector] = {}
        for _ in range(self.config.epochs):
            reports = self._epoch_within_memory(examples, max_tokens, proximal)
        return reports

    def _epoch_within_memory(
        self, examples: Sequence[Example], max_tokens: int, proximal: dict[int, FloatVector]
    ) -> dict[str, PolicyUpdate]:
        while True:
            try:
                return self._epoch(examples, max_tokens, proximal)
            except (torch.OutOfMemoryError, MemoryError) as error:
                if self.when_short is None:
                    raise
                reason = str(error).partition(". ")[0] or type(error).__name__
            # Not inside the handler: the traceback holds the very tensors that did not fit.
            self.micro_batch_tokens = self.when_short(reason)

    def _epoch(
        self, examples: Sequence[Example], max_tokens: int, proximal: dict[int, FloatVector]
    ) -> dict[str, PolicyUpdate]:
        try:
            measured = self._accumulate(examples, max_tokens, proximal)
            norms = {name: self._policies[name].gradient_norm() for name in measured}
            broken = sorted(name for name, norm in norms.items() if not math.isfinite(norm))
            if broken:
                raise FloatingPointError(f"the gradients of {', '.join(broken)} are not finite; no policy was changed")
        except BaseException:
            # What has been accumulated so far would otherwise be part of the next update.
            for policy in self._policies.values():
                policy.optimizer.zero_grad(set_to_none=True)
            raise
        return {name: self._step(name, parts, norms[name]) for name, parts in measured.items()}

    def _accumulate(
        self, examples: Sequence[Example], max_tokens: int, proximal: dict[int, FloatVector]
    ) -> dict[str, list[_PartReport]]:
        continuations = [Continuation(e.policy, e.turn.prompt, e.turn.tokens) for e in examples]
        weights, denominators = _weighing(examples, self.config.aggregation, max_tokens)
        reports: dict[str, list[_PartReport]] = {}
        for batch in plan_micro_batches(continuations, self.micro_batch_tokens):
            with self._multi.rows(batch.adapters):
                scored = token_logprobs(self._model, self._multi, batch, continuations, self.config.temperature)
                losses = list(self._losses(batch, scored, examples, weights, denominators, proximal))
                torch.stack([loss for _, loss, _ in losses]).sum().backward()
            for name, _, report in losses:
                reports.setdefault(name, []).append(report)
        return reports

    def _losses(
        self,
        batch: MicroBatch,
        scored: TokenLogprobs,
        examples: Sequence[Example],
        weights: Sequence[float],
        denominators: Mapping[str, float],
        proximal: dict[int, FloatVector],
    ) -> Iterator[tuple[str, torch.Tensor, _PartReport]]:
        """One loss a policy of the micro-batch; remembers the log-probabilities of the first pass as proximal."""
        values, owned = scored.logprobs.detach().cpu().numpy(), scored.owners.cpu().numpy()
        owners = owned.tolist()
        for member in dict.fromkeys(owners):
            if member not in proximal:
                proximal[member] = values[owned == member]
        for name in dict.fromkeys(adapter for adapter in batch.adapters if adapter):
            members = [member for member in batch.members() if examples[member].policy == name]
            own = torch.tensor([examples[owner].policy == name for owner in owners], device=scored.logprobs.device)
            tokens = _loss_tokens(scored.logprobs[own], members, examples, weights, proximal)
            loss, statistics = LOSSES[self.config.loss](tokens, self.config, denominators[name])
            entropy = float(scored.entropies[own].mean())
            moved = float(k3(tokens.proximal - tokens.behaviour).mean())
            yield name, loss, _PartReport(float(loss.detach()), entropy, moved, statistics)

    def _step(self, name: str, parts: Sequence[_PartReport], norm: float) -> PolicyUpdate:
        rate = self._policies[name].step(norm)
        statistics = combined([part.statistics for part in parts])
        counts = [part.statistics.tokens for part in parts]
        entropy = float(np.average([part.entropy for part in parts], weights=counts))
        moved = float(np.average([part.moved for part in parts], weights=counts))
        loss = sum(part.loss for part in parts)
        return PolicyUpdate(loss, entropy, norm, rate, statistics.tokens, moved, statistics)


@dataclass(frozen=True, slots=True)
class _PartReport:
    """What one micro-batch says of one policy; the fields are those of `PolicyUpdate`."""

    loss: float
    entropy: float
    moved: float
    statistics: LossStatistics


def _weighing(examples: Sequence[Example], aggregation: str, max_tokens: int) -> tuple[list[float], dict[str, float]]:
    """The weight of every token of each example, and the denominator of each policy's loss."""
    weights, denominators = [0.0] * len(examples), {}
    for name in dict.fromkeys(example.policy for example in examples):
        members = [index for index, example in enumerate(examples) if example.policy == name]
        plan = AGGREGATIONS[aggregation]([len(examples[index].turn.tokens) for index in members], max_tokens)
        denominators[name] = plan.denominator
        for index, weight in zip(members, plan.weights, strict=True):
            weights[index] = weight
    return weights, denominators


def _loss_tokens(
    current: torch.Tensor,
    members: Sequence[int],
    examples: Sequence[Example],
    weights: Sequence[float],
    proximal: Mapping[int, FloatVector],
) -> LossTokens:
    """The examples of one policy, one token after the other, as the loss wants them."""
    lengths = [len(examples[member].turn.tokens) for member in members]

    def flat(values: Sequence[FloatVector]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(values)).to(current.device)

    def spread(values: Sequence[float]) -> torch.Tensor:
        return torch.from_numpy(np.repeat(np.array(values, np.float32), lengths)).to(current.device)

    return LossTokens(
        current=current,
        proximal=flat([proximal[member] for member in members]),
        behaviour=flat([examples[member].turn.behaviour for member in members]),
        advantages=spread([examples[member].advantage for member in members]),
        mask=torch.ones(len(current), dtype=torch.bool, device=current.device),
        weights=spread([weights[member] for member in members]),
    )
