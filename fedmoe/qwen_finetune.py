"""`QwenLoRAExpert`: a base model with one LoRA adapter and its optimizer, trained on packed batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import structlog
import torch
from numpy.typing import NDArray
from transformers import GenerationConfig

from fedmoe.datasets.tokens.packing import Batch, Block, collate
from fedmoe.lora.adapter import Adapter, FloatVector
from fedmoe.lora.manifest import Manifest
from fedmoe.models.base import LoadedBase, pad_token, stop_tokens
from fedmoe.models.device_faults import free_unused, halve_batches, is_out_of_memory
from fedmoe.models.lora_layers import attach
from fedmoe.models.packed import check_model, count_targets, enable_checkpointing, token_losses, without_padding
from fedmoe.models.parallel import ProcessGroup
from fedmoe.models.stop_tokens import strip_stop_tokens
from fedmoe.models.training_config import LoraConfig, ScheduleEndedError, TrainingConfig, learning_rate_at
from fedmoe.runtime.device import LossScale, autocast

__all__ = [
    "EvaluationResult",
    "LoraConfig",
    "NonFiniteError",
    "OptimizerArrays",
    "QwenLoRAExpert",
    "ScheduleEndedError",
    "StepRecord",
    "TrainingConfig",
]

_log = structlog.get_logger("fedmoe.worker")
OptimizerArrays = dict[str, NDArray[np.generic]]
_MOMENTS = ("exp_avg", "exp_avg_sq")


class NonFiniteError(ArithmeticError):
    """A loss or gradient that is not a number; the weights are as before the step."""


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step: its number counted from 1, mean loss in nats per labelled token, tokens over all ranks, gradient norm
    before clipping, learning rate, seconds.
    """

    step: int
    loss: float
    tokens: int
    grad_norm: float
    learning_rate: float
    seconds: float


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """Mean loss in nats per predicted token, the number of those, and each block's own mean (NaN without labels)."""

    loss: float
    tokens: int
    block_losses: tuple[float, ...]


class QwenLoRAExpert:
    """One expert on its base model. Any causal language model of transformers with sdpa attention will do.

    With a ProcessGroup every rank makes the same calls, each with its own batches; all keep the same weights. Not
    thread-safe: call everything from the thread that trains.
    """

    def __init__(
        self,
        base: LoadedBase,
        lora: LoraConfig | None = None,
        training: TrainingConfig | None = None,
        group: ProcessGroup | None = None,
    ) -> None:
        check_model(base.model)
        self.base = base
        self.lora = lora or LoraConfig()
        self.training = training or TrainingConfig()
        self.group = group or ProcessGroup(device=base.device)
        shape = self.lora
        self.attached = attach(
            base.model, shape.target_modules, shape.r, shape.lora_alpha, shape.lora_dropout, shape.seed
        )
        self.group.broadcast_(self.attached.parameter.data)
        #: Whether micro-batches are half as large as asked for, since memory once ran out.
        self.halves = False
        self._sum_dtype = torch.float32 if base.device.type == "mps" else torch.float64
        self._reset_optimizer()
        if self.training.gradient_checkpointing:
            enable_checkpointing(base.model)

    def _reset_optimizer(self) -> None:
        self.step = 0
        self._scale = LossScale.start(self.base.dtype)
        rate, decay = self.training.learning_rate, self.training.weight_decay
        self._optimizer = torch.optim.AdamW([self.attached.parameter], lr=rate, weight_decay=decay, fused=True)

    @property
    def manifest(self) -> Manifest:
        """The base model and the adapter's shape, which updates of this expert must fit."""
        return Manifest(self.base.identity, self.attached.layout, float(self.attached.alpha))

    @property
    def finished(self) -> bool:
        """Whether `max_steps` steps are done."""
        return bool(self.training.max_steps) and self.step >= self.training.max_steps

    def weights(self) -> FloatVector:
        """A copy of the adapter's flat weights, float32."""
        return self.attached.read()

    def load_weights(self, flat: FloatVector) -> None:
        """Replace the adapter's flat weights; the optimizer keeps its state."""
        self.attached.write(flat)

    def load_adapter(self, adapter: Adapter) -> None:
        """Take over an adapter for the same modules; one of another rank (a gateway) starts a new optimizer."""
        before = self.attached.parameter
        self.attached.load(adapter)
        if self.attached.parameter is not before:
            self._reset_optimizer()

    def train_step(self, batches: Sequence[Batch]) -> StepRecord:
        """One optimizer step over all `batches` (micro-batches) of all ranks, each labelled token counting the same.

        Raises NonFiniteError, with weights and optimizer unchanged, ScheduleEndedError beyond `max_steps`, and
        ValueError when no token is labelled.
        """
        started = time.perf_counter()
        rate = learning_rate_at(self.training, self.step)
        count = torch.tensor([sum(map(count_targets, batches))], dtype=torch.int64, device=self.base.device)
        tokens = int(self.group.sum_(count).item())
        if tokens == 0:
            raise ValueError("no token of this step is labelled; check the data and the masking of prompts")
        self.base.model.train()
        loss, norm = self._gradient(batches, tokens)
        limit = self.training.max_grad_norm
        if limit and norm > limit:
            self.attached.grad.mul_(limit / norm)
        self._optimizer.param_groups[0]["lr"] = rate
        self._optimizer.step()
        self._scale = self._scale.after_step()
        self.step += 1
        return StepRecord(self.step, loss, tokens, norm, rate, time.perf_counter() - started)

    def evaluate(
        self, blocks: Sequence[Block], batch_size: int, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> EvaluationResult:
        """The mean loss over `blocks`, in evaluation mode and without gradient; raises ValueError without labels.

        `progress` gets the blocks done so far and their number.
        """
        sums = np.zeros(len(blocks))
        counts = np.zeros(len(blocks), np.int64)
        self.base.model.eval()
        with torch.no_grad(), autocast(self.base.device, self.base.dtype):
            for start in range(0, len(blocks), batch_size):
                batch = collate(blocks[start : start + batch_size])
                losses, rows = token_losses(self.base.model, batch, self.base.device)
                places = start + rows.cpu().numpy()
                np.add.at(sums, places, losses.double().cpu().numpy())
                np.add.at(counts, places, 1)
                progress(min(start + batch_size, len(blocks)), len(blocks))
        tokens = int(counts.sum())
        if tokens == 0:
            raise ValueError(f"no token of these {len(blocks)} blocks is labelled; there is nothing to evaluate")
        means = [float(total / count) if count else float("nan") for total, count in zip(sums, counts, strict=True)]
        return EvaluationResult(float(sums.sum() / tokens), tokens, tuple(means))

    def evaluate_ranks(
        self, blocks: Sequence[Block], batch_size: int, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> EvaluationResult:
        """The mean loss over the blocks of all ranks, each with its own or none; `block_losses` are this rank's.

        Nothing that training depends on changes: no weight, no gradient, no random state.
        """
        mine = self.evaluate(blocks, batch_size, progress) if blocks else EvaluationResult(0.0, 0, ())
        if self.group.world_size == 1:
            return mine
        sums = torch.tensor([mine.loss * mine.tokens, mine.tokens], dtype=self._sum_dtype, device=self.base.device)
        nats, tokens = self.group.sum_(sums).tolist()
        return EvaluationResult(nats / tokens, int(tokens), mine.block_losses)

    def generate(self, prompt: str, max_new_tokens: int = 64, chat: bool = True) -> str:
        """The greedy answer to `prompt` as a user turn of the chat template; without `chat`, its plain continuation."""
        tokenizer, model = self.base.tokenizer, self.base.model
        if chat and not tokenizer.chat_template:
            raise ValueError(f"the tokenizer of {self.base.identity.name} has no chat template; pass chat=False")
        if chat:
            turn = [{"role": "user", "content": prompt}]
            prompt = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat).to(self.base.device)
        stops = stop_tokens(self.base)
        ends = {"eos_token_id": sorted(stops), "pad_token_id": pad_token(self.base)}
        settings = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, **ends)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        model.eval()
        with torch.no_grad(), autocast(self.base.device, self.base.dtype):
            output = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
        answer = strip_stop_tokens(output[0, ids.shape[1] :].tolist(), stops)
        return str(tokenizer.decode(answer, skip_special_tokens=True))

    @contextmanager
    def bare_base(self) -> Iterator[LoadedBase]:
        """The base model as if no adapter were attached, for evaluation, while the context is open."""
        self.base.model.eval()
        with self.attached.inactive():
            yield self.base

    def optimizer_state(self) -> OptimizerArrays:
        """Everything besides the weights that the next step depends on, as arrays that safetensors can hold.

        `exp_avg` and `exp_avg_sq` float32 (size,), `step` int64 (1,), `loss_scale` float64 (value, good steps), and
        with dropout `random_state` uint8.
        """
        parameter = self.attached.parameter
        state = self._optimizer.state.get(parameter, {})
        arrays: OptimizerArrays = {
            name: state.get(name, torch.zeros_like(parameter)).detach().cpu().numpy().copy() for name in _MOMENTS
        }
        arrays["step"] = np.array([self.step], np.int64)
        arrays["loss_scale"] = np.array([self._scale.value, self._scale.good_steps], np.float64)
        if self.lora.lora_dropout:
            on_cuda = self.base.device.type == "cuda"
            random_state = torch.cuda.get_rng_state(self.base.device) if on_cuda else torch.get_rng_state()
            arrays["random_state"] = random_state.cpu().numpy().copy()
        return arrays

    def load_optimizer_state(self, state: Mapping[str, NDArray[np.generic]]) -> None:
        """Go on from what `optimizer_state` gave; raises ValueError when it is of another shape."""
        parameter = self.attached.parameter
        shapes = dict.fromkeys(_MOMENTS, tuple(parameter.shape)) | {"step": (1,), "loss_scale": (2,)}
        for name, shape in shapes.items():
            got = state[name].shape if name in state else "nothing"
            if got != shape:
                raise ValueError(f"optimizer state {name}: expected shape {shape}, got {got}")
        if self.lora.lora_dropout and "random_state" not in state:
            raise ValueError("optimizer state has no random_state, which dropout needs to resume")
        self._reset_optimizer()
        self.step = int(state["step"][0])
        value, good_steps = (float(number) for number in state["loss_scale"])
        self._scale = LossScale(value, int(good_steps), self._scale.dynamic)
        moments = {name: torch.tensor(state[name], device=parameter.device) for name in _MOMENTS}
        count = torch.tensor(float(self.step), dtype=torch.float32, device=parameter.device)
        self._optimizer.state[parameter] = {"step": count, **moments}
        if self.lora.lora_dropout and self.base.device.type == "cuda":
            torch.cuda.set_rng_state(torch.tensor(state["random_state"]), self.base.device)
        elif self.lora.lora_dropout:
            torch.set_rng_state(torch.tensor(state["random_state"]))

    def _gradient(self, batches: Sequence[Batch], tokens: int) -> tuple[float, float]:
        # Every rank sees the same summed loss and gradient, so all of them retry, go on or raise alike.
        while True:
            total = self.group.sum_(self._accumulated(batches, tokens))
            gradient = self.group.sum_(self.attached.grad).div_(self._scale.value)
            loss, norm = float(total.item()) / tokens, float(torch.linalg.vector_norm(gradient).item())
            if np.isfinite(loss) and np.isfinite(norm):
                return loss, norm
            smaller = self._scale.after_overflow() if np.isfinite(loss) else None
            if smaller is None:
                self.attached.zero_grad()
                raise NonFiniteError(
                    f"step {self.step + 1}: loss {loss}, gradient norm {norm}; the weights were not changed. "
                    "Check the data of this step, lower learning_rate, or train in fp32"
                )
            self._scale = smaller

    def _accumulated(self, batches: Sequence[Batch], tokens: int) -> torch.Tensor:
        """The summed loss, with its gradient; where memory runs out, from now on in micro-batches half as large, once.

        All ranks decide alike. Raises what the device raised where that was done before or cannot be done.
        """
        problem: BaseException | None = None
        try:
            self.attached.zero_grad()
            total = self._accumulate(halve_batches(batches) or batches if self.halves else batches, tokens)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or self.halves or halve_batches(batches) is None:
                raise
            problem = error.with_traceback(None)  # frames hold the tensors that took the room
        if not self.group.any_flag(problem is not None):
            return total
        self.halves = True
        _log.warning("smaller_micro_batches", reason=str(problem or "another process had no memory left")[:300])
        free_unused()
        return self._accumulated(batches, tokens)

    def _accumulate(self, batches: Sequence[Batch], tokens: int) -> torch.Tensor:
        total = torch.zeros((), dtype=self._sum_dtype, device=self.base.device)
        for batch in batches:
            if count_targets(batch) == 0:
                continue
            with autocast(self.base.device, self.base.dtype):
                losses, _ = token_losses(self.base.model, without_padding(batch), self.base.device)
            summed = losses.sum()
            (summed * (self._scale.value / tokens)).backward()
            total += summed.detach()
        return total
