"""What a batch does is what a replay of it does, whatever is in it; one that comes again runs nothing twice."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import ray

import raystore as rs
from raystore.core.payload import Payload
from raystore.service.service import PROTOCOL
from raystore.wire import frames
from raystore.wire.codec import decode, encode
from tests.journal.peers import Peer, Store, enqueue, request


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal"


def inputs(store: Store) -> list[Any]:
    return [entry.rollout.input[2:].decode() for entry in store.state.entries.values()]


@pytest.mark.parametrize("beside", [["more", {"token": "none"}], ["close_session", {}], ["statistics", {}]])
async def test_writes_beside_anything_are_replayed(
    path: Path, beside: list[dict[str, str] | str] | list[str | dict[Any, Any]]
) -> None:
    """Also behind operations that are none of the service's."""
    store, peer = Store(path), Peer("p")
    await peer.send(store, peer.batch(enqueue("a"), beside, enqueue("b"), beside))
    await peer.send(store, peer.batch(beside, enqueue("c"))) if beside[0] != "close_session" else None
    assert store.difference() == []
    assert inputs(store.follow()) == inputs(store)


@pytest.mark.parametrize("nonsense", [
    ["dequeue", {"queues": ["default"]}],
    ["dequeue", {"queues": ["default"], "limit": 1, "worker_id": None, "until": 3}],
    ["take", {"consumer": "c"}],
    ["take", {"consumer": "c", "count": 1, "timeout": 0.0, "more": 1}],
    ["enqueue", "text"],
    ["cancel_rollouts", {"rollout_ids": 3, "group_id": None, "tags": None, "x": 1}],
    "nothing",
    [1, {}],
])  # fmt: skip
async def test_nonsense_is_refused_and_does_not_break_the_replay(path: Path, nonsense: Any) -> None:
    """What was refused is refused again, and what stood beside it is done."""
    store, peer = Store(path), Peer("p")
    replies = await peer.send(store, peer.batch(enqueue("a"), nonsense, enqueue("b")))
    assert [reply[0] for reply in replies] == [frames.VALUE, frames.ERROR, frames.VALUE]
    assert replies[1][1] == "InvalidValueError"
    assert store.difference() == []
    assert inputs(store.follow()) == ["a", "b"]


@pytest.mark.parametrize("operation", [
    ["delete_rollouts", {"rollout_ids": ["r"]}],
    ["cancel_rollouts", {"rollout_ids": None, "group_id": "g", "tags": None}],
])  # fmt: skip
async def test_a_long_operation_that_has_run_does_not_run_again(
    path: Path, operation: list[dict[str, list[str]] | str] | list[dict[str, str | None] | str]
) -> None:
    """A client repeats it after a restart; what others did since stands, and the answer is the one it had."""
    store, peer, other = Store(path), Peer("p"), Peer("o")
    await other.call(store, "enqueue", requests=[request(rollout_id="r", group_id="g")])
    sequence = peer.batch(operation)
    answer = await peer.send(store, sequence)
    store = store.follow()
    await other.call(store, "enqueue", requests=[request(rollout_id="r2", group_id="g")])
    if operation[0] == "delete_rollouts":
        await other.call(store, "enqueue", requests=[request(rollout_id="r", group_id="g")])
    before = {i: entry.rollout.status for i, entry in store.state.entries.items()}
    assert [reply[0] for reply in await peer.send(store, sequence)] == [frames.VALUE]
    assert {i: entry.rollout.status for i, entry in store.state.entries.items()} == before
    assert answer[0][0] == frames.VALUE
    assert store.difference() == []


async def test_a_long_operation_that_was_cut_short_goes_on(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process died between two pieces: the rest runs, and the answer is of the whole."""
    monkeypatch.setattr("raystore.remote.server_session.SLICE_SECONDS", -1.0)
    store, peer = Store(path), Peer("p")
    ids = [f"r{number}" for number in range(250)]
    await peer.call(store, "enqueue", requests=[request(rollout_id=i, group_id="g") for i in ids])
    sequence = peer.batch(["cancel_rollouts", {"rollout_ids": ids, "group_id": None, "tags": None}], enqueue("last"))
    running = store.endpoint.exchange(peer.parts(sequence), None)
    running.send(None)  # the first piece
    running.close()
    assert sum(entry.rollout.status == "cancelled" for entry in store.state.entries.values()) == 100
    store = store.follow()
    cancelled, _ = await peer.send(store, sequence)
    assert [pair[0][0] for pair in cancelled[1]] == ids
    assert {entry.rollout.status for i, entry in store.state.entries.items() if i in ids} == {"cancelled"}
    assert store.difference() == []


async def test_what_is_due_is_worked_off_before_a_long_operation_is_cut(path: Path) -> None:
    """Retention takes rollouts of the group away in the same moment; a replay cuts as it was cut."""
    store, peer = Store(path, retention={"max_age_seconds": 10}), Peer("p")
    done = [f"d{number}" for number in range(60)]
    waiting = [f"w{number}" for number in range(90)]
    await peer.call(store, "enqueue", requests=[request(rollout_id=i, group_id="g") for i in done + waiting])
    await peer.call(store, "cancel_rollouts", rollout_ids=done, group_id=None, tags=None)
    await peer.call(store, "release", rollout_ids=done)
    store.tick(20)
    reply = await peer.call(store, "cancel_rollouts", rollout_ids=None, group_id="g", tags=None)
    assert len(reply[1]) == 90
    assert set(store.state.entries) == set(waiting)
    assert store.difference() == []
    assert len(store.follow().state.entries) == 90


async def test_a_batch_does_not_wait_for_one_that_the_client_has(path: Path) -> None:
    """Of two batches under way the later one's answer came: it does not come again, and the next one runs."""
    store, peer = Store(path), Peer("p")
    first, second = peer.batch(enqueue("a")), peer.batch(["statistics", {}], answered=0)
    await peer.send(store, first)
    await peer.send(store, second)
    store = store.follow()
    third = peer.batch(enqueue("c"), answered=0)
    waiting = asyncio.ensure_future(peer.send(store, third, answered=0))
    await asyncio.sleep(0.01)
    assert not waiting.done()
    await peer.send(store, first, answered=0, ahead=[second])
    assert (await asyncio.wait_for(waiting, 5))[0][0] == frames.VALUE
    assert sorted(inputs(store)) == ["a", "c"]
    assert store.difference() == []


async def test_a_long_read_never_goes_on_with_another_one(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a restart what was left of it is gone, which is said; the client begins again."""
    monkeypatch.setattr("raystore.remote.server_session.PAGE_BYTES", 300)
    store, peer = Store(path), Peer("p")
    await peer.call(store, "enqueue", requests=[request(rollout_id=f"r{n}") for n in range(4)])
    every = dict.fromkeys(["status_in", "rollout_id_in", "rollout_id_contains", "sort_by"]) | {
        "filter_logic": "and", "must": {}, "sort_order": "asc", "limit": -1, "offset": 0,
    }  # fmt: skip
    (_, (first, total, token)) = await peer.call(store, "query_rollouts", **every)
    assert (len(first), total) == (1, 4)
    store = store.follow()
    (_, (_, _, other)) = await peer.call(store, "query_rollouts", **every)
    assert other != token
    reply = await peer.call(store, "more", token=token)
    assert reply[:2] == [frames.ERROR, "AnswerGoneError"]
    assert (await peer.call(store, "more", token=other))[0] == frames.VALUE


async def test_notices_of_another_process_are_others(path: Path) -> None:
    """An acknowledgement of one that came before the restart does not hide one that comes after it."""
    store, peer = Store(path), Peer("p")
    numbers = []
    for _ in range(2):
        await peer.send(store, peer.batch(enqueue("x")))
        _, claimed = await peer.call(store, "dequeue", queues=["default"], limit=1, worker_id=None, timeout=0.0)
        rollout_id = claimed[0][0][0]
        sequence = peer.batch(["cancel_rollouts", {"rollout_ids": [rollout_id], "group_id": None, "tags": None}])
        answer = await store.endpoint.exchange(peer.parts(sequence), None)
        _, _, _, later, *_ = frames.unpack_answer(answer)
        numbers += [number for number, reply in later if reply[0] == frames.NOTICE]
        store = store.follow()
    assert len(set(numbers)) == len(numbers) >= 2


async def test_a_payload_whose_references_are_gone_says_so(path: Path) -> None:
    """A journal keeps no objects: the rollout is handed out, and reading its value raises by name."""
    lost = Payload(b"\x02pickled", ("an object reference",))
    store, peer = Store(path), Peer("p")
    packed = frames.pack(("enqueue", {"requests": [{"input": lost, "metadata": None}]}))
    header = [PROTOCOL, "test", "p", 1, 0, [], 1, [], []]
    await store.endpoint.exchange(tuple(frames.join(header, [packed])), {0: packed.refs})
    peer.sequence, peer.ticket = 1, 2
    store = store.follow()
    _, claimed = await peer.call(store, "dequeue", queues=["default"], limit=1, worker_id=None, timeout=0.0)
    ((rollout, _, _),) = claimed
    assert (rollout[1].data, rollout[1].refs) == (lost.data, ())


def test_reading_lost_references_raises_by_name() -> None:
    """Not an IndexError of a pickle."""
    whole = encode([ray.ObjectRef.nil()], "x", 1000)
    assert isinstance(whole, Payload)
    with pytest.raises(rs.PayloadLostError, match="journal"):
        decode(Payload(whole.data, ()))


async def test_a_bulk_call_of_which_a_part_found_no_room_is_refused(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parts that found room too: nothing of it is enqueued, and a replay says the same."""
    store, peer = Store(path), Peer("p")

    def part(value: str, is_last: bool) -> list[Any]:
        return ["enqueue", {"requests": [request(value)], "admit": 0, "chain": [7, is_last]}]

    def refuse(size: Any) -> None:
        raise rs.JournalFullError("p", 0.1)

    assert (await peer.send(store, peer.batch(part("1", False))))[0][0] == frames.VALUE
    with monkeypatch.context() as full:
        full.setattr(store.writer, "reserve", refuse)
        refused = await peer.send(store, peer.batch(part("2", False)))
    assert refused[0][1] == "JournalFullError"
    replies = await peer.send(store, peer.batch(enqueue("beside"), part("3", True), enqueue("behind")))
    assert [reply[0] for reply in replies] == [frames.VALUE, frames.ERROR, frames.VALUE]
    assert replies[1][1] == "JournalFullError"
    assert inputs(store) == ["beside", "behind"]
    assert store.difference() == []
    store = store.follow()
    assert inputs(store) == ["beside", "behind"]
    assert (await peer.send(store, peer.batch(enqueue("new"))))[0][0] == frames.VALUE


async def test_a_rollout_that_was_set_running_by_hand_and_never_ran(path: Path) -> None:
    """It has no attempt whose time could start anew, and the journal opens all the same."""
    store, peer = Store(path), Peer("p")
    await peer.send(store, peer.batch(enqueue("x", rollout_id="r")))
    await peer.call(store, "update_rollout", rollout_id="r", changes={"status": "running"})
    store = store.follow()
    assert store.state.entries["r"].rollout.status == "running"
    await peer.send(store, peer.batch(enqueue("y")))
    assert store.difference() == []
