from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmoe.wire.contract.messages import UpdateHeader
from fedmoe.wire.outbox import Outbox, OutboxError

Opener = Callable[[], Outbox]


@pytest.fixture
def reopen(tmp_path: Path) -> Iterator[Opener]:
    """Opens the same folder again and again, as restarts do."""
    opened: list[Outbox] = []

    def again() -> Outbox:
        while opened:
            opened.pop().close()
        opened.append(Outbox(tmp_path / "w1", "w1", "python"))
        return opened[-1]

    yield again
    for outbox in opened:
        outbox.close()


def header(base_version: int = 0) -> UpdateHeader:
    return UpdateHeader(expert="python", worker="w1", epoch="e", sequence=0, base_version=base_version, loss=1.5)


def test_an_identity_is_made_once_and_kept(reopen: Opener, tmp_path: Path) -> None:
    first = reopen()
    epoch = first.epoch
    assert (first.next_sequence, first.pending) == (0, None)
    assert reopen().epoch == epoch
    other = Outbox(tmp_path / "other", "w1", "python")
    assert other.epoch != epoch
    other.close()


def test_an_update_that_was_cut_is_there_after_a_restart_until_it_is_settled(reopen: Opener) -> None:
    cut = reopen().cut(header(7), b"bytes")
    assert (cut.header.sequence, cut.header.base_version) == (0, 7)
    again = reopen()
    assert again.pending == cut
    assert again.pending.header.epoch == again.epoch
    assert again.next_sequence == 1
    again.settle()
    assert reopen().pending is None
    assert reopen().cut(header(), b"more").header.sequence == 1


def test_one_update_at_a_time(reopen: Opener) -> None:
    outbox = reopen()
    outbox.settle()
    outbox.cut(header(), b"bytes")
    with pytest.raises(OutboxError, match="still under way"):
        outbox.cut(header(), b"other")


def test_a_folder_of_another_worker_or_expert_is_refused(reopen: Opener, tmp_path: Path) -> None:
    reopen().close()
    for worker, expert in (("w2", "python"), ("w1", "sql")):
        with pytest.raises(OutboxError, match=rf"belongs to worker 'w1' training 'python', not to '{worker}'"):
            Outbox(tmp_path / "w1", worker, expert)


def test_a_folder_in_use_is_refused_until_it_is_given_back(reopen: Opener, tmp_path: Path) -> None:
    outbox = reopen()
    with pytest.raises(OutboxError, match=r"in use by the worker with process id \d+; stop it first or choose another"):
        Outbox(tmp_path / "w1", "w1", "python")
    assert reopen().epoch == outbox.epoch


@pytest.mark.parametrize(
    "change",
    [
        lambda identity: identity | {"next_sequence": -1},
        lambda identity: identity | {"pending_sha256": None},
        lambda identity: identity | {"next_sequence": 5},
        lambda identity: identity | {"unknown": 1},
        lambda identity: {key: value for key, value in identity.items() if key != "epoch"},
        lambda identity: [identity],
    ],
)
def test_a_damaged_identity_is_refused_and_not_replaced(
    change: Callable[[dict[str, object]], object], reopen: Opener, tmp_path: Path
) -> None:
    reopen().cut(header(), b"bytes")
    file = tmp_path / "w1" / "identity.json"
    damaged = json.dumps(change(json.loads(file.read_bytes())))
    file.write_text(damaged)
    with pytest.raises(OutboxError, match=r"identity.json cannot be read .* move .*w1 away"):
        reopen()
    assert file.read_text() == damaged
    file.write_bytes(b"{")
    with pytest.raises(OutboxError, match="cannot be read"):
        reopen()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 7))
def test_a_flipped_bit_in_an_identity_is_named_and_never_believed(
    tmp_path_factory: pytest.TempPathFactory, place: int, bit: int
) -> None:
    """Fault 6."""
    folder = tmp_path_factory.mktemp("outbox")
    outbox = Outbox(folder, "w1", "python")
    pending, epoch = outbox.cut(header(), b"bytes"), outbox.epoch
    outbox.close()
    file = folder / "identity.json"
    data = bytearray(file.read_bytes())
    data[place % len(data)] ^= 1 << bit
    file.write_bytes(data)
    try:
        again = Outbox(folder, "w1", "python")
    except OutboxError as error:
        told = str(error)
        assert "identity.json cannot be read" in told or "belongs to" in told
        assert file.read_bytes() == data
    else:  # white space, or a character's other spelling
        assert (again.epoch, again.next_sequence, again.pending) == (epoch, 1, pending)
        again.close()


def test_an_identity_of_an_older_version_has_no_checksum_and_is_read(reopen: Opener, tmp_path: Path) -> None:
    cut = reopen().cut(header(), b"bytes")
    file = tmp_path / "w1" / "identity.json"
    kept = json.loads(file.read_bytes())
    assert len(kept.pop("sha256")) == 64
    file.write_text(json.dumps(kept))
    assert reopen().pending == cut
    assert len(json.loads(file.read_bytes())["sha256"]) == 64


def test_a_new_folder_is_a_new_identity_as_the_advice_says(reopen: Opener, tmp_path: Path) -> None:
    epoch = reopen().epoch
    (tmp_path / "w1" / "identity.json").write_bytes(b"{")
    with pytest.raises(OutboxError, match="away to start with a new identity"):
        reopen()
    (tmp_path / "w1").rename(tmp_path / "away")
    assert reopen().epoch != epoch


@pytest.mark.parametrize("content", [None, b"", b"other"])
def test_a_body_that_is_missing_or_damaged_is_never_sent(content: bytes | None, reopen: Opener, tmp_path: Path) -> None:
    reopen().cut(header(), b"bytes")
    body = tmp_path / "w1" / "update-0.safetensors"
    body.unlink() if content is None else body.write_bytes(content)
    with pytest.raises(OutboxError, match=r"update-0.safetensors is damaged or missing; move .* away"):
        reopen()


def test_what_a_killed_process_left_is_swept_and_nothing_else(reopen: Opener, tmp_path: Path) -> None:
    reopen().cut(header(), b"bytes")
    folder = tmp_path / "w1"
    for name in ("update-1.safetensors", ".update-1.safetensors-0a1b2c3d", ".identity.json-0a1b2c3d"):
        (folder / name).write_bytes(b"half")
    (folder / "notes.txt").write_text("mine")
    reopen()
    names = {file.name for file in folder.iterdir()}
    assert names == {"identity.json", "update-0.safetensors", "notes.txt", "lock"}


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(["cut", "settle", "restart"]), max_size=25))
def test_a_number_never_stands_for_two_updates(tmp_path_factory: pytest.TempPathFactory, acts: list[str]) -> None:
    """Fault 6."""
    folder = tmp_path_factory.mktemp("outbox")
    outbox, sent = Outbox(folder, "w1", "python"), dict[int, bytes]()
    for turn, act in enumerate(acts):
        if act == "cut" and outbox.pending is None:
            pending = outbox.cut(header(), str(turn).encode())
            assert pending.header.sequence not in sent
            sent[pending.header.sequence] = pending.body
        elif act == "settle":
            outbox.settle()
        elif act == "restart":
            outbox.close()
            outbox = Outbox(folder, "w1", "python")
        if outbox.pending is not None:
            assert sent[outbox.pending.header.sequence] == outbox.pending.body
    outbox.close()
    assert sorted(sent) == list(range(len(sent)))
