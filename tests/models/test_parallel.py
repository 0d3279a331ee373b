"""Training in several processes (E19) equals training in one."""

import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from forks import Fork

from fedmoe.models.parallel import ParallelError, ProcessGroup, join_group

CPU = torch.device("cpu")
PROGRAM = """
import sys
from pathlib import Path
import numpy as np, torch
from fedmoe.datasets.tokens.packing import BlockSampler, pack
from fedmoe.datasets.tokens.tokenized_sample import TokenizedSample
from fedmoe.models.base import load_base
from fedmoe.models.parallel import join_group
from fedmoe.qwen_finetune import LoraConfig, QwenLoRAExpert, TrainingConfig
from fedmoe.qwen_worker import QwenWorker

torch.set_num_threads(1)
random = np.random.default_rng(0)
samples = [TokenizedSample(ids, ids) for ids in (random.integers(0, 256, n) for n in random.integers(9, 40, 24))]
group = join_group(torch.device("cpu"), timeout_seconds=60)
numbers = torch.tensor([float(group.rank + 1)])
if group.world_size == 2:
    assert group.sum_(numbers.clone()).item() == 3
    assert group.broadcast_(numbers.clone()).item() == 1
    assert group.flag(group.rank == 0) and not group.flag(group.rank == 1)
    assert group.any_flag(group.rank == 1)
# Ranks start from different seeds: the group must make them agree.
lora = LoraConfig(r=4, lora_alpha=8, seed=group.rank)
batch = 4 // group.world_size
training = TrainingConfig(per_device_train_batch_size=batch)
expert = QwenLoRAExpert(load_base("tiny", "cpu", "fp32"), lora, training, group)
sampler = BlockSampler(pack(samples, 48, 0), 0, group.rank, group.world_size)
# Rank 1's clock and stop wish must not count.
clock = iter(range(10**6)) if group.rank == 0 else iter(lambda: 10**6, None)
worker = QwenWorker(expert, sampler, clock=lambda: next(clock))
records = []
result = worker.train_for(3.5, lambda: group.rank == 1, records.append)
assert result.steps == len(records) == 3, result
np.savez(sys.argv[1] + f"-{group.rank}.npz", weights=worker.weights(), losses=[r.loss for r in records])
folder = Path(sys.argv[1] + "-state")
worker.save(folder)
worker.save(folder)
before, step = worker.weights(), worker.step
again = worker.train_for(99, lambda: False, records.append, max_steps=1)
after = worker.weights()
worker.restore(folder)
assert np.array_equal(worker.weights(), before) and worker.step == step
assert worker.train_for(99, lambda: False, records.append, max_steps=1).mean_loss == again.mean_loss
assert np.array_equal(worker.weights(), after)
base = np.full(after.size, 2.0, np.float32) if group.rank == 0 else None
worker.rebase(base, after if group.rank == 0 else None)
assert np.array_equal(worker.weights(), np.full(after.size, 2.0, np.float32))
group.close()
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launch(target: Path, world_size: int) -> None:
    shared = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shared |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    processes = []
    for rank in range(world_size):
        environment = os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        log = target.with_name(f"{target.name}-{rank}.log")
        processes.append((Fork(["-c", PROGRAM, str(target)], log, environment=environment), log))
    for process, log in processes:
        assert process.wait(120) == 0, log.read_text()


def test_two_processes_with_half_the_batch_each_equal_one_with_the_whole(tmp_path: Path) -> None:
    launch(tmp_path / "one", 1)
    launch(tmp_path / "two", 2)
    one = np.load(tmp_path / "one-0.npz")
    first, second = np.load(tmp_path / "two-0.npz"), np.load(tmp_path / "two-1.npz")
    np.testing.assert_array_equal(first["weights"], second["weights"])
    np.testing.assert_allclose(first["weights"], one["weights"], atol=1e-5)
    np.testing.assert_allclose(first["losses"], one["losses"], rtol=1e-5)


def test_a_single_process_is_a_group_that_does_nothing() -> None:
    group, values = ProcessGroup(), torch.tensor([1.0, 2.0])
    for method in (group.sum_, group.broadcast_):
        assert method(values) is values
    assert values.tolist() == [1.0, 2.0]
    assert group.flag(True)
    assert not group.any_flag(False)
    group.barrier()
    group.close()


def test_no_environment_is_a_single_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert join_group(CPU) == ProcessGroup(device=CPU)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR, MASTER_PORT are not set; start with torchrun"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE must be a number"),
        ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, "RANK is 2, but WORLD_SIZE is 2"),
    ],
)
def test_an_incomplete_environment_is_refused(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], message: str
) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ParallelError, match=message):
        join_group(CPU)
