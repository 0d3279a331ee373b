"""Workers that really train: each a `QwenWorker` on the tiny model, with texts of its own."""

from __future__ import annotations

import math

import numpy as np

from fedmoe.datasets.tokens.packing import Block, BlockSampler, pack
from fedmoe.datasets.tokens.tokenized_sample import TokenizedSample
from fedmoe.experts import seed_of
from fedmoe.lora.adapter import FloatVector
from fedmoe.lora.manifest import Manifest
from fedmoe.models.base import load_base, load_tokenizer
from fedmoe.qwen_finetune import LoraConfig, QwenLoRAExpert, TrainingConfig
from fedmoe.qwen_worker import QwenWorker
from fedmoe.simulation.config import TrainingWork
from fedmoe.simulation.fleet import WorkerProfile, expert_name
from fedmoe.simulation.texts import texts, topic_shares
from fedmoe.simulation.work import FleetWork, Learned, LocalWorker

_BASE = "tiny"
_HELD_OUT_STREAM = 1_000_000


class TrainingWorker:
    """A `QwenWorker` that is asked for steps instead of seconds."""

    def __init__(self, worker: QwenWorker) -> None:
        self._worker = worker
        self.weights, self.load, self.rebase = worker.weights, worker.load, worker.rebase

    def train(self, steps: int) -> Learned:
        done = self._worker.train_for(math.inf, lambda: False, lambda _: None, max_steps=steps)
        return Learned(done.steps, done.tokens, done.mean_loss * done.tokens)


class TrainingFleet(FleetWork):
    """The texts of all workers, and a model that measures the held-out loss of every expert."""

    def __init__(self, work: TrainingWork, seed: int, experts: int) -> None:
        self._work, self._seed = work, seed
        self._tokenizer, _ = load_tokenizer(_BASE)
        even = [1.0 / work.topics] * work.topics
        self._held_out = [
            self._blocks(texts(seed, expert, even, work.held_out_texts, _HELD_OUT_STREAM)) for expert in range(experts)
        ]
        self._judge = self._model(0)

    @property
    def manifest(self) -> Manifest:
        return self._judge.manifest

    def worker(self, profile: WorkerProfile) -> LocalWorker:
        shares = topic_shares(self._seed, profile.number, self._work.topics, self._work.concentration)
        own = texts(self._seed, profile.expert, shares, self._work.texts, profile.number)
        sampler = BlockSampler(self._blocks(own), seed=profile.number)
        # Its own clock never moves: the virtual one counts its steps.
        return TrainingWorker(QwenWorker(self._model(profile.expert), sampler, clock=lambda: 0.0))

    def loss(self, expert: int, weights: FloatVector) -> float | None:
        self._judge.load_weights(weights)
        return self._judge.evaluate(self._held_out[expert], batch_size=16).loss

    def _model(self, expert: int) -> QwenLoRAExpert:
        work = self._work
        lora = LoraConfig(work.rank, 2.0 * work.rank, seed=seed_of(expert_name(expert)) % 2**63)
        training = TrainingConfig(
            learning_rate=work.learning_rate, warmup_steps=2, per_device_train_batch_size=work.batch_size
        )
        return QwenLoRAExpert(load_base(_BASE, "cpu", "fp32"), lora, training)

    def _blocks(self, lines: list[str]) -> list[Block]:
        samples = []
        for line in lines:
            ids = np.array(self._tokenizer(line)["input_ids"], np.int64)[: self._work.block_length]
            samples.append(TokenizedSample(ids, ids))
        return pack(samples, self._work.block_length, self._seed)
