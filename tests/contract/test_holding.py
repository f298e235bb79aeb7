"""Holding work back: pauses, limits, what is seen of them, and calls that wait meanwhile."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest

import raystore as rs
from raystore.errors import InvalidValueError
from tests.helpers import AnyStore, present, until


def asked(store: AnyStore, count: int, *queues: str) -> list[asyncio.Task[Any]]:
    """So many dequeues, which wait if there is nothing for them."""
    names = queues or ("default",)
    return [asyncio.ensure_future(store.dequeue_rollout(timeout=600, queues=names)) for _ in range(count)]


async def parked(store: AnyStore, waiters: int, *queues: str) -> list[asyncio.Task[Any]]:
    """So many dequeues that wait in the store."""
    calls = asked(store, waiters, *queues)

    async def are_there() -> bool:
        return (await store.statistics())["waiters"] >= waiters

    await until(are_there)
    return calls


async def answered(calls: list[asyncio.Task[Any]], count: int) -> list[rs.AttemptedRollout]:
    """What so many of the calls were answered, once they were; the others still wait."""

    async def are_answered() -> bool:
        return sum(call.done() for call in calls) >= count

    await until(are_answered)
    await asyncio.sleep(0.01)
    done = [call.result() for call in calls if call.done()]
    assert len(done) == count
    return done


async def stop(calls: list[asyncio.Task[Any]]) -> None:
    """Let the calls that still wait go."""
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)


async def test_pause_and_resume(store: AnyStore) -> None:
    """Nothing of a paused queue is handed out; what runs and what is enqueued goes on."""
    await store.enqueue_rollout("running")
    running = present(await store.dequeue_rollout())
    (pause,) = await store.pause(["default"])
    assert (pause.queue, pause.keep) == ("default", False)
    await store.enqueue_rollout("waits")
    assert await store.dequeue_rollout() is None
    assert await store.dequeue_many_rollouts(limit=5) == []
    await store.update_attempt(running.rollout_id, running.attempt.attempt_id, status="succeeded")
    assert await store.resume(["default"]) == []
    assert present(await store.dequeue_rollout()).input == "waits"


async def test_a_parked_dequeue_is_answered_on_resume(store: AnyStore) -> None:
    """It stays parked through the pause, also when work comes, and the longest waiting one comes first."""
    calls = await parked(store, 3)
    await store.pause()
    for number in range(2):
        await store.enqueue_rollout(number)
    assert (await store.statistics())["waiters"] == 3
    assert not any(call.done() for call in calls)
    await store.resume()
    assert [rollout.input for rollout in await answered(calls, 2)] == [0, 1]
    assert [call.done() for call in calls] == [True, True, False]
    await stop(calls)


async def test_a_parked_dequeue_of_several_queues_is_served_by_the_open_one(store: AnyStore) -> None:
    """The first of its queues is paused, the second is not."""
    await store.pause(["first"])
    calls = await parked(store, 2, "first", "second")
    await store.enqueue_rollout("held", queue="first")
    await store.enqueue_rollout("served", queue="second")
    assert [rollout.input for rollout in await answered(calls, 1)] == ["served"]
    await store.resume(["first"])
    assert [rollout.input for rollout in await answered(calls, 2)] == ["served", "held"]


async def test_whoever_waits_for_rollouts_waits_through_a_pause(store: AnyStore) -> None:
    """As long as its own timeout, and to the end if that comes first."""
    made = await store.enqueue_rollout("x")
    await store.pause()
    assert await store.wait_for_rollouts(rollout_ids=[made.rollout_id], timeout=0) == []
    waiting = asyncio.ensure_future(store.wait_for_rollouts(rollout_ids=[made.rollout_id], timeout=600))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    await store.resume()
    await store.update_attempt(present(await store.dequeue_rollout()).rollout_id, "latest", status="succeeded")
    assert [rollout.status for rollout in await waiting] == ["succeeded"]


async def test_a_place_that_becomes_free_is_taken_at_once(store: AnyStore) -> None:
    """By a parked dequeue; no more run than may, however many ask."""
    for number in range(5):
        await store.enqueue_rollout(number)
    limit = await store.limit_queue("default", max_running=2)
    assert (limit.max_running, limit.per_minute, limit.running, limit.reached) == (2, None, 0, None)
    calls = asked(store, 6)
    first, second = await answered(calls, 2)
    assert (await store.statistics())["queue_limits"]["default"]["reached"] == "max_running"
    await store.update_attempt(first.rollout_id, first.attempt.attempt_id, status="succeeded")
    assert len(await answered(calls, 3)) == 3
    await store.cancel_rollouts([second.rollout_id])
    assert len(await answered(calls, 4)) == 4
    await store.limit_queue("default")
    assert sorted(rollout.input for rollout in await answered(calls, 5)) == [0, 1, 2, 3, 4]
    await stop(calls)


async def test_when_the_rate_allows_more_it_is_handed_out_at_once(store: AnyStore) -> None:
    """A parked dequeue is answered as soon as a minute has passed since the claims before."""
    for number in range(5):
        await store.enqueue_rollout(number)
    await store.limit_queue("default", per_minute=2)
    calls = asked(store, 4)
    assert len(await answered(calls, 2)) == 2
    assert (await store.statistics())["queue_limits"]["default"] == {
        "max_running": None, "per_minute": 2, "running": 2, "reached": "per_minute",
    }  # fmt: skip
    await store.testing.tick(60)
    assert len(await answered(calls, 2)) == 2
    await store.testing.tick(0.5)
    assert len(await answered(calls, 4)) == 4
    assert await store.dequeue_rollout() is None


async def test_a_limit_passes_over_its_own_queue_only(store: AnyStore) -> None:
    """Of several queues in one dequeue the next one is served."""
    await store.limit_queue("first", max_running=1)
    for number in range(3):
        await store.enqueue_rollout(number, queue="first")
        await store.enqueue_rollout(number, queue="second")
    got = await store.dequeue_many_rollouts(limit=9, queues=["first", "second"])
    assert [rollout.queue for rollout in got] == ["first", "second", "second", "second"]


async def test_what_is_held_back_can_be_seen(store: AnyStore) -> None:
    """In the statistics and in the story of a rollout: by whom, since when, and which limit."""
    made = await store.enqueue_rollout("x")
    assert (await store.statistics())["paused"] == []
    (pause,) = await store.pause(["default"], keep=True)
    shown = {"queue": "default", "session_id": pause.session_id, "since": pause.since, "keep": True}
    assert (await store.statistics())["paused"] == [shown] == [pause.model_dump()]
    story = "\n".join(await store.story(made.rollout_id))
    assert f"Queue 'default' is paused by session '{pause.session_id}'" in story
    assert "until somebody resumes" in story
    await store.resume()
    await store.pause()
    assert "All queues are paused by" in "\n".join(await store.story(made.rollout_id))
    await store.resume()
    await store.limit_queue("default", max_running=1)
    other = await store.start_rollout("by hand")
    assert "has reached max_running=1: 1 of its rollouts run" in "\n".join(await store.story(made.rollout_id))
    await store.cancel_rollouts([other.rollout_id])
    await store.limit_queue("default", per_minute=1)
    waits = await store.enqueue_rollout("y")
    await store.dequeue_rollout()
    story = "\n".join(await store.story(waits.rollout_id))
    assert "has reached per_minute=1; it hands out again in 60.0 s" in story
    kinds = [change.kind for change in (await store.changes()).items]
    assert [kind for kind in kinds if "queue" in kind and kind != "enqueued"] == [
        "queues_paused", "queues_resumed", "queues_paused", "queues_resumed", "queue_limited", "queue_limited",
    ]  # fmt: skip


async def test_pauses_of_a_process_are_one_whoever_asks_in_it(store: AnyStore) -> None:
    """The blocking twin is the same process; a pause of it is resumed by either."""
    await store.enqueue_rollout("x")
    assert len(store.sync.pause(["default"])) == 1
    assert len(await store.pause(["default"])) == 1
    assert await store.resume() == []
    assert store.sync.resume(["default"], others=True) == []
    assert store.sync.limit_queue("default", max_running=1).max_running == 1
    assert present(await store.dequeue_rollout()).input == "x"


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("pause", {"queues": []}, "queues=<list \\[\\]>.*at least one name"),
    ("pause", {"queues": "default"}, r"queues='default'.*\['default'\]"),
    ("pause", {"queues": 3}, "queues=3.*a list of ids"),
    ("pause", {"queues": ["default", ""]}, r"queues\[1\]=''"),
    ("pause", {"queues": ["a\nb"]}, r"queues\[0\]="),
    ("pause", {"keep": 1}, "keep=1.*True or False"),
    ("resume", {"queues": []}, "queues=<list"),
    ("resume", {"others": "yes"}, "others='yes'.*True or False"),
    ("limit_queue", {"queue": ["default"]}, "queue="),
    ("limit_queue", {"queue": ""}, "queue=''"),
    ("limit_queue", {"queue": "default", "max_running": 0}, r"max_running=0.*1 to 1,000,000,000.*pause\(\)"),
    ("limit_queue", {"queue": "default", "max_running": -1}, "max_running=-1.*None for no limit"),
    ("limit_queue", {"queue": "default", "max_running": math.nan}, "max_running=nan"),
    ("limit_queue", {"queue": "default", "max_running": 2.5}, "max_running=2.5"),
    ("limit_queue", {"queue": "default", "max_running": True}, "max_running=True"),
    ("limit_queue", {"queue": "default", "per_minute": "10"}, "per_minute='10'"),
    ("limit_queue", {"queue": "default", "per_minute": math.inf}, "per_minute=inf"),
    ("limit_queue", {"queue": "default", "per_minute": 100_001}, "per_minute=100001.*1 to 100,000"),
]


@pytest.mark.parametrize(("method", "arguments", "named"), WRONG, ids=str)
async def test_what_is_wrong_is_named_and_changes_nothing(
    store: AnyStore, method: str, arguments: dict[str, Any], named: str
) -> None:
    """The error says the value and what was expected."""
    with pytest.raises(InvalidValueError, match=named):
        await getattr(store, method)(**arguments)
    found = await store.statistics()
    assert (found["paused"], found["queue_limits"]) == ([], {})
