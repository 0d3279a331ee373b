from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from simulated import PARAMETERS, configured, fleet_work

from fedmoe.lora.safetensors_bytes import encode_named
from fedmoe.simulation.config import RecordedWork, SimulationConfigError
from fedmoe.simulation.fleet import draw_fleet
from fedmoe.simulation.recorded import RecordedFleet, Recording, read_recording, write_recording
from fedmoe.simulation.run import run_scheme

CONFIG = configured(fleet={"workers": 3})
WORK = fleet_work(CONFIG)
DELTAS = np.random.default_rng(0).normal(0, 1, (5, PARAMETERS)).astype(np.float32)


def test_a_recording_comes_back(tmp_path: Path) -> None:
    write_recording(tmp_path / "deltas.safetensors", Recording.of(WORK.manifest, list(DELTAS)))
    back = read_recording(tmp_path / "deltas.safetensors")
    assert back.manifest == WORK.manifest
    np.testing.assert_array_equal(back.deltas, DELTAS)


def test_a_replay_lands_the_deltas_of_the_recording(tmp_path: Path) -> None:
    file = tmp_path / "deltas.safetensors"
    ones = np.ones((1, PARAMETERS), np.float32)
    write_recording(file, Recording(WORK.manifest, ones))
    work = RecordedFleet(RecordedWork(recording=file), 0)
    local = work.worker(draw_fleet(CONFIG.fleet, 1.0, 0)[0])
    before = local.weights()
    local.train(7)
    np.testing.assert_array_equal(local.weights(), before + 1)
    config = configured(fleet={"workers": 3}, work={"kind": "recorded", "recording": str(file)})
    done = run_scheme(config, config.schemes[0], config.fleet, work)
    assert done.versions["expert-0"] >= 20


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"nonsense", "is no recording"),
        (encode_named({"deltas": DELTAS}), "is no recording"),
        (encode_named({"other": DELTAS}, {"manifest": "{}"}), "is no recording"),
        (encode_named({"deltas": DELTAS}, {"manifest": "[1]"}), "is no recording"),
    ],
)
def test_another_file_is_refused(content: bytes, says: str, tmp_path: Path) -> None:
    file = tmp_path / "deltas.safetensors"
    file.write_bytes(content)
    with pytest.raises(SimulationConfigError, match=says):
        read_recording(file)


def test_deltas_that_do_not_fit_their_manifest_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "deltas.safetensors"
    write_recording(file, Recording(WORK.manifest, DELTAS[:, :7].copy()))
    with pytest.raises(SimulationConfigError, match=r"shape \(5, 7\), its manifest has 256 numbers"):
        read_recording(file)
    with pytest.raises(SimulationConfigError, match="cannot be read"):
        read_recording(tmp_path / "none.safetensors")


def test_a_seeded_process_goes_towards_an_optimum_of_the_workers_own() -> None:
    first, second, third = (WORK.worker(profile) for profile in draw_fleet(CONFIG.fleet, 1.0, 0))
    start = first.weights()
    for local in (first, second, third):
        local.train(10)
    early = first.weights()
    for local in (first, second, third):
        local.train(1000)
    # Near enough to the end that later steps move less than the first ones, and each elsewhere.
    moved = [float(np.linalg.norm(local.weights() - start)) for local in (first, second)]
    assert float(np.linalg.norm(early - start)) < moved[0] / 2
    assert float(np.linalg.norm(first.weights() - second.weights())) > 0.2 * moved[0]
    again = fleet_work(CONFIG).worker(draw_fleet(CONFIG.fleet, 1.0, 0)[0])
    again.train(10)
    np.testing.assert_array_equal(again.weights(), early)
