"""A data set that vanishes while a worker trains, 63: the run goes on with what it read, the next start says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from workers import Federation

from fedmoe.cli import worker_setup as setup
from fedmoe.config import WorkerConfig
from fedmoe.datasets.readers.common import DataError
from fedmoe.worker.preparation import WorkerData, worker_data
from fedmoe.worker.recovery import WorkerFailedError


def written(file: Path, rows: int, word: str = "river") -> Path:
    texts = [f"The {word} {i} runs past the mill and turns the wheel {i * i} times." for i in range(rows)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


def config(house: Federation, tmp_path: Path, steps: int) -> WorkerConfig:
    return WorkerConfig(
        coordinator_url=house.url,
        worker_id="w1",
        specialty="python",
        dataset=str(tmp_path / "data.jsonl"),
        base_model="tiny",
        state_dir=str(tmp_path / "w1"),
        sync_interval=0.05,
        max_length=64,
        lora_r=4,
        lora_alpha=8,
        max_steps=steps,
        device="cpu",
        dtype="fp32",
        send_statistics=False,
    )


def test_data_that_vanish_or_change_during_training_63(
    house: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDMOE_CACHE", str(tmp_path / "cache"))
    file = written(tmp_path / "data.jsonl", 24)
    real = worker_data

    def then_gone(*arguments: object) -> WorkerData:
        found = real(*arguments)  # type: ignore[arg-type]
        file.unlink()
        for kept in (tmp_path / "cache").rglob("*"):
            if kept.is_file() and "tokens" in str(kept):
                kept.write_bytes(b"")  # what was mapped into memory may be cut short as well
        return found

    monkeypatch.setattr(setup, "worker_data", then_gone)
    setup.run_worker(config(house, tmp_path, steps=4))
    assert house.updates()[-1].info["steps"] == 4
    monkeypatch.setattr(setup, "worker_data", real)
    with pytest.raises(DataError, match=r"data\.jsonl.*no such file"):
        setup.run_worker(config(house, tmp_path, steps=6))
    written(file, 24, "engine")
    with pytest.raises(WorkerFailedError, match=r"24 of 24 samples are gone or changed.*--allow-changed-data"):
        setup.run_worker(config(house, tmp_path, steps=6))
    written(file, 24)
    setup.run_worker(config(house, tmp_path, steps=6))
    assert house.updates()[-1].info["steps"] == 6
