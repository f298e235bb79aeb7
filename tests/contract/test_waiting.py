"""Waiting: rollouts, completions, the change feed."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import raystore as rs
from raystore.core.indexes import ChangeFeed
from raystore.wire import convert
from tests.conftest import MakeMemoryStore
from tests.helpers import AnyStore, claim, until


async def finish(store: AnyStore, rollout: rs.Rollout, status: rs.RolloutStatus = "succeeded") -> None:
    await store.update_rollout(rollout.rollout_id, status=status)


async def started(coroutine: Any) -> Any:
    """A task that has issued its operation."""
    task = asyncio.ensure_future(coroutine)
    await asyncio.sleep(0)
    return task


async def test_snapshot(store: AnyStore) -> None:
    """timeout <= 0 returns what is finished now, in the order given, with attempts; duplicates twice."""
    a, b = await claim(store), await claim(store)
    await finish(store, b)
    ids = [a.rollout_id, b.rollout_id, "nope", b.rollout_id]
    for timeout in (0, -5):
        found = await store.wait_for_rollouts(rollout_ids=ids, timeout=timeout)
        assert [r.rollout_id for r in found] == [b.rollout_id, b.rollout_id]
    assert {type(r) for r in found} == {rs.AttemptedRollout} and found[0].attempt == b.attempt
    with pytest.raises(ValueError, match="timeout"):
        await store.wait_for_rollouts(rollout_ids=ids, timeout=float("nan"))
    with pytest.raises(ValueError, match="rollout_ids"):
        await store.wait_for_rollouts(rollout_ids=a.rollout_id)


@pytest.mark.parametrize("timeout", [None, 100])
async def test_wait_until_all_are_finished(store: AnyStore, timeout: int | None) -> None:
    """Answered by the completion, in the order given; unknown ids are skipped at once."""
    a, b = await claim(store), await claim(store)
    task = await started(store.wait_for_rollouts(rollout_ids=[b.rollout_id, "nope", a.rollout_id], timeout=timeout))
    await finish(store, a)
    assert not task.done()
    await store.update_attempt(b.rollout_id, "latest", status="failed")
    assert [r.rollout_id for r in await task] == [b.rollout_id, a.rollout_id]
    assert await store.wait_for_rollouts(rollout_ids=["nope"], timeout=timeout) == []
    assert await store.wait_for_rollouts(rollout_ids=[]) == []


async def test_wait_returns_what_is_finished_when_time_is_up(store: AnyStore) -> None:
    """A part of the rollouts, if not all finish in time."""
    a, b = await claim(store), await claim(store)
    task = await started(store.wait_for_rollouts(rollout_ids=[a.rollout_id, b.rollout_id], timeout=10))
    await finish(store, b)
    await store.testing.tick(11)
    assert [r.rollout_id for r in await task] == [b.rollout_id]


async def test_wait_can_be_cancelled(store: AnyStore) -> None:
    """A cancelled wait raises and leaves nothing behind."""
    rollout = await claim(store)
    task = await started(store.wait_for_rollouts(rollout_ids=[rollout.rollout_id]))
    await store.get_latest_resources()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await store.get_latest_resources()
    assert (await store.statistics())["waiters"] == 0


async def test_requeued_rollout_is_waited_for_again(store: AnyStore) -> None:
    """A rollout that finished and was queued again is not finished."""
    a, b = await claim(store), await claim(store)
    task = await started(store.wait_for_rollouts(rollout_ids=[a.rollout_id, b.rollout_id]))
    await finish(store, a)
    await store.update_rollout(a.rollout_id, status="queuing")
    await finish(store, b)
    assert await store.wait_for_rollouts(rollout_ids=[a.rollout_id], timeout=0) == []
    assert not task.done()
    await finish(store, a)
    assert len(await task) == 2


async def test_deleted_rollout_is_waited_for_no_longer(store: AnyStore) -> None:
    """Nobody waits for what cannot come."""
    rollout = await claim(store)
    task = await started(store.wait_for_rollouts(rollout_ids=[rollout.rollout_id]))
    await store.delete_rollouts([rollout.rollout_id])
    assert await task == []


async def test_many_waiters_of_many_rollouts(store: AnyStore) -> None:
    """Each waiting call is answered by its own completions."""
    made = [await claim(store) for _ in range(20)]
    tasks = [await started(store.wait_for_rollout(r.rollout_id)) for r in made]
    await store.cancel_rollouts([r.rollout_id for r in made])
    assert [(await task).rollout_id for task in tasks] == [r.rollout_id for r in made]
    assert await store.wait_for_rollout("nope") is None


async def test_as_completed(store: AnyStore) -> None:
    """Rollouts come as they finish; a timeout says how many did not."""
    made = [await claim(store) for _ in range(3)]
    await finish(store, made[1])
    seen = []

    async def collect() -> None:
        async for rollout in store.as_completed([r.rollout_id for r in made]):
            seen.append(rollout.rollout_id)

    task = await started(collect())
    await finish(store, made[2])
    await finish(store, made[0])
    await task
    order = [made[1].rollout_id, made[2].rollout_id, made[0].rollout_id]
    assert seen == order
    assert [r.rollout_id async for r in store.as_completed([r.rollout_id for r in made])] == order
    assert [r async for r in store.as_completed([])] == []
    with pytest.raises(TimeoutError, match="1 of the rollouts"):
        async for _ in store.as_completed([(await claim(store)).rollout_id], timeout=0.0):
            pass


async def test_completed_with_cursor(store: AnyStore) -> None:
    """Completion order, resumable; one that finishes again comes again, at the tail."""
    made = [await store.enqueue_rollout(i, group_id="g" if i % 2 else None) for i in range(4)]
    for rollout in (made[2], made[0], made[3]):
        await finish(store, rollout)
    page = await store.completed(limit=2)
    assert [r.input for r in page.items] == [2, 0]
    rest = await store.completed(page.cursor)
    assert [r.input for r in rest.items] == [3]
    assert (await store.completed(rest.cursor)).items == []
    await store.update_rollout(made[2].rollout_id, status="queuing")
    await finish(store, made[2])
    assert [r.input for r in (await store.completed(rest.cursor)).items] == [2]
    assert [r.input for r in (await store.completed()).items] == [0, 3, 2]
    assert [r.input for r in (await store.completed(group_id="g")).items] == [3]


async def test_completed_waits(store: AnyStore) -> None:
    """A waiting read is answered by the next completion that fits, or by an empty page in the end."""
    a, b = await store.enqueue_rollout("a"), await store.enqueue_rollout("b", tags={"t": 1})
    task = await started(store.completed(timeout=50, tags={"t": 1}))
    await finish(store, a)
    assert not task.done()
    await finish(store, b)
    page = await task
    assert [r.input for r in page.items] == ["b"]
    late = await started(store.completed(page.cursor, timeout=5))
    await store.testing.tick(6)
    assert (await late).items == []


async def test_changes_feed(store: AnyStore) -> None:
    """One monotone sequence of what happened; kinds filter, the cursor resumes."""
    rollout = await claim(store)
    await store.update_attempt(rollout.rollout_id, "latest", status="succeeded")
    page = await store.changes()
    assert [change.kind for change in page.items] == ["enqueued", "claimed", "succeeded"]
    assert [change.sequence for change in page.items] == [1, 2, 3]
    assert {change.rollout_id for change in page.items} == {rollout.rollout_id}
    assert (await store.changes(page.cursor)).items == []
    only = await store.changes(kinds=["claimed"])
    assert [c.kind for c in only.items] == ["claimed"] and only.cursor == 3
    task = await started(store.changes(page.cursor, kinds=["enqueued"], timeout=50))
    await store.update_worker("w")
    await store.enqueue_rollout("y")
    assert [c.kind for c in (await task).items] == ["enqueued"]


async def test_a_cursor_that_is_too_old(make_memory_store: MakeMemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The feed is bounded; an old cursor is told what the oldest entry is."""
    monkeypatch.setattr(ChangeFeed.__init__, "__defaults__", (1_000,))
    store = make_memory_store()
    for _ in range(3):
        await store.enqueue_group("x", 1000)
    with pytest.raises(rs.CursorTooOldError, match="oldest entry is") as caught:
        await store.changes(0, limit=1)
    oldest = caught.value.oldest
    assert (await store.changes(oldest - 1, limit=1)).items[0].sequence == oldest
    assert (await store.changes(None, limit=1)).items[0].sequence == oldest


@pytest.mark.parametrize("method", ["completed", "changes"])
@pytest.mark.parametrize("bad", [{"timeout": -1}, {"timeout": float("nan")}, {"limit": 0}, {"cursor": -1}], ids=str)
async def test_bad_arguments_of_reads_with_a_cursor(
    store: AnyStore, method: str, bad: dict[str, int] | dict[str, float]
) -> None:
    """Negative times, NaN and senseless numbers are refused by name."""
    with pytest.raises(ValueError, match=next(iter(bad))):
        await getattr(store, method)(**bad)


async def test_as_completed_ends_when_what_is_left_does_not_exist(
    store: AnyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rollouts that are deleted meanwhile are skipped, as they are by wait_for_rollouts."""
    monkeypatch.setattr("raystore.client.client.LOOK_AGAIN_SECONDS", 5.0)
    made = [await claim(store) for _ in range(2)]
    seen = []

    async def collect() -> None:
        async for rollout in store.as_completed([r.rollout_id for r in made]):
            seen.append(rollout.rollout_id)

    task = await started(collect())
    await finish(store, made[1])
    await store.delete_rollouts([made[0].rollout_id])
    for _ in range(4):
        await store.testing.tick(6)
        await asyncio.sleep(0.05)
    await asyncio.wait_for(task, 20)
    assert seen == [made[1].rollout_id]


async def test_as_completed_refuses_what_never_existed(store: AnyStore) -> None:
    """All that is unknown is named at once, before anything is given: it would be missed in silence otherwise."""
    done = await claim(store)
    await finish(store, done)
    seen = []
    with pytest.raises(
        rs.RolloutNotFoundError, match="Rollout n-0 not found.*'n-1'.*'n-5' and 2 more.*enqueued"
    ) as caught:
        async for rollout in store.as_completed([done.rollout_id, *(f"n-{n}" for n in range(8))]):
            seen.append(rollout)
    assert seen == [] and caught.value.args == tuple(f"n-{n}" for n in range(8))


async def test_as_completed_is_told_only_of_what_it_waits_for(store: AnyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """What others finish does not travel to it, however much that is; its own comes one by one, in order."""
    mine = [await claim(store) for _ in range(5)]
    others = await store.enqueue_many_rollouts([rs.EnqueueRolloutRequest(input="other", queue="o") for _ in range(300)])
    decoded, before = [], convert.to_any_rollout

    def decode(answer: Any) -> Any:
        decoded.append(answer)
        return before(answer)

    monkeypatch.setattr(convert, "to_any_rollout", decode)
    seen = []

    async def collect() -> None:
        async for rollout in store.as_completed([r.rollout_id for r in mine]):
            seen.append(rollout.rollout_id)

    task = await started(collect())
    for number, rollout in enumerate(mine):
        part = [r.rollout_id for r in others[number * 60 : (number + 1) * 60]]
        await store._transport.call("cancel_rollouts", {"rollout_ids": part, "group_id": None, "tags": None})
        assert len(seen) == number
        await finish(store, rollout)

        async def is_told(number: int = number) -> bool:
            return len(seen) > number

        await until(is_told)
    await task
    assert seen == [rollout.rollout_id for rollout in mine]
    assert len(decoded) == 2 * 5, "each once when it is finished here, and once when it is told of"
