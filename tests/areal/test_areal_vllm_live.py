"""Our tasks, AReaL's rollouts and an unmodified vLLM server together: `-m 'areal and vllm'`, in AReaL's environment."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from areal_cases import COUNTING

from fedmoe.areal.batch import TensorRow
from fedmoe.areal.config import ArealConfig
from fedmoe.areal.learner import ArealLearner
from fedmoe.areal.rewards import episode_rows
from fedmoe.inference.vllm.server import SERVED_NAME, VllmServer, VllmSettings
from fedmoe.lora.adapter import Adapter
from fedmoe.lora.formats import peft_files

if TYPE_CHECKING:
    from fedmoe.areal.stock_vllm import StockVllmEngine

pytestmark = [pytest.mark.areal, pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]
RANK, GAP = 8, 1e-3  # nats between vLLM and AReaL, both float32


@pytest.fixture
def smollm2() -> Path:
    from fedmoe.models.base import prepare_base

    return prepare_base("smollm2")


@pytest.fixture
def server(smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[VllmServer]:
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")  # pause and resume are routes of this mode
    settings = VllmSettings(Path(os.environ["FEDMOE_VLLM_PYTHON"]), smollm2, max_loras=3, max_rank=RANK)
    with VllmServer(settings, tmp_path / "server.log") as one:
        yield one


@pytest.fixture
def engine(server: VllmServer, tmp_path: Path) -> Iterator[StockVllmEngine]:
    from areal.api.cli_args import InferenceEngineConfig, NameResolveConfig
    from areal.utils import name_resolve

    from fedmoe.areal.stock_vllm import StockVllmEngine

    name_resolve.reconfigure(NameResolveConfig(type="nfs", nfs_record_root=str(tmp_path / "names")))
    config = InferenceEngineConfig(
        experiment_name="fedmoe",
        trial_name=f"live-{os.getpid()}",
        backend="vllm:d1",
        use_lora=True,
        max_concurrent_rollouts=4,
        consumer_batch_size=2,
        max_head_offpolicyness=4,
        check_trajectory_format=True,
    )
    one = StockVllmEngine(config)
    one.initialize(addr=server.url.removeprefix("http://"))
    yield one
    one.destroy()


def _publish(engine: StockVllmEngine, adapter: Adapter, version: int, root: Path) -> None:
    """What AReaL's trainer does after an update: write the adapter, say so, have the servers load it."""
    from areal.api import WeightUpdateMeta
    from areal.utils import name_resolve, names

    meta = WeightUpdateMeta.from_disk(
        "fedmoe", engine.config.trial_name, str(root), use_lora=True, lora_name="solver", base_model_name=SERVED_NAME
    ).with_version(version)
    folder = Path(meta.path)
    folder.mkdir(parents=True)
    for name, data in peft_files(adapter, SERVED_NAME).items():
        (folder / name).write_bytes(data)
    engine.set_version(version)
    update = names.update_weights_from_disk("fedmoe", engine.config.trial_name, version)
    name_resolve.add(update, str(time.time()), keepalive_ttl=None, replace=True)
    engine.pause_generation()
    engine.update_weights_from_disk(meta).result(timeout=120)
    engine.continue_generation()


def _rollouts(engine: StockVllmEngine, smollm2: Path) -> list[TensorRow]:
    from areal.api.cli_args import GenerationHyperparameters

    from fedmoe.areal.workflow import ArenaWorkflow

    generation = GenerationHyperparameters(max_new_tokens=8, lora_name="solver")
    workflow = ArenaWorkflow(COUNTING, generation, str(smollm2))
    rows: list[TensorRow] = engine.rollout_batch(episode_rows(2, 1), workflow=workflow)
    return rows


def test_rollouts_of_each_version_have_the_learners_own_log_probabilities(
    engine: StockVllmEngine, smollm2: Path, tmp_path: Path
) -> None:
    config = ArealConfig(str(smollm2), RANK, 16)
    with ArealLearner(config, tmp_path / "learner") as learner:
        for version in (0, 1):
            flat = np.random.default_rng(version).normal(0.0, 0.02, learner.layout.size).astype(np.float32)
            learner.replace(Adapter(learner.layout, 16.0, flat), version)
            _publish(engine, learner.adapter(), version, tmp_path / "updates")
            rollouts = _rollouts(engine, smollm2)
            assert len(rollouts) == 2
            for rows in rollouts:
                _check(rows, learner, version)


def _check(rows: TensorRow, learner: ArealLearner, version: int) -> None:
    assert len(rows["rewards"]) == 2  # two rounds
    for ids, whole, mask, behaviour, versions in zip(
        rows["input_ids"], rows["attention_mask"], rows["loss_mask"], rows["logprobs"], rows["versions"], strict=True
    ):
        sampled = mask.bool()
        prompt, tokens = ids[whole & ~sampled].tolist(), ids[sampled].tolist()
        np.testing.assert_allclose(learner.score([(prompt, tokens)])[0], behaviour[sampled].numpy(), atol=GAP)
        assert set(versions[sampled].tolist()) == {version}
