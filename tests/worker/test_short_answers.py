"""Where a worker's own update is all that is new, the newest weights need not travel: it has them, to the bit."""

from __future__ import annotations

import json
from pathlib import Path

import httpx2
import numpy as np
import pytest
from workers import PUSH, Federation, Road, Setup, blocks, federation, wait_for_answer

from fedmoe.distributed_worker import DistributedWorker
from fedmoe.lora.codec import WireDtype
from fedmoe.qwen_worker import StepRecord

# Answers without weights are a few hundred bytes, those with some tens of thousands.
SHORT = 2_000


def short(road: Road) -> list[bool]:
    return [size < SHORT for size in road.answers]


@pytest.mark.parametrize(
    ("wire", "first_is_short"),
    [("fp32", True), pytest.param("int8", False, id="int8: what it pulled first was rounded")],
)
def test_a_worker_alone_on_its_expert_is_sent_no_weights_and_has_them_all_the_same(
    wire: WireDtype, first_is_short: bool, tmp_path: Path
) -> None:
    results = []
    for without in ("", "prefer"):
        with federation(tmp_path / f"coordinator{without}") as house:
            road = Road()
            road.without = without
            setup = Setup(house.url, tmp_path / f"w{without}", steps=12, every=2, wire=wire, road=road)
            setup.after_step = wait_for_answer
            worker = setup.run()
            assert worker._base is not None
            assert len(road.answers) == 6
            assert short(road) == ([False] * 6 if without else [first_is_short, *[True] * 5])
            assert (worker._base.version, worker._base.digest) == (6, house.expert.digest)
            np.testing.assert_array_equal(worker._base.weights, house.weights)
            results.append(worker.worker.weights())
    np.testing.assert_array_equal(results[0], results[1])


def test_what_another_worker_landed_meanwhile_comes_with_the_answer(house: Federation, tmp_path: Path) -> None:
    other = Setup(house.url, tmp_path / "w2", "w2", steps=1, every=1, data=blocks(3))
    road = Road()

    def meanwhile(worker: object, record: object) -> None:
        wait_for_answer(setup.last, record)  # type: ignore[arg-type]
        if len(road.answers) == 1 and other.steps == 1:
            other.run()
            other.steps = 2

    setup = Setup(house.url, tmp_path / "w1", steps=8, every=2, road=road, after_step=meanwhile)
    worker = setup.run()
    assert worker._base is not None
    assert [update.worker for update in house.updates()].count("w2") == 1
    assert short(road).count(False) == 1
    np.testing.assert_array_equal(worker._base.weights, house.weights)


@pytest.mark.parametrize(("wire", "others"), [("int8", 1), ("int8", 2), ("bf16", 1), ("fp32", 1)])
def test_one_update_of_another_worker_comes_instead_of_weights_that_are_longer(
    wire: WireDtype, others: int, house: Federation, tmp_path: Path
) -> None:
    road = Road()
    names = [f"other-{number}" for number in range(others)]

    def meanwhile(worker: DistributedWorker, record: StepRecord) -> None:
        wait_for_answer(worker, record)
        if len(road.answers) == 2 and not (tmp_path / names[0]).exists():
            for number, name in enumerate(names):
                Setup(house.url, tmp_path / name, name, steps=1, every=1, wire=wire, data=blocks(number + 1)).run()

    setup = Setup(house.url, tmp_path / "w1", steps=8, every=2, wire=wire, road=road, after_step=meanwhile)
    worker = setup.run()
    assert worker._base is not None
    assert len(house.updates()) == 4 + others
    whole = 4 * worker._base.manifest.layout.size
    weights = [size > whole for size in road.answers]
    rounded = wire != "fp32"
    assert weights == [rounded, False, wire == "fp32" or others > 1, False], "others landed before the third"
    assert (worker._base.version, worker._base.digest) == (4 + others, house.expert.digest)
    np.testing.assert_array_equal(worker._base.weights, house.weights)


@pytest.mark.parametrize("options", [{"server_optimizer": "nesterov"}, {"buffer_size": 2}])
def test_where_an_update_is_not_simply_added_the_weights_are_sent(options: dict[str, object], tmp_path: Path) -> None:
    with federation(tmp_path / "coordinator", **options) as house:
        road = Road()
        worker = Setup(house.url, tmp_path / "w1", steps=6, every=2, road=road, after_step=wait_for_answer).run()
        assert worker._base is not None
        assert short(road) == [False] * 3
        np.testing.assert_array_equal(worker._base.weights, house.weights)


def test_an_update_sent_again_since_its_answer_was_lost_is_answered_as_shortly(
    house: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedmoe.wire.delivery.pause_seconds", lambda *_: 0.001)
    road = Road("answer_lost")
    worker = Setup(house.url, tmp_path / "w1", steps=4, every=2, road=road, after_step=wait_for_answer).run()
    assert worker._base is not None
    assert road.sequences() == [0, 0, 1]
    assert short(road) == [True] * 3
    np.testing.assert_array_equal(worker._base.weights, house.weights)


class Lying(Road):
    """The way to a coordinator whose short answers say something else."""

    def __init__(self, **others: object) -> None:
        super().__init__()
        self._others = others

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        answer = super().handle_request(request)
        if request.url.path != PUSH:
            return answer
        told = json.loads(answer.read()) | self._others
        answer.close()
        content = json.dumps(told).encode()
        headers = {name: value for name, value in answer.headers.items() if name != "content-length"}
        return httpx2.Response(200, headers=headers, stream=httpx2.ByteStream(content))


@pytest.mark.parametrize(
    ("lie", "told"),
    [
        ({"weights_digest": "f" * 64}, "weights_differ"),
        ({"coefficient": 1e300}, "weights_differ"),
        ({"coefficient": 0.5}, "weights_differ"),
        ({"other": {"digest": "f" * 64, "coefficient": 1.0}}, ""),
    ],
)
def test_weights_that_are_not_those_of_the_coordinator_are_pulled_instead(
    lie: dict[str, object], told: str, house: Federation, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    road = Lying(**lie)
    worker = Setup(house.url, tmp_path / "w1", steps=4, every=2, road=road, after_step=wait_for_answer).run()
    assert worker._base is not None
    assert told in "".join(capsys.readouterr())
    np.testing.assert_array_equal(worker._base.weights, house.weights)
