"""A bulk operation is one answer, however it is cut, whoever comes in between, and whenever its process dies."""

from __future__ import annotations

import asyncio
import types
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raystore.core.check import check
from raystore.core.snapshot import parts
from raystore.wire import frames
from tests.journal.peers import Peer, Store, enqueue, request

IDS = [f"r{number}" for number in range(12)]
STATES = ["queuing", "succeeded", "failed", "running", "taken", "consumed", "absent"]


async def filled(path: Any, states: list[str], **options: Any) -> tuple[Store, Peer]:
    """A store with a rollout for each of these states."""
    store, peer = Store(path, **options), Peer("filler")
    there = [(i, state) for i, state in zip(IDS, states, strict=False) if state != "absent"]
    await peer.call(store, "enqueue", requests=[request(rollout_id=i, group_id="g") for i, _ in there])
    for step, wanted in enumerate(("consumed", "taken")):
        for rollout_id, state in there:
            if state == wanted:
                await peer.call(store, "update_rollout", rollout_id=rollout_id, changes={"status": "succeeded"})
        taken = await peer.call(store, "take", consumer="c", count=20)
        if wanted == "consumed" and taken[1][1]:
            await peer.call(store, "ack", consumer="c", batch=taken[1][1], at_step=step + 1, note=None)
            await peer.call(store, "checkpoint", consumer="c", at_step=step + 1)
    for rollout_id, state in there:
        if state in ("succeeded", "failed", "running"):
            await peer.call(store, "update_rollout", rollout_id=rollout_id, changes={"status": state})
    return store, peer


def comparable(store: Store) -> list[Any]:
    """The state without times and the life of sessions."""
    entries = store.state.entries
    return [
        sorted((i, e.rollout.status, e.released, sorted(e.taken)) for i, e in entries.items()),
        [i for _, i in store.state.completions.after(None)],
        sorted(store.state.queues),
        {name: (c.cursor, list(c.returned), sorted(c.batches)) for name, c in store.state.consumers.items()},
        [(change.kind, change.rollout_id) for change in store.state.changes],
        {i: list(s.deleting) for i, s in store.state.sessions.items()},
    ]


def plain(reply: Any) -> Any:
    """An answer without times."""
    if reply[0] == frames.VALUE and isinstance(reply[1], list):
        return [reply[0], [(pair[0][0], pair[0][6]) for pair in reply[1]]]
    return reply


@types.coroutine
def rest_of(running: Any, awaited: Any = None) -> Any:
    """What is left of a coroutine that was begun by hand, and is at what it `awaited`."""
    if awaited is not None:
        yield awaited
    while True:
        try:
            awaited = running.send(None)
        except StopIteration as end:
            return end.value
        yield awaited


operations = st.one_of(
    st.lists(st.sampled_from(IDS), max_size=14).map(lambda ids: ["delete_rollouts", {"rollout_ids": ids}]),
    st.lists(st.sampled_from(IDS), max_size=14).map(lambda ids: ["release", {"rollout_ids": ids}]),
    st.lists(st.sampled_from(IDS), max_size=14).map(
        lambda ids: ["cancel_rollouts", {"rollout_ids": ids, "group_id": None, "tags": None}]
    ),
    st.just(["cancel_rollouts", {"rollout_ids": None, "group_id": "g", "tags": None}]),
)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.sampled_from(STATES), min_size=12, max_size=12), st.lists(operations, max_size=3), st.integers(1, 5))
def test_pieces_answer_as_the_whole(
    tmp_path_factory: pytest.TempPathFactory, states: Any, operations: Any, piece: Any
) -> None:
    """In pieces of any size, with slices of one piece, the answer and the state are those of the whole."""

    async def run(size: int, slice_seconds: float) -> tuple[Any, Any]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("raystore.core.batches.PIECE", size)
            patch.setattr("raystore.remote.server_session.SLICE_SECONDS", slice_seconds)
            store, peer = await filled(tmp_path_factory.mktemp("j") / "journal", states)
            replies = [plain(reply) for reply in await peer.send(store, peer.batch(*operations))]
            check(store.state)
            assert store.difference() == []
            store.writer.close()
            return replies, comparable(store)

    assert asyncio.run(run(piece, -1.0)) == asyncio.run(run(1_000, 1.0))


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.sampled_from(STATES), min_size=12, max_size=12),
    st.integers(1, 4),
    st.integers(0, 6),
    st.lists(st.sampled_from(["take", "wait", "nack", "delete", "enqueue", "end", "restart"]), max_size=4),
)
def test_others_come_in_between_and_the_process_dies(
    tmp_path_factory: pytest.TempPathFactory, states: Any, piece: Any, stop: Any, between: Any
) -> None:
    """A deletion that was admitted reaches all that was there, whatever consumers do; the rest is still taken."""

    async def run() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("raystore.core.batches.PIECE", piece)
            patch.setattr("raystore.remote.server_session.SLICE_SECONDS", -1.0)
            patch.setattr("raystore.remote.server_session.PAUSE_SECONDS", 0)  # a turn, which it is driven through here
            store, other = await filled(tmp_path_factory.mktemp("j") / "journal", states)
            deleting = Peer("deleting")
            there = set(store.state.entries)
            sequence = deleting.batch(["delete_rollouts", {"rollout_ids": IDS}], enqueue("behind", rollout_id="behind"))
            exchange = store.endpoint.exchange(deleting.parts(sequence), None)
            running: Coroutine[Any, Any, Any] | None = exchange
            is_done, taken, ended, answer = False, [], False, None
            for _ in range(stop + 1):
                try:
                    if is_done := (awaited := exchange.send(None)) is not None:  # all has run, and is to be written
                        break
                except StopIteration as end:  # and is written
                    is_done, answer = True, end.value
                    break
            reserved = list(store.state.sessions["deleting"].deleting)
            is_refused = "taken" in states
            for what in between:
                if what == "take":
                    reply = await other.call(store, "take", consumer="d", count=3)
                    taken += [pair[0][0] for pair in reply[1][0]]
                elif what == "wait":
                    await other.call(store, "take", consumer="e", count=30, timeout=30.0)
                elif what == "nack":
                    await other.call(store, "nack", consumer="d", batch=1)
                elif what == "delete" and reserved:
                    await other.call(store, "delete_rollouts", rollout_ids=reserved[-1:])
                elif what == "enqueue":
                    await other.call(store, "enqueue", requests=[request("new")])
                elif what == "end" and not ended:
                    ended = True
                    await other.call(store, "report_session", session_id="deleting", worker_id=None)
                elif what == "restart" and running is not None and not is_done:
                    running.close()
                    store = store.follow()
                    running = None
            if reserved and not ended:
                assert not set(taken) & set(reserved)
            if answer is None and running is not None:
                answer = await rest_of(running, awaited)
            elif answer is None:
                answer = await store.endpoint.exchange(deleting.parts(sequence), None)
            _, outcome, *rest = frames.unpack_answer(answer)
            replies = rest[0] if outcome == frames.DONE else None
            left = there & set(store.state.entries)
            if is_refused:
                assert replies is None or replies[0][1] in ("SealedError", "SessionEndedError")
                assert left == there or "delete" in between or ended
            elif not ended or is_done:
                assert replies is not None and replies[0][0] == frames.VALUE
                assert left == set()
                assert replies[0][1] == len(there) - ("delete" in between and bool(reserved))
                assert "behind" in store.state.entries
            assert not store.state.sessions["deleting"].deleting
            check(store.state)
            assert store.difference() == []
            reply = await other.call(store, "take", consumer="f", count=30)
            wanted = [i for _, i in store.state.completions.after(None)]
            assert sorted(pair[0][0] for pair in reply[1][0]) == sorted(
                i for i in wanted if store.state.entries[i].rollout.status == "succeeded"
            )
            store.writer.close()

    asyncio.run(run())


async def test_who_was_past_a_reserved_rollout_gets_it_after_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The deletion ended with its session: what a consumer passed over is not lost to it."""
    monkeypatch.setattr("raystore.core.batches.PIECE", 2)
    monkeypatch.setattr("raystore.remote.server_session.SLICE_SECONDS", -1.0)
    store, other = await filled(tmp_path / "journal", ["succeeded"] * 8)
    deleting = Peer("deleting")
    running = store.endpoint.exchange(
        deleting.parts(deleting.batch(["delete_rollouts", {"rollout_ids": IDS[:6]}])), None
    )
    running.send(None)
    first = await other.call(store, "take", consumer="d", count=9)
    assert [pair[0][0] for pair in first[1][0]] == ["r6", "r7"]
    await other.call(store, "ack", consumer="d", batch=first[1][1], at_step=1, note=None)
    await other.call(store, "report_session", session_id="deleting", worker_id=None)
    assert frames.unpack_answer(await rest_of(running))[2][0][1] == "SessionEndedError"
    again = await other.call(store, "take", consumer="d", count=9)
    assert [pair[0][0] for pair in again[1][0]] == ["r2", "r3", "r4", "r5"]
    check(store.state)
    assert store.difference() == []


def chain(number: int, requests: list[Any], *, is_last: bool, admit: int) -> list[Any]:
    return ["enqueue", {"requests": requests, "admit": admit, "chain": [number, is_last]}]


async def test_a_bulk_call_in_parts_is_enqueued_as_a_whole(tmp_path: Path) -> None:
    """Nothing before its last part, which is answered for all; a process may die in between."""
    store, peer = Store(tmp_path / "journal"), Peer("p")
    first = [request(n, rollout_id=f"m{n}") for n in range(3)]
    assert (await peer.send(store, peer.batch(chain(1, first, is_last=False, admit=4))))[0] == [frames.VALUE, []]
    assert not store.state.entries
    store = store.follow()
    reply = (await peer.send(store, peer.batch(chain(1, [request(3, rollout_id="m3")], is_last=True, admit=4))))[0]
    assert [pair[0][0] for pair in reply[1]] == ["m0", "m1", "m2", "m3"]
    assert store.difference() == []
    store = store.follow()
    assert list(store.state.entries) == ["m0", "m1", "m2", "m3"]
    assert not store.state.sessions["p"].chains


@pytest.mark.parametrize("bad", [
    [request("other", rollout_id="there")],
    [request(1, rollout_id="m0")],
    [{"input": b""}],
    [request(1) for _ in range(9)],
])  # fmt: skip
@pytest.mark.parametrize("place", [0, 1, 2])
async def test_a_refusal_in_any_part_refuses_all(
    tmp_path: Path, bad: list[dict[str, Any]] | list[dict[str, bytes]], place: int
) -> None:
    """A conflict, an id twice, a wrong value, no room: nothing of the call is enqueued, and a replay says the same."""
    store, peer = Store(tmp_path / "journal", max_queued=9), Peer("p")
    await peer.send(store, peer.batch(enqueue("x", rollout_id="there")))
    requests = [[request(n, rollout_id=f"m{n}")] for n in range(3)]
    requests.insert(place, bad)
    total = sum(map(len, requests))
    parts_ = [chain(1, part, is_last=n == 3, admit=total) for n, part in enumerate(requests)]
    replies = await peer.send(store, peer.batch(*parts_))
    assert replies[-1][0] == frames.ERROR
    assert list(store.state.entries) == ["there"]
    assert not store.state.sessions["p"].chains
    assert store.difference() == []


async def test_a_bulk_call_can_be_repeated_when_the_queue_is_full(tmp_path: Path) -> None:
    """What exists does not count, in one part or in many."""
    store, peer = Store(tmp_path / "journal", max_queued=4), Peer("p")
    requests = [request(n, rollout_id=f"m{n}") for n in range(4)]
    for _ in range(2):
        reply = await peer.call(store, "enqueue", requests=requests)
        assert [pair[0][0] for pair in reply[1]] == ["m0", "m1", "m2", "m3"]
        await peer.send(store, peer.batch(chain(1, requests[:2], is_last=False, admit=4)))
        (reply,) = await peer.send(store, peer.batch(chain(1, requests[2:], is_last=True, admit=4)))
        assert [pair[0][0] for pair in reply[1]] == ["m0", "m1", "m2", "m3"]
    assert len(store.state.entries) == 4
    assert (await peer.call(store, "enqueue", requests=[request()]))[1] == "OverloadedError"
    assert store.difference() == []


async def test_parts_without_the_first_are_refused(tmp_path: Path) -> None:
    """It was dropped, or came in a session that has ended: half a call is not enqueued."""
    store, peer = Store(tmp_path / "journal"), Peer("p")
    (reply,) = await peer.send(store, peer.batch(chain(1, [request()], is_last=True, admit=3)))
    assert reply[1] == "SessionEndedError"
    assert not store.state.entries


async def test_chains_do_not_grow(tmp_path: Path) -> None:
    """A bulk call whose caller has gone is ended by its client; of those that nobody ends a few are kept."""
    store, peer = Store(tmp_path / "journal"), Peer("p")
    await peer.send(store, peer.batch(chain(1, [request()], is_last=False, admit=2)))
    await peer.call(store, "end_chain", chain_id=1)
    assert not store.state.sessions["p"].chains
    for number in range(200):
        await peer.send(store, peer.batch(chain(number, [request()], is_last=False, admit=2)))
    assert len(store.state.sessions["p"].chains) < 70
    assert store.difference() == []
    store = store.follow()
    await Peer("o").call(store, "report_session", session_id="p", worker_id=None)
    assert not store.state.sessions["p"].chains


async def test_a_session_that_ends_in_its_own_batch_claims_nothing_more(tmp_path: Path) -> None:
    """What comes behind the operation that ended it is refused by name, and changes nothing; reads are answered too."""
    store, peer, other = Store(tmp_path / "journal"), Peer("p"), Peer("o")
    await other.send(store, other.batch(*(enqueue(n, rollout_id=f"r{n}") for n in range(4))))
    claim: list[Any] = ["dequeue", {"queues": ["default"], "limit": 1, "worker_id": "w", "timeout": 0.0}]
    behind = [
        claim, ["dequeue", claim[1] | {"timeout": 9.0}], ["start_rollout", {"request": request(), "worker_id": None}],
        ["start_attempt", {"rollout_id": "r2", "worker_id": None}], enqueue("late"),
        ["wait", {"rollout_ids": ["r3"], "timeout": 9.0}], ["delete_rollouts", {"rollout_ids": ["r3"]}],
        chain(1, [request()], is_last=False, admit=2),
    ]  # fmt: skip
    batch = peer.batch(claim, ["report_session", {"session_id": "p", "worker_id": None}], *behind)
    replies = await peer.send(store, batch)
    assert [reply[0] for reply in replies[:2]] == [frames.VALUE, frames.VALUE]
    assert [reply[1] for reply in replies[2:]] == ["SessionEndedError"] * len(behind)
    assert sorted(store.state.entries) == ["r0", "r1", "r2", "r3"]
    assert sorted(store.state.queues) == ["r0", "r1", "r2", "r3"]
    session = store.state.sessions["p"]
    assert not session.claims and not session.held and not session.chains
    assert len(store.service.parking) == 0
    check(store.state)
    assert store.difference() == []
    assert list(parts(store.follow().state))
