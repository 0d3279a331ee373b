"""AReaL's PPO actor on one adapter, in this process. Needs AReaL; a process holds one actor at most."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import transformers
from areal.api import FinetuneSpec, SaveLoadMeta
from areal.api.cli_args import MicroBatchSpec, OptimizerConfig, PPOActorConfig, RejectionSamplingConfig
from areal.engine.fsdp_engine import FSDPPPOActor
from areal.infra.platforms import current_platform

from fedmoe.areal.batch import ExampleBatch, Sequences, TensorRow, ppo_row, scaled_advantages, sequence_row
from fedmoe.areal.config import ArealConfig, ArealError, check_base_folder
from fedmoe.areal.packing_check import check_isolation
from fedmoe.areal.statistics import ArealUpdate, summarise
from fedmoe.arena.learning.loss import WEIGHT_CAP
from fedmoe.lora.adapter import Adapter, FloatArray, FloatMatrix

_MOMENTS = {"first_moment": "exp_avg", "second_moment": "exp_avg_sq"}
_FACTORS = ("lora_A", "lora_B")
_PREFIX, _SUFFIX = "base_model.model.", ".default.weight"


class PackingActor(FSDPPPOActor):  # type: ignore[misc]
    """AReaL's actor with attention masks that keep packed sequences apart without FlashAttention.

    AReaL 1.0.4 hands transformers a mask of `{"full_attention": None}`: under `sdpa` the sequences of a micro-batch
    then see each other (0.17 to 2.3 nats), and Llama models fail on it. With no mask at all transformers finds the
    borders from the position ids, which start again at 0 with each sequence.
    """

    def _prepare_mb_list(self, input_: dict[str, object]) -> object:
        prepared = super()._prepare_mb_list(input_)
        for micro_batch in (*prepared.mbs, *prepared.padded_mbs):
            micro_batch["attention_mask"] = None
        return prepared


class ArealActor:
    """One policy in training: its adapter, optimizer and version.

    `engine` makes AReaL's actor from its configuration. Raises `ArealError` for a base model that cannot be used and
    `LeakError` when batched sequences are not computed as they are alone.
    """

    def __init__(
        self, config: ArealConfig, version: int = 0, engine: Callable[[PPOActorConfig], FSDPPPOActor] = PackingActor
    ) -> None:
        check_base_folder(Path(config.base_folder))
        self._config = config
        self._settings = actor_settings(config)
        _join_alone()
        torch.manual_seed(config.seed)
        self._engine = engine(self._settings)
        self._engine.create_process_group()
        self._engine.initialize(None, FinetuneSpec(1, 1, 1))
        self._engine.logger.setLevel("WARNING")  # it would write a line for every forward pass
        self._engine.set_version(version)
        self._check()

    def _check(self) -> None:
        def score(sequences: Sequence[Sequence[int]]) -> Sequence[FloatArray]:
            return self.score(Sequences.of([(ids[:1], ids[1:]) for ids in sequences]))

        try:
            check_isolation(score, self._engine.model_config.vocab_size)
        except (AttributeError, TypeError, RuntimeError) as error:
            if isinstance(error, ArealError):
                raise
            raise ArealError(
                f"AReaL cannot run a base model of type {self._engine.model_config.model_type} under transformers "
                f"{transformers.__version__}: {type(error).__name__}: {error}"
            ) from error

    @property
    def version(self) -> int:
        """The version of the adapter: it rises with every update that moved it."""
        return int(self._engine.get_version())

    def score(self, sequences: Sequences) -> list[FloatArray]:
        """The log-probability of every token after its prompt, at the configured temperature: float32 (T,) each."""
        return _sampled(self._log_probabilities(sequences), sequences)

    def _log_probabilities(self, sequences: Sequences) -> list[torch.Tensor]:
        vocabulary, ids = self._engine.model_config.vocab_size, np.concatenate([sequences.prompts, sequences.tokens])
        if ids.min() < 0 or ids.max() >= vocabulary:
            raise ArealError(f"token ids lie in [0, {vocabulary}) for this base model, got {ids.min()} to {ids.max()}")
        rows = [sequence_row(prompt, tokens) for prompt, tokens in sequences]
        self._plan_micro_batches(rows)
        scores: list[torch.Tensor] = self._engine.compute_logp([dict(row) for row in rows])
        return scores

    def _plan_micro_batches(self, rows: Sequence[TensorRow]) -> None:
        longest = max(row["input_ids"].shape[1] for row in rows)
        limit = self._config.tokens_per_micro_batch
        self._settings.mb_spec = MicroBatchSpec(
            n_mbs=len(rows) if limit is None else 1, max_tokens_per_mb=max(limit or 0, longest)
        )

    def update(self, batch: ExampleBatch) -> ArealUpdate:
        """Learn from a batch; the proximal log-probabilities are those before the first optimizer step."""
        proximal = self._log_probabilities(batch.sequences)
        exported: list[Mapping[str, float]] = []
        for _ in range(self._config.epochs):
            rows = self._rows(batch, proximal)
            self._plan_micro_batches(rows)
            self._engine.ppo_update(rows)
            self._engine.lr_scheduler_step()
            exported.append(self._engine.export_stats())
        log_ratio = np.concatenate(_sampled(proximal, batch.sequences)) - batch.behaviour
        summary = summarise(exported, log_ratio, self.version, len(batch.sequences))
        if summary.steps:
            self._engine.set_version(self.version + 1)
        return summary

    def _rows(self, batch: ExampleBatch, proximal: Sequence[torch.Tensor]) -> list[TensorRow]:
        behaviour = batch.sequences.split(batch.behaviour)
        advantages = scaled_advantages(batch, self._config.loss.aggregation)
        facts = zip(batch.rewards, batch.versions, strict=True)
        return [
            ppo_row(*sequence, old, advantage, before, float(reward), int(version))
            for sequence, old, advantage, before, (reward, version) in zip(
                batch.sequences, behaviour, advantages, proximal, facts, strict=True
            )
        ]

    def save(self, folder: Path) -> None:
        """Write the adapter as a PEFT folder, with AReaL's own writer."""
        self._engine.save(SaveLoadMeta(path=str(folder), weight_format="hf", with_optim=False))

    def adapter(self) -> Adapter:
        """The adapter as it is now."""
        return self._as_adapter(lambda parameter: parameter)

    def load(self, adapter: Adapter, version: int) -> None:
        """Continue from another adapter of the same rank, alpha and modules, with a fresh optimizer."""
        with torch.no_grad():
            for name, parameter in self._parameters().items():
                _local(parameter).copy_(torch.from_numpy(_factor(adapter, name).copy()))
        self._engine.optimizer.state.clear()
        self._engine.set_version(version)

    def set_learning_rate(self, rate: float) -> None:
        """Use another learning rate from now on."""
        self._engine.lr_scheduler.base_lrs = [rate] * len(self._engine.optimizer.param_groups)
        self._engine.lr_scheduler.step()

    def state(self) -> dict[str, FloatArray]:
        """The optimizer: `first_moment`, `second_moment` in the order of the adapter's layout, and `steps` (1,)."""
        state = self._engine.optimizer.state
        if not state:
            nothing = np.zeros(self.adapter().layout.size, np.float32)
            return {"first_moment": nothing, "second_moment": nothing, "steps": np.zeros(1, np.float32)}
        arrays = {name: self._moment(key) for name, key in _MOMENTS.items()}
        steps = {float(_local(entry["step"])) for entry in state.values()}
        return {**arrays, "steps": np.array([steps.pop()], np.float32)}

    def restore(self, state: Mapping[str, FloatArray]) -> None:
        """Restore what `state` gave; `load` the adapter before."""
        optimizer, own = self._engine.optimizer, self.adapter()
        wrong = [name for name in _MOMENTS if name not in state or state[name].shape != own.flat.shape]
        if wrong or "steps" not in state:
            raise ArealError(f"the state of an optimizer of {own.layout.size} numbers does not fit: {wrong or 'steps'}")
        moments = {key: Adapter(own.layout, own.alpha, state[name]) for name, key in _MOMENTS.items()}
        for name, parameter in self._parameters().items():
            entry = {"step": torch.tensor(float(state["steps"][0]), device=_local(parameter).device)}
            for key, moment in moments.items():
                entry[key] = torch.zeros_like(parameter, requires_grad=False)
                _local(entry[key]).copy_(torch.from_numpy(_factor(moment, name).copy()))
            optimizer.state[parameter] = entry

    def _parameters(self) -> dict[str, torch.nn.Parameter]:
        named = self._engine.model.named_parameters()
        return {name: parameter for name, parameter in named if parameter.requires_grad}

    def _moment(self, key: str) -> FloatArray:
        state = self._engine.optimizer.state
        return self._as_adapter(lambda parameter: state[parameter][key]).flat

    def _as_adapter(self, value_of: Callable[[torch.nn.Parameter], torch.Tensor]) -> Adapter:
        factors: dict[str, dict[str, FloatMatrix]] = {}
        for name, parameter in self._parameters().items():
            module, factor = _place(name)
            factors.setdefault(module, {})[factor] = _local(value_of(parameter)).detach().float().cpu().numpy()
        pairs = {module: (pair["lora_A"], pair["lora_B"]) for module, pair in factors.items()}
        return Adapter.from_factors(pairs, float(self._config.alpha))

    def close(self) -> None:
        """Release the model and the process group."""
        self._engine.destroy()
        if dist.is_initialized():
            dist.destroy_process_group()


def actor_settings(config: ArealConfig) -> PPOActorConfig:
    """AReaL's configuration for ours: decoupled PPO, float32, no reward shaping, no normalisation of its own.

    Behaviour log-probabilities enter AReaL's loss through `rejection_sampling` only; without it they are ignored.
    """
    loss = config.loss
    return PPOActorConfig(
        experiment_name="fedmoe",
        trial_name="arena",
        path=config.base_folder,
        backend="fsdp:d1",
        attn_impl="sdpa",
        dtype="float32",
        optimizer_dtype="float32",
        disable_dropout=True,
        temperature=config.temperature,
        use_lora=True,
        lora_rank=config.rank,
        lora_alpha=config.alpha,
        target_modules=["all-linear"],
        weight_update_mode="disk",
        optimizer=OptimizerConfig(
            type="adam",
            lr=config.learning_rate,
            beta1=0.9,
            beta2=0.95,  # that of the other learner
            eps=1e-8,
            weight_decay=config.weight_decay,
            gradient_clipping=config.max_grad_norm,
            lr_scheduler_type="constant",
            warmup_steps_proportion=0.0,
        ),
        ppo_n_minibatches=1,
        eps_clip=loss.clip_low,
        eps_clip_higher=loss.clip_high,
        c_clip=None,
        kl_ctl=0.0,
        use_decoupled_loss=True,
        rejection_sampling=RejectionSamplingConfig(level="token", action="mask", metric="ratio", upper=WEIGHT_CAP),
    )


def _join_alone() -> None:
    """A process group of one, without a network port to be raced for."""
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    if dist.is_initialized():
        raise ArealError("this process has a process group already; one AReaL actor needs a process of its own")
    dist.init_process_group(current_platform.communication_backend, store=dist.HashStore(), rank=0, world_size=1)


def _sampled(rows: Sequence[torch.Tensor], sequences: Sequences) -> list[FloatArray]:
    """Of each row (1, L) of log-probabilities those of the sampled tokens: position t is about token t + 1."""
    lengths = sequences.token_lengths.tolist()
    return [row[0, -length - 1 : -1].cpu().numpy() for row, length in zip(rows, lengths, strict=True)]


def _local(tensor: torch.Tensor) -> torch.Tensor:
    # One process holds everything, so the local part of a distributed tensor is all of it.
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _place(parameter: str) -> tuple[str, str]:
    """Module and factor in PEFT's name of a parameter."""
    name = parameter.removeprefix(_PREFIX).removesuffix(_SUFFIX)
    module, _, factor = name.rpartition(".")
    if factor not in _FACTORS or len(name) + len(_PREFIX) + len(_SUFFIX) != len(parameter):
        raise ArealError(f"{parameter} trains but is no factor of plain LoRA")
    return module, factor


def _factor(adapter: Adapter, parameter: str) -> FloatMatrix:
    module, factor = _place(parameter)
    return adapter.module(module)[_FACTORS.index(factor)]
