"""AReaL as the learner of an arena run (`[learning] kind = "areal"`), with a process for every policy."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from fedmoe.areal.config import ArealConfig, ArealError
from fedmoe.areal.learner import ArealLearner
from fedmoe.arena.config import ArenaConfig
from fedmoe.arena.learning.config import LossConfig
from fedmoe.arena.learning.learner import AdamState, PolicyLearner, PolicyUpdate
from fedmoe.arena.learning.loss import LossStatistics
from fedmoe.arena.rollout.episodes import Example
from fedmoe.lora.adapter import Adapter, FloatVector, Layout
from fedmoe.models.base import LoadedBase, prepare_base
from fedmoe.models.multilora import MultiLora

_PROBE = "import importlib.util, sys; sys.exit(importlib.util.find_spec('areal') is None)"


def check_environment(python: str | None) -> None:
    """Refuse an interpreter without AReaL, before anything is loaded, with ArealError; None is this interpreter."""
    interpreter = python or sys.executable
    try:
        installed = subprocess.run([interpreter, "-c", _PROBE], timeout=300, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ArealError(f"[learning] python: {interpreter} cannot be started: {error}") from error
    if not installed:
        raise ArealError(
            f"{interpreter} has no AReaL, which [learning] kind = 'areal' needs; make its environment with "
            "scripts/setup_areal.sh .venv-areal and set python = '.venv-areal/bin/python' in [learning]"
        )


def areal_config(config: ArenaConfig) -> ArealConfig:
    """The configuration of one policy's learner; raises ArealError for settings that AReaL has no equal of."""
    learning, shape = config.learning, config.policies
    if not shape.scaled_alpha.is_integer():
        raise ArealError(f"[policies] alpha must be a whole number for AReaL, got {shape.scaled_alpha:g}")
    if config.engine.kind != "transformers" and learning.temperature != 1.0:
        raise ArealError(
            f"[engine] kind = {config.engine.kind!r} is checked by log-probabilities at temperature 1, which AReaL "
            f"computes at that of the rollouts only, here {learning.temperature:g}; set temperature = 1.0 in [learning]"
        )
    return ArealConfig(
        str(prepare_base(config.base_model).resolve()),
        shape.rank,
        int(shape.scaled_alpha),
        learning.learning_rate,
        learning.weight_decay,
        learning.max_grad_norm,
        LossConfig(learning.loss, learning.aggregation, learning.clip_low, learning.clip_high),
        learning.temperature,
        learning.epochs,
        learning.micro_batch_tokens,
        config.seed,
    )


@contextmanager
def areal_learner(config: ArenaConfig, folder: Path, base: LoadedBase, multi: MultiLora) -> Iterator[ArealRunLearner]:
    """The learner of a run, which logs to `folder`/areal; its processes end with the block."""
    with ExitStack() as processes:
        yield ArealRunLearner(config, folder / "areal", multi, processes)


class ArealRunLearner(PolicyLearner):
    """Trains every policy by AReaL in a process of its own, which holds a copy of the base model in float32.

    Policies are updated one after the other: after a failure those before it are updated already, and the run goes on
    from its newest checkpoint. The processes keep the `micro_batch_tokens` they began with.
    """

    def __init__(self, config: ArenaConfig, folder: Path, multi: MultiLora, processes: ExitStack) -> None:
        self.micro_batch_tokens = config.learning.micro_batch_tokens
        self._config, self._areal = config.learning, areal_config(config)
        self._folder, self._multi, self._processes = folder, multi, processes
        self._learners: dict[str, ArealLearner] = {}
        self._rates: dict[str, float] = {}
        self._steps: dict[str, int] = {}

    def layout(self, rank: int) -> Layout:
        return self._multi.layout(rank)

    def add(self, name: str, adapter: Adapter) -> None:
        """Start the process of a new policy, which starts from `adapter`."""
        python = Path(self._config.python) if self._config.python else None
        learner = ArealLearner(self._areal, self._folder / name, start=adapter, python=python)
        self._learners[name] = self._processes.enter_context(learner)
        self._rates[name], self._steps[name] = self._config.learning_rate, 0

    def adapter(self, name: str) -> Adapter:
        return self._learners[name].adapter()

    def score(self, name: str, prompt: tuple[int, ...], tokens: tuple[int, ...]) -> FloatVector:
        """The log-probability of each of `tokens` after `prompt`, at the rollouts' temperature, float32 (T,)."""
        return self._learners[name].score([(prompt, tokens)])[0]

    def replace(self, name: str, adapter: Adapter, state: AdamState | None = None) -> None:
        """Give a policy other factors of the same shape (a copy of a better one, a checkpoint)."""
        learner = self._learners[name]
        learner.replace(adapter, learner.version + 1, state)
        self._steps[name] = state.steps if state else 0

    def optimizer_state(self, name: str) -> AdamState:
        return self._learners[name].optimizer_state()

    def learning_rate(self, name: str) -> float:
        return self._rates[name]

    def set_learning_rate(self, name: str, rate: float) -> None:
        self._rates[name] = rate

    def update(self, examples: Sequence[Example], max_tokens: int) -> dict[str, PolicyUpdate]:
        """Train every policy that has examples; raises ArealError for a gradient that is not finite."""
        names = dict.fromkeys(example.policy for example in examples)
        return {name: self._update(name, [example for example in examples if example.policy == name]) for name in names}

    def _update(self, name: str, examples: Sequence[Example]) -> PolicyUpdate:
        learner, warmup = self._learners[name], max(1, self._config.warmup_steps)
        learner.set_learning_rate(self._rates[name] * min(1.0, (self._steps[name] + 1) / warmup))
        update = learner.update(examples)
        if not update.steps:
            raise ArealError(
                f"AReaL took no step for {name}: its gradient is not finite. Lower learning_rate, and go on from the "
                "newest checkpoint with --resume"
            )
        self._steps[name] += update.steps
        statistics = LossStatistics(
            tokens=update.tokens,
            clip_fraction=update.clip_fraction,
            gap_mean=update.gap_mean,
            gap_max=update.gap_max,
            kl_k1=update.kl_k1,
            kl_k3=max(update.kl_k1, 0.0),  # AReaL has the first estimate only; both are of one divergence
            importance_weight=update.importance_weight,
            masked_fraction=update.masked_fraction,
        )
        norm, rate = update.gradient_norm, update.learning_rate
        return PolicyUpdate(update.loss, update.entropy, norm, rate, update.tokens, update.moved, statistics)
