"""A client's session when the store refuses, answers nonsense, or comes back to it too late."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest

import raystore as rs
from raystore.core import batches, claims
from raystore.errors import OutcomeUnknownError, StoreOverloadedError
from raystore.remote import server_session, session
from raystore.wire import frames
from raystore.wire.codec import encode
from tests.conftest import MakeMemoryStore
from tests.helpers import present, until
from tests.service.near import NearStore

ENQUEUE = {"requests": [{"input": encode("x", "input", 1000), "metadata": None}]}
DEQUEUE = {"queues": ["default"], "limit": 1, "worker_id": None}


@pytest.fixture
def near(monkeypatch: pytest.MonkeyPatch) -> Iterator[NearStore]:
    """A store in this process."""
    monkeypatch.setattr(session, "ray_connection", lambda: ("here", "me"))
    store = NearStore()
    yield store
    store.close()


async def test_a_session_that_was_refused_is_served_once_there_is_room(
    near: NearStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error says so: each call asks the store again, and those that nobody refused are served."""
    monkeypatch.setattr(claims, "SESSIONS", 1)
    first, second = near.connect(), near.connect()
    await first.call("enqueue", ENQUEUE)
    for _ in range(3):
        before = near.calls
        told = await asyncio.gather(*(second.call("enqueue", ENQUEUE) for _ in range(3)), return_exceptions=True)
        assert [type(error) for error in told] == [StoreOverloadedError] * 3 and near.calls > before
    monkeypatch.setattr(claims, "SESSIONS", 2)
    assert len(await second.call("enqueue", ENQUEUE)) == 1
    assert (await second.call("statistics", {}))["total_rollouts"] == 2  # what was refused had no effect


@pytest.mark.parametrize("verb", ["exchange", "listen"])
async def test_an_answer_that_cannot_be_read_is_asked_for_again(near: NearStore, verb: str) -> None:
    """It is as if none had come: the batch is sent again and has its effect once, the listen call is parked again."""
    spoilt: list[Any] = []

    def spoil(name: Any, answer: Any) -> Any:
        if name != verb or len(spoilt) == 2:
            return answer
        spoilt.append(name)
        return b"\xc1"  # which no packer makes

    near.spoil = spoil
    peer = near.connect()
    waiting = asyncio.ensure_future(peer.call("dequeue", DEQUEUE | {"timeout": 20.0}))
    await asyncio.sleep(0)
    await near.connect().call("enqueue", ENQUEUE)
    assert len(await asyncio.wait_for(waiting, 15)) == 1
    assert len(spoilt) == 2 and (await peer.call("statistics", {}))["total_attempts"] == 1


async def test_an_answer_that_makes_no_sense_is_told(near: NearStore) -> None:
    """Its callers learn that nobody knows, and the session goes on."""

    def spoil(name: Any, answer: Any) -> bytes | tuple[bytes, list[Any]]:
        near.spoil = lambda name, answer: answer
        return frames.pack_answer(near.service.epoch, frames.DONE, [], [], [], (1, False))

    near.spoil = spoil
    peer = near.connect()
    with pytest.raises(OutcomeUnknownError, match="could not be taken"):
        await peer.call("enqueue", ENQUEUE)
    assert (await peer.call("statistics", {}))["total_rollouts"] == 1


async def _true(value: bool | int) -> bool | int:
    return value


@pytest.mark.parametrize("taken", [1, 3])
async def test_claims_that_came_too_late_are_asked_for_again(make_memory_store: MakeMemoryStore, taken: int) -> None:
    """Its loop was blocked until they were withdrawn: it gets those nobody else took, or waits for its time's rest."""
    store = make_memory_store(clock="manual")
    go, got = threading.Event(), list[rs.AttemptedRollout]()

    async def waits() -> int:
        return (await store.statistics())["waiters"]

    def work() -> None:
        async def main() -> None:
            waiting = asyncio.ensure_future(store.dequeue_many_rollouts(limit=3, timeout=30))
            await asyncio.sleep(0)  # it is parked from here on, and nothing can reach it
            go.wait()
            got.extend(await waiting)

        asyncio.run(main())

    worker = threading.Thread(target=work)
    worker.start()
    await until(waits)
    await store.enqueue_many_rollouts([rs.EnqueueRolloutRequest(input=number) for number in range(3)])
    await store.testing.tick(20, sessions=True)
    for _ in range(taken):
        claimed = present(await store.dequeue_rollout())
        await store.update_attempt(claimed.rollout_id, "latest", status="succeeded")
    go.set()
    await until(lambda: _true(not worker.is_alive() or store.sync.statistics()["waiters"]))
    await store.testing.tick(11)
    await asyncio.to_thread(worker.join, 10)
    assert not worker.is_alive() and len(got) == 3 - taken
    assert len(store._service.state.sessions["local"].held) == 3 - taken


async def test_a_call_of_several_turns_comes_in_between_two_slices(
    near: NearStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of Ray's takes six turns of the loop, each of which would wait for a slice of a long operation."""
    monkeypatch.setattr(server_session, "SLICE_SECONDS", 0.0)  # each piece is a slice
    monkeypatch.setattr(server_session, "PAUSE_SECONDS", 0.02)  # a busy machine may take that for six turns
    client, pieces = near.connect(), 15
    await client.call("enqueue", {"requests": ENQUEUE["requests"] * pieces * batches.PIECE})

    async def turns() -> list[int]:
        """For each of three such calls, how many pieces ran before it was through."""
        service, ran = near.service, []
        begun = service.operations
        while service.operations < begun + 3:  # noqa: ASYNC110 - the pieces are what is waited for
            await asyncio.sleep(0)
        for _ in range(3):
            before = service.operations
            for _ in range(6):
                await asyncio.sleep(0)
            ran.append(service.operations - before)
        return ran

    others = asyncio.wrap_future(asyncio.run_coroutine_threadsafe(turns(), near.loop))
    all_of_them = {"rollout_ids": list(near.service.state.entries), "group_id": None, "tags": None}
    await client.call("cancel_rollouts", all_of_them)
    assert max(await others) <= 1
