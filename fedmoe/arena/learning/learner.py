"""Policy-gradient steps for many policies in one batch: one forward and backward, everything else per policy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from fedmoe.arena.learning.loss import AGGREGATIONS, LOSSES, LossConfig, LossStatistics, Tokens, combined
from fedmoe.arena.rollout.episodes import Example
from fedmoe.lora.adapter import Adapter, FloatVector, Layout, ShapeError
from fedmoe.models.base import LoadedBase
from fedmoe.models.final_logits import check_causal_model
from fedmoe.models.multilora import MultiLora, UnknownAdapterError
from fedmoe.models.policy_logprobs import Continuation, MicroBatch, TokenLogprobs, plan_micro_batches, token_logprobs
from fedmoe.models.tree_attention import use_tree_attention


@dataclass(frozen=True, slots=True)
class LearnerConfig:
    """How policies learn. `epochs`: steps made from the same examples; from the second on the ratio is clipped.

    `micro_batch_tokens` bounds what is computed at once (gradients accumulate over micro-batches). `warmup_steps`:
    the learning rate rises over the first steps of a policy. `max_grad_norm` inf does not clip.
    """

    learning_rate: float = 3e-4
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    epochs: int = 1
    warmup_steps: int = 3
    micro_batch_tokens: int = 4096
    temperature: float = 1.0
    loss: LossConfig = field(default_factory=LossConfig)

    def __post_init__(self) -> None:
        for name in ("learning_rate", "max_grad_norm", "temperature", "epochs", "micro_batch_tokens"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("weight_decay", "warmup_steps"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be below 0, got {getattr(self, name)}")


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
class OptimizerState:
    """One policy's AdamW: first and second moments, float32 (size,) in the layout's order, and steps made."""

    first: FloatVector
    second: FloatVector
    steps: int


class _Policy:
    """A live adapter with an optimizer of its own."""

    def __init__(self, name: str, multi: MultiLora, adapter: Adapter, config: LearnerConfig) -> None:
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

    def replace(self, adapter: Adapter, state: OptimizerState | None) -> None:
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

    def state(self) -> OptimizerState:
        found = self.optimizer.state.get(self.parameter)
        if not found:
            zeros = np.zeros(self.parameter.numel(), np.float32)
            return OptimizerState(zeros, zeros.copy(), self.steps)
        first, second = (found[name].to("cpu", copy=True).numpy() for name in ("exp_avg", "exp_avg_sq"))
        return OptimizerState(first, second, self.steps)

    def gradient_norm(self) -> float:
        """The length of the accumulated gradient."""
        gradient = self.parameter.grad
        return 0.0 if gradient is None else float(torch.linalg.vector_norm(gradient))

    def forget_gradient(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def step(self, norm: float) -> float:
        """One step from the accumulated gradient of length `norm`; returns the learning rate used."""
        rate = self.rate * min(1.0, (self.steps + 1) / max(1, self._config.warmup_steps))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if self.parameter.grad is not None and norm > self._config.max_grad_norm:
            self.parameter.grad.mul_(self._config.max_grad_norm / norm)
        self.optimizer.step()
        self.forget_gradient()
        self.steps += 1
        return rate


class Learner:
    """Trains policies on examples, all of them in the same micro-batches; blind to tasks and modes.

    A policy trained beside others gets the gradient it would get alone: its loss is divided by its own constants.
    `when_short` is told when memory ran out in the middle of an update and returns the `micro_batch_tokens` to try
    again with, or raises; without it the error goes up.
    """

    def __init__(self, base: LoadedBase, multi: MultiLora, config: LearnerConfig) -> None:
        check_causal_model(base.model)
        if (base.device.type, base.dtype) == ("cpu", torch.bfloat16):
            use_tree_attention(base.model)
        self.config = config
        self.micro_batch_tokens = config.micro_batch_tokens
        self.when_short: Callable[[str], int] | None = None
        self._model = base.model
        self._multi = multi
        self._policies: dict[str, _Policy] = {}

    def layout(self, rank: int) -> Layout:
        """The layout of an adapter of `rank` for the base model."""
        return self._multi.layout(rank)

    def add(self, name: str, adapter: Adapter) -> None:
        """A new policy that starts from `adapter`."""
        self._policies[name] = _Policy(name, self._multi, adapter, self.config)

    def adapter(self, name: str) -> Adapter:
        """The live factors of a policy, copied."""
        return self._multi.slot(name).adapter()

    def score(self, name: str, prompt: tuple[int, ...], tokens: tuple[int, ...]) -> FloatVector:
        """The live policy's log-probability (temperature 1) of each of `tokens` after `prompt`, float32 (T,)."""
        one = [Continuation(name, prompt, tokens)]
        (batch,) = plan_micro_batches(one, len(prompt) + len(tokens), len(prompt) + len(tokens))
        with torch.no_grad(), self._multi.rows(batch.adapters):
            scored = token_logprobs(self._model, self._multi, batch, one)
        return np.asarray(scored.logprobs.cpu().numpy(), np.float32)

    def replace(self, name: str, adapter: Adapter, state: OptimizerState | None = None) -> None:
        """Give a policy other factors (a copy of a better one, a higher rank, a checkpoint)."""
        self._policies[name].replace(adapter, state)

    def optimizer_state(self, name: str) -> OptimizerState:
        """The policy's optimizer, copied."""
        return self._policies[name].state()

    def learning_rate(self, name: str) -> float:
        """The policy's learning rate after warm-up."""
        return self._policies[name].rate

    def set_learning_rate(self, name: str, rate: float) -> None:
        """Change it from the next step on."""
        if not rate > 0:
            raise ValueError(f"a learning rate must be positive, got {rate}")
        self._policies[name].rate = rate

    def update(self, examples: Sequence[Example], max_tokens: int) -> dict[str, PolicyUpdate]:
        """Train every policy that has examples; `max_tokens` is the limit of an action.

        All weights change only after all gradients are there: whatever fails, a gradient that is not finite too,
        changes no policy (beyond the epochs already done).
        """
        unknown = sorted({one.policy for one in examples} - set(self._policies))
        if unknown:
            raise UnknownAdapterError(f"no policies {unknown} to train; there are: {sorted(self._policies)}")
        if not examples:
            return {}
        reports: dict[str, PolicyUpdate] = {}
        proximal: dict[int, FloatVector] = {}
        for _ in range(self.config.epochs):
            reports = self._fitting_epoch(examples, max_tokens, proximal)
        return reports

    def _fitting_epoch(
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
            for one in self._policies.values():
                one.forget_gradient()
            raise
        return {name: self._step(name, parts, norms[name]) for name, parts in measured.items()}

    def _accumulate(
        self, examples: Sequence[Example], max_tokens: int, proximal: dict[int, FloatVector]
    ) -> dict[str, list[_Measured]]:
        continuations = [Continuation(one.policy, one.turn.prompt, one.turn.tokens) for one in examples]
        weighing = _weighing(examples, self.config.loss, max_tokens)
        measured: dict[str, list[_Measured]] = {}
        for batch in plan_micro_batches(continuations, self.micro_batch_tokens):
            with self._multi.rows(batch.adapters):
                scored = token_logprobs(self._model, self._multi, batch, continuations, self.config.temperature)
                losses = list(self._losses(batch, scored, examples, weighing, proximal))
                torch.stack([loss for _, loss, _ in losses]).sum().backward()
            for name, _, one in losses:
                measured.setdefault(name, []).append(one)
        return measured

    def _losses(
        self,
        batch: MicroBatch,
        scored: TokenLogprobs,
        examples: Sequence[Example],
        weighing: Mapping[str, _Weighing],
        proximal: dict[int, FloatVector],
    ) -> Iterator[tuple[str, torch.Tensor, _Measured]]:
        """One loss a policy of the micro-batch; remembers the log-probabilities of the first pass as proximal."""
        values, owned = scored.logprobs.detach().cpu().numpy(), scored.owners.cpu().numpy()
        owners = owned.tolist()
        for member in dict.fromkeys(owners):
            if member not in proximal:
                proximal[member] = values[owned == member]
        for name in dict.fromkeys(adapter for adapter in batch.adapters if adapter):
            members = [member for member in batch.members() if examples[member].policy == name]
            own = torch.tensor([examples[owner].policy == name for owner in owners], device=scored.logprobs.device)
            tokens = _tokens(scored.logprobs[own], members, examples, weighing[name], proximal)
            loss, statistics = LOSSES[self.config.loss.loss](tokens, self.config.loss, weighing[name].denominator)
            entropy = float(scored.entropies[own].mean())
            moved = _k3(tokens.proximal - tokens.behaviour)
            yield name, loss, _Measured(float(loss.detach()), entropy, moved, statistics)

    def _step(self, name: str, parts: Sequence[_Measured], norm: float) -> PolicyUpdate:
        rate = self._policies[name].step(norm)
        statistics = combined([part.statistics for part in parts])
        counts = [part.statistics.tokens for part in parts]
        entropy, moved = (np.average(values, weights=counts) for values in zip(*_means(parts), strict=True))
        loss = sum(part.loss for part in parts)
        return PolicyUpdate(loss, float(entropy), norm, rate, statistics.tokens, float(moved), statistics)


@dataclass(frozen=True, slots=True)
class _Measured:
    loss: float
    entropy: float
    moved: float
    statistics: LossStatistics


def _means(parts: Sequence[_Measured]) -> list[tuple[float, float]]:
    """What is averaged over the tokens of all micro-batches."""
    return [(part.entropy, part.moved) for part in parts]


def _k3(log_ratio: torch.Tensor) -> float:
    """Mean of r - 1 - log r over tokens that were sampled under the denominator of r (Schulman)."""
    return float((torch.expm1(log_ratio) - log_ratio).mean())


@dataclass(frozen=True, slots=True)
class _Weighing:
    """A policy's constants: the weight of a token of each of its examples, and the denominator of its loss."""

    weights: Mapping[int, float]
    denominator: float


def _weighing(examples: Sequence[Example], config: LossConfig, max_tokens: int) -> dict[str, _Weighing]:
    found = {}
    for name in dict.fromkeys(one.policy for one in examples):
        members = [index for index, one in enumerate(examples) if one.policy == name]
        lengths = [len(examples[index].turn.tokens) for index in members]
        aggregation = AGGREGATIONS[config.aggregation](lengths, max_tokens)
        weights = {
            index: weight * examples[index].weight for index, weight in zip(members, aggregation.weights, strict=True)
        }
        found[name] = _Weighing(weights, aggregation.denominator)
    return found


def _tokens(
    current: torch.Tensor,
    members: Sequence[int],
    examples: Sequence[Example],
    weighing: _Weighing,
    proximal: Mapping[int, FloatVector],
) -> Tokens:
    """The examples of one policy, one token after the other, as the loss wants them."""
    lengths = [len(examples[member].turn.tokens) for member in members]

    def flat(values: Sequence[FloatVector]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(values)).to(current.device)

    def spread(values: Sequence[float]) -> torch.Tensor:
        return torch.from_numpy(np.repeat(np.array(values, np.float32), lengths)).to(current.device)

    advantages = [
        examples[member].token_advantages
        if examples[member].token_advantages is not None
        else np.full(length, examples[member].advantage, np.float32)
        for member, length in zip(members, lengths, strict=True)
    ]
    return Tokens(
        current=current,
        proximal=flat([proximal[member] for member in members]),
        behaviour=flat([examples[member].turn.behaviour for member in members]),
        advantages=flat([value for value in advantages if value is not None]),
        mask=torch.ones(len(current), dtype=torch.bool, device=current.device),
        weights=spread([weighing.weights[member] for member in members]),
    )
