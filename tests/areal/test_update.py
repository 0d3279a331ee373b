import numpy as np
import pytest

from fedmoe.areal.statistics import summarise

ONE = {
    "n_valid_tokens": 10.0,
    "update_successful": 1.0,
    "actor_loss/avg": -0.5,
    "grad_norm": 2.0,
    "lr": 1e-3,
    "clip_ratio/avg": 0.1,
    "dual_clip_ratio/avg": 0.0,
    "behave_imp_weight/avg": 1.0,
    "rs_filtered_fraction": 0.0,
    "entropy/avg": 3.0,
    "approx_kl/avg": 0.0,
}


def _exported(**changes: float) -> dict[str, float]:
    return {f"ppo_actor/update/{name}": value for name, value in {**ONE, **changes}.items()}


def test_means_are_weighed_by_tokens() -> None:
    parts = [_exported(), _exported(n_valid_tokens=30.0, **{"actor_loss/avg": 0.5, "approx_kl/avg": -0.4})]
    update = summarise(parts, np.array([0.1, 0.3], np.float32), version=4, examples=6)
    assert (update.version, update.examples, update.tokens) == (4, 6, 40)
    assert update.loss == pytest.approx(0.25)
    assert update.kl_k1 == pytest.approx(0.3)
    assert [update.gap_mean, update.gap_max] == pytest.approx([0.2, 0.3])


def test_a_step_whose_gradient_was_not_finite_is_counted_as_skipped() -> None:
    parts = [_exported(), _exported(update_successful=0.0, grad_norm=float("nan"))]
    update = summarise(parts, np.zeros(2, np.float32), version=0, examples=2)
    assert (update.steps, update.skipped_steps) == (1, 1)


def test_a_statistic_that_another_areal_does_not_have_is_named() -> None:
    part = _exported()
    del part["ppo_actor/update/entropy/avg"]
    with pytest.raises(RuntimeError, match=r"entropy/avg.*1\.0\.4"):
        summarise([part], np.zeros(2, np.float32), version=0, examples=2)
