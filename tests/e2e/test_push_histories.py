"""The checker of histories: it takes what the model allows, and finds every fault that is planted (7)."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from push_histories import Answer, Backup, Landed, Push, Read, faults_of, landed_faults, restore_faults


def push(
    number: int,
    invoked: float,
    answered: float | None = None,
    version: int | None = None,
    base: int = 0,
    attempts: int = 1,
) -> Push:
    answers = () if answered is None or version is None else (Answer(answered, version, False, version - 1 - base),)
    return Push("python", ("w", "e", number), base, f"d{number}", invoked, attempts, answers)


def explained(pushes: list[Push], reads: list[Read]) -> bool:
    """The slow way: is there any order of the operations, silent pushes in or out, in which every answer is right."""

    def tried(done: frozenset[int], version: int) -> bool:
        waiting = [n for n in range(len(operations)) if n not in done]
        if all(isinstance(operations[n], Push) and operations[n].version is None for n in waiting):
            return True
        soonest = min(operations[n].answered for n in waiting)
        for n in waiting:
            one = operations[n]
            if one.invoked > soonest:
                continue
            if isinstance(one, Read):
                if one.version == version and tried(done | {n}, version):
                    return True
            elif one.base_version <= version and one.version in (None, version + 1) and tried(done | {n}, version + 1):
                return True
        return False

    operations: list[Push | Read] = [*pushes, *reads]
    return tried(frozenset(), 0)


moments = st.integers(0, 6).map(float)


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[Push], list[Read]]:
    """Short histories, right and wrong ones."""
    pushes = []
    for number in range(draw(st.integers(0, 4))):
        invoked = draw(moments)
        version = draw(st.one_of(st.none(), st.integers(1, 4)))
        base = draw(st.integers(0, max(0, (version or 3) - 1)))
        answered = None if version is None else draw(st.floats(invoked, 8.0).map(round).map(float))
        pushes.append(push(number, invoked, None if answered is None else max(answered, invoked), version, base))
    reads = []
    for _ in range(draw(st.integers(0, 3))):
        invoked = draw(moments)
        reads.append(Read("python", draw(st.integers(0, 4)), "x", invoked, invoked + draw(st.integers(0, 3))))
    reads = [replace(read, digest=f"v{read.version}") for read in reads]
    return pushes, reads


@settings(max_examples=500)
@given(histories())
def test_the_checker_says_what_trying_every_order_says(history: tuple[list[Push], list[Read]]) -> None:
    pushes, reads = history
    assert (not faults_of(pushes, reads)) == explained(pushes, reads)


def a_right_history(seed: int, count: int = 30) -> tuple[list[Push], list[Read], list[Landed]]:
    """Clients beside each other on one register: some answers are lost, some pushes never arrive, some are repeated."""
    moments = random.Random(seed)
    version, now = 0, 0.0
    pushes, reads, journal = [], [], []
    for number in range(count):
        now += moments.random()
        invoked, landed = now - 3 * moments.random(), now
        base = moments.randint(max(0, version - 2), version)
        one = Push("python", (f"w{number}", "e", number), base, f"d{number}", invoked)
        fate = moments.random()
        if fate > 0.1:
            version += 1
            staleness = version - 1 - base
            journal.append(Landed("python", one.identity, version, base, one.digest, staleness))
            repeated = fate > 0.9
            answer = Answer(landed + 3 * moments.random(), version, repeated, staleness)
            if fate > 0.2:
                one = replace(one, attempts=1 + repeated, answers=(answer,))
        pushes.append(one)
        if moments.random() < 0.3:
            reads.append(Read("python", version, f"v{version}", now - moments.random(), now + moments.random()))
    return pushes, reads, journal


@pytest.mark.parametrize("seed", range(50))
def test_a_right_history_is_taken_with_and_without_the_journal(seed: int) -> None:
    pushes, reads, journal = a_right_history(seed)
    assert faults_of(pushes, reads) == []
    assert faults_of(pushes, reads, journal) == []


@given(st.integers(0, 10_000), st.data())
def test_a_lost_acknowledgement_is_found(seed: int, data: st.DataObject) -> None:
    pushes, reads, journal = a_right_history(seed)
    lost = data.draw(st.sampled_from([one for one in pushes if one.answers]))
    left = [one for one in journal if one.identity != lost.identity]
    moved = [one if one.version < (lost.version or 0) else replace(one, version=one.version - 1) for one in left]
    assert any("lost" in fault for fault in faults_of(pushes, reads, left))
    assert any("lost" in fault for fault in faults_of(pushes, reads, moved))


@given(st.integers(0, 10_000), st.data())
def test_an_update_that_landed_twice_is_found(seed: int, data: st.DataObject) -> None:
    pushes, reads, journal = a_right_history(seed)
    twice = data.draw(st.sampled_from(journal))
    again = replace(twice, version=len(journal) + 1, staleness=len(journal) - twice.base_version)
    assert any("landed 2 times" in fault for fault in faults_of(pushes, reads, [*journal, again]))


@given(st.integers(0, 10_000), st.data())
def test_a_doubled_update_is_found_by_its_clients_alone(seed: int, data: st.DataObject) -> None:
    """It made two versions, of which its sender knows one: everybody after it is a version too far."""
    pushes, _, _ = a_right_history(seed)
    pushes = [one for one in pushes if one.answers]  # nobody is left whose silence explains a version
    told = sorted(one.version or 0 for one in pushes)
    doubled = data.draw(st.sampled_from(told))
    numbers = {version: n + (version > doubled) for n, version in enumerate(told, 1)}
    moved = [_told(one, numbers[one.version or 0]) for one in pushes]
    expected = doubled != told[-1]
    assert (faults_of(moved) != []) == expected


def _told(one: Push, version: int) -> Push:
    base = min(one.base_version, version - 1)
    answers = tuple(replace(answer, version=version, staleness=version - 1 - base) for answer in one.answers)
    return replace(one, base_version=base, answers=answers)


@given(st.integers(0, 10_000), st.data())
def test_a_gap_between_versions_is_found(seed: int, data: st.DataObject) -> None:
    pushes, reads, journal = a_right_history(seed)
    after = data.draw(st.integers(0, len(journal) - 1))
    gapped = [
        replace(one, version=one.version + 1, staleness=one.staleness + 1) if n >= after else one
        for n, one in enumerate(journal)
    ]
    assert landed_faults(gapped) != []
    assert faults_of(pushes, reads, gapped) != []


@given(st.integers(0, 10_000), st.data())
def test_two_acknowledgements_in_the_wrong_order_are_found(seed: int, data: st.DataObject) -> None:
    """The first was answered before the second was sent, and yet is told the later version."""
    pushes, _, _ = a_right_history(seed)
    pairs = [
        (one, other)
        for one, other in permutations([one for one in pushes if one.answers], 2)
        if one.answered < other.invoked
    ]
    one, other = data.draw(st.sampled_from(pairs))
    swapped = {
        one.identity: _told(one, other.version or 0),
        other.identity: _told(other, one.version or 0),
    }
    assert faults_of([swapped.get(push.identity, push) for push in pushes]) != []


@pytest.mark.parametrize(
    ("pushes", "reads", "says"),
    [
        ([push(0, 1, 2, 1), push(1, 3, 4, 1)], [], "two pushes"),
        ([push(0, 1, 2, 2)], [], "came from nobody"),
        ([push(0, 1, 2, 2), push(1, 3)], [], "came from nobody"),  # sent when version 2 was there already
        ([push(0, 1, 2, 1)], [Read("python", 0, "a", 3, 4)], "before it could be there"),
        ([push(0, 3, 4, 1)], [Read("python", 1, "a", 1, 2)], "before it could be there"),
        ([], [Read("python", 0, "a", 1, 2), Read("python", 0, "b", 3, 4)], "two contents"),
        ([push(0, 1, 2, 1, attempts=1), replace(push(0, 3, 4, 2), attempts=2)], [], "in the history 2 times"),
        ([replace(push(0, 1), answers=(Answer(2, 1, True, 0),))], [], "never sent"),
        ([replace(push(0, 1, 2, 1), refused="too_stale")], [], "acknowledged and refused"),
        ([replace(push(0, 1), answers=(Answer(2, 1, False, 5),))], [], "staleness 5"),
        (
            [replace(push(0, 1), attempts=2, answers=(Answer(2, 1, False, 0), Answer(3, 2, True, 1)))],
            [],
            "several outcomes",
        ),
        ([replace(push(0, 1), answers=(Answer(2, 1, False, 0), Answer(3, 1, False, 0)))], [], "as new twice"),
        ([replace(push(0, 1, 2, 1), incarnation="lost")], [], "taken in another one"),
    ],
)
def test_each_kind_of_fault_is_named(pushes: list[Push], reads: list[Read], says: str) -> None:
    assert any(says in fault for fault in faults_of(pushes, reads))


def test_what_landed_without_a_sender_or_after_a_refusal_or_with_other_bytes_is_found() -> None:
    journal = [Landed("python", ("w", "e", 0), 1, 0, "d0", 0)]
    assert faults_of([], [], journal) == ["w/e/0 landed, and nobody sent it"]
    refused = replace(push(0, 1), refused="other_incarnation")
    assert any("and landed" in fault for fault in faults_of([refused], [], journal))
    assert any("another expert" in fault for fault in faults_of([replace(push(0, 1), digest="other")], [], journal))


def test_a_backup_holds_what_was_acknowledged_before_it_and_nothing_made_after_it() -> None:
    pushes = [push(0, 1, 2, 1), push(1, 3, 6, 2, base=1), push(2, 8, 9, 3, base=2)]
    for held in (1, 2):  # the second was under way meanwhile
        assert restore_faults(pushes, Backup(4, 5, {"python": held})) == []
    assert "does not hold it" in restore_faults(pushes, Backup(4, 5, {"python": 0}))[0]
    assert "was made after the backup" in restore_faults(pushes, Backup(4, 5, {"python": 3}))[0]


def test_an_incarnation_goes_on_from_the_backups_version() -> None:
    one = push(0, 1, 2, 8, base=7)
    assert faults_of([one], began_with={"python": 7}) == []
    assert faults_of([one], began_with={"python": 6}) != []
    assert faults_of([one], began_with={"python": 8}) != []
