"""Ray calls that fail: repeated with an identity, given up with a clear error.

The first tests put a double in the place of Ray's actor handle, to fail exactly when wanted; the last one lets Ray
itself lose replies.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from concurrent.futures import Future
from threading import Thread
from typing import Any

import pytest
import ray

import raystore as rs
from raystore.remote import session_state
from raystore.remote.session import ClientSession
from raystore.wire import frames
from tests.helpers import until

UNAVAILABLE = ray.exceptions.ActorUnavailableError("no answer", b"\x00" * 16)


class Handle:
    """What a session needs of an actor handle: each call is answered by the next of a script."""

    def __init__(self, *script: Any) -> None:
        self.script = list(script)
        self.batches: list[tuple[str, int]] = []
        self.exchange = self
        self.listen = self

    def remote(self, frame: Any, *more: Any) -> Any:
        answer: Future[Any] = Future()
        if frame[0] == 1:  # a batch of one part, not a listen call
            self.batches.append(tuple(frames.split([frame], None)[0][2:4]))
            outcome = self.script.pop(0)
            if isinstance(outcome, Future):
                answer = outcome
            elif isinstance(outcome, Exception):
                answer.set_exception(outcome)
            else:
                answer.set_result(outcome)
        self.future = lambda: answer
        return self


HINTS = itertools.count(1)


def answered(
    *replies: Any, later: Sequence[list[Any]] = (), wanted: bool = False, epoch: int = 1
) -> bytes | tuple[bytes, list[Any]]:
    """The answer to a batch."""
    return frames.pack_answer(epoch, frames.DONE, replies, later, [], [next(HINTS), wanted])


def done(*values: Any, **more: Any) -> bytes | tuple[bytes, list[Any]]:
    """The answer to a batch whose operations succeeded."""
    return answered(*([frames.VALUE, value] for value in values), **more)


ENDED = frames.pack_answer(1, frames.ENDED)


async def test_a_failed_batch_is_sent_again_with_the_same_identity() -> None:
    """An error that leaves the outcome open is no error for the caller."""
    handle = Handle(UNAVAILABLE, UNAVAILABLE, done([7]))
    session = ClientSession(handle, "s", 1, 10**6)
    assert await session.call("next_numbers", {"rollout_ids": ["r"]}) == [7]
    assert handle.batches == [(session.state.session_id, 1)] * 3
    session.fail(rs.StoreClosedError("s"))


async def test_a_write_that_was_repeated_into_an_ended_session_has_an_unknown_outcome() -> None:
    """It may have run the first time; reads simply run again in the new session."""
    handle = Handle(UNAVAILABLE, ENDED, done(None))
    session = ClientSession(handle, "s", 1, 10**6)
    first = session.state.session_id
    write = asyncio.ensure_future(session.call("next_numbers", {"rollout_ids": ["r"]}))
    read = asyncio.ensure_future(session.call("get_latest_resources", {}))
    with pytest.raises(rs.OutcomeUnknownError, match="session ended before the answer came"):
        await write
    assert await read is None
    assert handle.batches == [(first, 1), (first, 1), (session.state.session_id, 1)]
    assert session.state.session_id != first
    session.fail(rs.StoreClosedError("s"))


async def test_a_batch_that_was_sent_once_is_sent_again_in_a_new_session() -> None:
    """An ended session executes nothing, so the write cannot have run: unseen."""
    handle = Handle(ENDED, done([1]))
    session = ClientSession(handle, "s", 1, 10**6)
    assert await session.call("next_numbers", {"rollout_ids": ["r"]}) == [1]
    session.fail(rs.StoreClosedError("s"))


async def test_clients_give_up_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the time for retries, a write has an unknown outcome and a read says that the store is unavailable."""
    monkeypatch.setattr(session_state, "RETRY_SECONDS", 0.3)
    handle = Handle(*[UNAVAILABLE] * 50)
    session = ClientSession(handle, "s", 1, 10**6)
    with pytest.raises(rs.OutcomeUnknownError, match=r"no answer for 0.3 s\. .*no answer"):
        await session.call("next_numbers", {"rollout_ids": ["r"]})
    with pytest.raises(rs.StoreUnavailableError) as caught:
        await session.call("get_latest_resources", {})
    assert type(caught.value) is rs.StoreUnavailableError
    session.fail(rs.StoreClosedError("s"))


async def test_an_answer_of_an_older_incarnation_is_not_accepted() -> None:
    """A process was replaced and does not know it: the operation is repeated, and the newer one's answer counts."""
    handle = Handle(done([99], epoch=0), done([1], epoch=2))
    session = ClientSession(handle, "s", 1, 10**6)
    assert await session.call("next_numbers", {"rollout_ids": ["r"]}) == [1]
    assert session.state.epoch == 2
    session.fail(rs.StoreClosedError("s"))


async def test_an_answer_may_overtake_the_word_that_its_call_is_parked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replies of two batches come in either order; the answer of a parked call is not lost by that."""
    monkeypatch.setattr(session_state, "WORTH_OPERATIONS", 1)
    slow: Future[Any] = Future()
    quick: Future[Any] = Future()
    handle = Handle(slow, quick)
    session = ClientSession(handle, "s", 1, 10**6)
    waiting = asyncio.ensure_future(session.call("dequeue", {"timeout": 5.0}))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    tick = asyncio.ensure_future(session.call("tick", {"seconds": 6.0, "sessions": False}))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert len(handle.batches) == 2
    later = [[1, [frames.VALUE, []]]]
    quick.set_result(answered([frames.VALUE, None], later=later, wanted=True))
    await tick
    slow.set_result(answered([frames.PARKED], wanted=True))
    assert await asyncio.wait_for(waiting, 5) == []
    session.fail(rs.StoreClosedError("s"))


async def test_a_dead_actor_fails_at_once() -> None:
    """Nothing can come any more: everybody who waits is told, and everybody who comes."""
    handle = Handle(ray.exceptions.ActorDiedError())
    session = ClientSession(handle, "s", 1, 10**6)
    for _ in range(2):
        with pytest.raises(rs.StoreUnavailableError, match="its actor has died"):
            await session.call("next_numbers", {"rollout_ids": ["r"]})

    async def ended() -> bool:
        return not any(t.name == "raystore-session" and t is session._thread for t in _threads())

    await until(ended)


def _threads() -> list[Thread]:
    import threading

    return [thread for thread in threading.enumerate() if thread.is_alive()]
