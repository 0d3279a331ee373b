"""A worker's folder that an earlier version left, with an update under way, is opened by this one and goes on."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import structlog
from workers import Federation

from fedmoe.cli import worker_setup as setup
from fedmoe.config import WorkerConfig
from fedmoe.wire.outbox import Outbox

FIXTURE = Path(__file__).parents[1] / "fixtures" / "worker_b5c47da.tar.gz"
PENDING = "60b3c4d648411ab6923f0f8c73f124730676b47749f544ea4216f8b55c0051c5"


def unpacked(folder: Path) -> Path:
    with tarfile.open(FIXTURE) as archive:
        archive.extractall(folder, filter="data")
    return folder / "worker"


def data(folder: Path) -> Path:
    """What that worker was trained on."""
    file = folder / "data.jsonl"
    rows = [f"The river {i} runs past the mill and turns the wheel {i * i} times." for i in range(24)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    return file


def test_its_identity_and_the_update_under_way_are_read_71(tmp_path: Path) -> None:
    outbox = Outbox(unpacked(tmp_path), "site-a", "rivers")
    assert (outbox.epoch, outbox.next_sequence) == ("da5bd139f8a6baf6", 3)
    assert outbox.pending is not None
    assert (outbox.pending.sha256, outbox.pending.header.base_version) == (PENDING, 2)
    outbox.close()


def test_it_goes_on_from_its_checkpoint_and_hands_over_what_was_left_71(house: Federation, tmp_path: Path) -> None:
    """The coordinator here has another history, so what the old update held travels anew."""
    config = WorkerConfig(
        coordinator_url=house.url,
        worker_id="site-a",
        specialty="rivers",
        dataset=str(data(tmp_path)),
        base_model="tiny",
        state_dir=str(unpacked(tmp_path)),
        sync_interval=0.05,
        max_length=64,
        lora_r=2,
        lora_alpha=4,
        target_modules=("q_proj",),
        max_steps=403,
        device="cpu",
        dtype="fp32",
        send_statistics=False,
    )
    with structlog.testing.capture_logs() as said:
        setup.run_worker(config)
    events = {line["event"]: line for line in said}
    assert events["restored"]["step"] < 403
    assert events["left"]["step"] == 403
    assert "older_checkpoint" not in events
    updates = house.updates()
    assert updates[0].sequence == 3, "number 2 was refused: this coordinator does not know its base"
    assert np.isfinite(house.delta_of(updates[0]) if hasattr(house, "delta_of") else 0.0).all()
