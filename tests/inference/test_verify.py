"""The check after a synchronisation: right weights pass, wrong ones, old ones and broken ones are told apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmoe.inference.engine import AdapterKey, EngineError, Sample, SampleRequest
from fedmoe.inference.verify import Probe, verify_sync
from fedmoe.lora.adapter import Adapter, FloatArray

OLD, NEW = AdapterKey("poet", 3), AdapterKey("poet", 4)
PROBES = (Probe((1, 2), (3, 4, 5)), Probe((6,), (7, 8)))


@dataclass
class Scripted:
    """An engine that says what it is told to, per adapter: one row of log-probabilities for each probe."""

    says: Mapping[AdapterKey, Sequence[Sequence[float]]]

    def score(self, key: AdapterKey | None, prompt: Sequence[int], tokens: Sequence[int]) -> FloatArray:
        assert key is not None
        place = [probe.prompt for probe in PROBES].index(tuple(prompt))
        return np.array(self.says[key][place], np.float32)

    def load(self, key: AdapterKey, adapter: Adapter) -> None:
        raise NotImplementedError

    def unload(self, key: AdapterKey) -> None:
        raise NotImplementedError

    def loaded(self) -> frozenset[AdapterKey]:
        return frozenset(self.says)

    def sample(self, requests: Sequence[SampleRequest]) -> list[Sample]:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


RIGHT = ((-1.0, -2.0, -3.0), (-0.5, -0.25))
TRAINER = [np.array(row, np.float32) for row in RIGHT]


def shifted(by: float) -> tuple[tuple[float, ...], ...]:
    return RIGHT[0], (RIGHT[1][0], RIGHT[1][1] + by)


def test_the_trainers_own_scores_pass_and_the_gap_is_told() -> None:
    found = verify_sync(Scripted({NEW: shifted(-0.01), OLD: shifted(-0.5)}), TRAINER, NEW, PROBES, 0.05, OLD)
    assert found.largest_gap == pytest.approx(0.01, rel=1e-4)
    assert found.mean_gap == pytest.approx(0.01 / 5, rel=1e-4)
    assert found.change == pytest.approx(0.49, rel=1e-4)


def test_without_a_previous_version_no_change_is_told() -> None:
    assert verify_sync(Scripted({NEW: RIGHT}), TRAINER, NEW, PROBES, 0.05).change is None


def test_a_gap_above_the_tolerance_names_adapter_size_and_probe() -> None:
    with pytest.raises(EngineError, match=r"poet@4 are up to 0\.2 nats off .* probe 1, tolerance 0\.05"):
        verify_sync(Scripted({NEW: shifted(-0.2)}), TRAINER, NEW, PROBES, 0.05)


def test_an_engine_that_still_serves_the_old_version_is_caught_even_within_the_tolerance() -> None:
    stale = Scripted({NEW: shifted(-0.001), OLD: shifted(-0.001)})
    with pytest.raises(EngineError, match=r"poet@4 are exactly those under poet@3"):
        verify_sync(stale, TRAINER, NEW, PROBES, 0.05, previous_key=OLD)


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite_never_pass(broken: float) -> None:
    with pytest.raises(EngineError, match="not finite"):
        verify_sync(Scripted({NEW: shifted(broken)}), TRAINER, NEW, PROBES, 0.05)
    trainer = [TRAINER[0], np.array([-0.5, broken], np.float32)]
    with pytest.raises(EngineError, match="not finite"):
        verify_sync(Scripted({NEW: RIGHT}), trainer, NEW, PROBES, 0.05)


def test_scores_of_other_lengths_are_refused() -> None:
    with pytest.raises(EngineError, match=r"\(2,\) tokens under poet@4, the trainer \(3,\)"):
        verify_sync(Scripted({NEW: (RIGHT[1], RIGHT[1])}), TRAINER, NEW, PROBES, 0.05)


def test_a_check_that_could_not_fail_is_refused() -> None:
    engine = Scripted({NEW: RIGHT})
    with pytest.raises(ValueError, match="0 probes"):
        verify_sync(engine, [], NEW, [], 0.05)
    with pytest.raises(ValueError, match="1 references"):
        verify_sync(engine, TRAINER[:1], NEW, PROBES, 0.05)
    for tolerance in (0.0, float("nan")):
        with pytest.raises(ValueError, match="tolerance"):
            verify_sync(engine, TRAINER, NEW, PROBES, tolerance)


@settings(deadline=None)
@given(gap=st.floats(-1.0, 1.0), tolerance=st.floats(0.01, 1.0))
def test_exactly_the_gaps_above_the_tolerance_are_refused(gap: float, tolerance: float) -> None:
    engine = Scripted({NEW: shifted(gap)})
    real = float(np.abs(engine.score(NEW, PROBES[1].prompt, PROBES[1].tokens) - TRAINER[1]).max())
    if real <= tolerance:
        assert verify_sync(engine, TRAINER, NEW, PROBES, tolerance).largest_gap == pytest.approx(real)
    else:
        with pytest.raises(EngineError, match="nats off"):
            verify_sync(engine, TRAINER, NEW, PROBES, tolerance)
