"""The plan of a worker: sizes against what is really encoded, sums that add up, and what is not known yet."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from fedmoe.config import WorkerConfig
from fedmoe.lora.adapter import Layout
from fedmoe.lora.codec import WIRE_DTYPES, WireDtype, encode, encoded_size
from fedmoe.models.known_bases import KNOWN_BASES
from fedmoe.models.stored_base import StoredBase
from fedmoe.worker.plan import Machine, worker_plan

NEEDED = {"coordinator_url": "http://127.0.0.1:5000", "worker_id": "w1", "specialty": "python", "dataset": "a.jsonl"}
SMOLLM2 = StoredBase("smollm2", KNOWN_BASES["smollm2"], None)
MACHINE = Machine("cpu", "fp32", 6 << 30)


def config(**given: object) -> WorkerConfig:
    return WorkerConfig(**NEEDED | given)  # type: ignore[arg-type]


@pytest.mark.parametrize("wire_dtype", WIRE_DTYPES)
def test_a_push_has_the_size_that_is_told(wire_dtype: WireDtype) -> None:
    assert SMOLLM2.shape is not None
    layout = Layout(SMOLLM2.shape.modules[:14], 3)
    flat = np.random.default_rng(0).normal(size=layout.size).astype(np.float32)
    assert encoded_size(layout, wire_dtype) == len(encode(layout, flat, wire_dtype))


def test_the_plan_of_a_known_model_is_whole() -> None:
    plan = worker_plan(config(base_model="smollm2", wire_dtype="int8"), SMOLLM2, None, 1.0, MACHINE)
    assert (plan.modules, plan.trainable_parameters, plan.base_parameters) == (210, 4_884_480, 134_515_008)
    assert plan.max_length == 1024
    memory, traffic = plan.memory, plan.traffic
    assert memory is not None
    assert traffic is not None
    assert memory.weights == 4 * (134_515_008 + 4_884_480)
    assert memory.gradients_and_optimizer == 12 * 4_884_480
    assert memory.total == memory.weights + memory.gradients_and_optimizer + memory.activations
    assert memory.fits
    assert traffic.upload_gb_per_hour == pytest.approx(360 * traffic.push_bytes / 1e9)
    assert 1 < traffic.push_bytes / 4_884_480 < 1.1
    assert 4 < traffic.answer_bytes / 4_884_480 < 4.1
    assert plan.first_push_seconds == 10
    assert json.loads(json.dumps(plan.as_json()))["memory"]["available"] == 6 << 30
    text = "\n".join(plan.lines())
    for words in (
        "python on smollm2",
        "4,884,480 trainable",
        "GiB = weights 0.52 +",
        "(int8) every 10 s",
        "first push: 10 s",
    ):
        assert words in text


def test_what_is_too_much_is_said() -> None:
    small = worker_plan(config(), SMOLLM2, None, 1.0, replace(MACHINE, available=1 << 30))
    assert small.as_json()["fits"] is False
    assert "1.00 are free: too little" in "\n".join(small.lines())


def test_the_coordinators_interval_holds_where_it_is_longer() -> None:
    plan = worker_plan(config(sync_interval=10), SMOLLM2, None, 60.0, MACHINE)
    assert plan.first_push_seconds == 60
    assert plan.traffic is not None
    assert plan.traffic.sync_interval == 60


def test_half_the_precision_takes_half_the_weights_and_checkpointing_fewer_activations() -> None:
    plan = worker_plan(config(), SMOLLM2, None, 1.0, MACHINE).memory
    half = worker_plan(config(), SMOLLM2, None, 1.0, replace(MACHINE, dtype="bf16")).memory
    fewer = worker_plan(config(gradient_checkpointing=True), SMOLLM2, None, 1.0, MACHINE).memory
    assert plan is not None
    assert half is not None
    assert fewer is not None
    assert plan.weights - half.weights == 2 * 134_515_008
    assert fewer.activations < plan.activations
    assert fewer.weights == plan.weights


@pytest.mark.parametrize("base", [None, StoredBase("here", {"model_type": "other"}, None)])
def test_of_an_unknown_model_the_rest_is_planned(base: StoredBase | None) -> None:
    """What the federation has is known all the same."""
    plan = worker_plan(config(), base, None, 1.0, MACHINE)
    assert (plan.memory, plan.traffic, plan.trainable_parameters) == (None, None, None)
    assert plan.as_json()["fits"] is None
    assert "\n".join(plan.lines()).count("known once the base model is loaded") == 2
    assert SMOLLM2.shape is not None
    theirs = Layout(SMOLLM2.shape.modules, 8)
    joined = worker_plan(config(lora_r=8), base, theirs, 1.0, MACHINE)
    assert joined.trainable_parameters == theirs.size
    assert joined.traffic is not None
