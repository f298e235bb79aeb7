"""Training on each finished rollout exactly once: take, ack, nack, checkpoint, rewind."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

import raystore as rs
from tests.helpers import AnyStore, make_span


async def start(store: AnyStore, **request: Any) -> Any:
    """A rollout that runs."""
    if not request:
        return await store.start_rollout("x")
    made = await store.enqueue_rollout("x", **request)
    return await store.start_attempt(made.rollout_id)


async def finish(
    store: AnyStore, count: int = 1, status: rs.AttemptStatus = "succeeded", keep: bool = False, **request: Any
) -> list[Any]:
    """Ids of rollouts that have run, in the order in which they finished; `keep` lets all start before one finishes."""
    done = []
    started = [await start(store, **request) for _ in range(count)] if keep else []
    for _ in range(count):
        rollout = started.pop(0) if keep else await start(store, **request)
        await store.update_attempt(rollout.rollout_id, rollout.attempt.attempt_id, status=status)
        done.append(rollout.rollout_id)
    return done


def ids(batch: rs.Batch | BaseException) -> list[Any]:
    assert isinstance(batch, rs.Batch)
    return [rollout.rollout_id for rollout in batch.rollouts]


async def test_each_finished_rollout_comes_once_in_completion_order(store: AnyStore) -> None:
    """Failed ones if they are asked for; cancelled and dropped ones never; each consumer on its own."""
    first = await finish(store, 2)
    cancelled = await store.enqueue_rollout("x")
    await store.cancel_rollouts([cancelled.rollout_id])
    second = await finish(store, 1, status="failed")
    both: list[rs.RolloutStatus] = ["failed", "succeeded"]
    batch = await store.take(2, consumer="t", status_in=both)
    assert (ids(batch), batch.number, batch.consumer) == (first, 1, "t")
    await store.ack(batch, step=1)
    batch = await store.take(5, consumer="t", status_in=both)
    assert (ids(batch), batch.number) == (second, 2)
    assert batch.rollouts[0].status == "failed"
    assert ids(await store.take(5, consumer="other")) == first
    await store.ack(batch, step=2)
    empty = await store.take(1, consumer="t")
    assert (empty.rollouts, empty.number) == ([], 0)


async def test_who_holds_a_batch_gets_no_other(store: AnyStore) -> None:
    """Named: the batch, whose it is, and what to do. As many as are allowed are given, and none twice."""
    done = await finish(store, 5)
    first = await store.take(2, consumer="t")
    with pytest.raises(
        rs.BatchHeldError, match=r"batch 1 \(2 rollouts, taken by this process\).*nack.*rewind.*max_open"
    ):
        await store.take(2, consumer="t")
    with pytest.raises(rs.BatchHeldError):
        await store.take(2, consumer="t", timeout=5)
    second = await store.take(2, consumer="t", max_open=2)
    assert (ids(first), ids(second)) == (done[:2], done[2:4])
    with pytest.raises(rs.BatchConflictError, match=r"max_open=2"):
        await store.take(1, consumer="t", max_open=2)
    shown = (await store.statistics())["consumers"]["t"]
    assert [(b["batch"], b["rollouts"]) for b in shown["open"]] == [(1, 2), (2, 2)]
    assert all(b["session"] for b in shown["open"]) and shown["awaited"] == 1
    await store.ack(second, step=1)
    assert ids(await store.take(1, consumer="t", max_open=2)) == done[4:]
    await store.ack(first, step=1)


async def test_two_that_wait_are_given_different_ones(store: AnyStore) -> None:
    """With room for two batches both get one; with room for one the other is told who has it."""
    waiting = [asyncio.ensure_future(store.take(2, consumer="t", timeout=60, max_open=2)) for _ in range(2)]
    await asyncio.sleep(0)
    done = await finish(store, 4, keep=True)
    assert sorted([ids(await one) for one in waiting]) == sorted([done[:2], done[2:]])
    other = [asyncio.ensure_future(store.take(2, consumer="other", timeout=60)) for _ in range(2)]
    found = await asyncio.gather(*other, return_exceptions=True)
    assert [type(one) for one in found if isinstance(one, Exception)] == [rs.BatchHeldError]


async def test_take_waits_until_there_are_enough_and_then_gives_what_there_is(store: AnyStore) -> None:
    """The third completion ends the wait; the end of the time ends another."""
    more = await store.enqueue_rollout("more may come")
    waiting = asyncio.ensure_future(store.take(3, consumer="t", timeout=60))
    await asyncio.sleep(0)
    done = await finish(store, 2)
    assert not waiting.done()
    done += await finish(store, 1)
    batch = await waiting
    assert ids(batch) == done
    await store.ack(batch, step=1)
    last = await finish(store, 1)
    waiting = asyncio.ensure_future(store.take(3, consumer="t", timeout=5))
    await asyncio.sleep(0)
    await store.statistics()
    await store.testing.tick(6)
    assert ids(await waiting) == last
    assert (await store.get_rollout_by_id(more.rollout_id)).status == "queuing"


@pytest.mark.parametrize("end", ["finish", "fail", "cancel", "delete"])
async def test_a_take_ends_once_nothing_can_make_it_longer(store: AnyStore, end: str) -> None:
    """Whatever becomes of the last that waits or runs; what its filter leaves out does not count."""
    await store.enqueue_rollout("of another mode", mode="val")
    (done,) = await finish(store, mode="train")
    last = await start(store, mode="train")
    waiting = asyncio.ensure_future(store.take(3, consumer="t", mode="train", timeout=600))
    await asyncio.sleep(0)
    await store.statistics()
    assert not waiting.done()
    if end == "cancel":
        await store.cancel_rollouts([last.rollout_id])
    elif end == "delete":
        await store.delete_rollouts([last.rollout_id])
    else:
        status: rs.AttemptStatus = "succeeded" if end == "finish" else "failed"
        await store.update_attempt(last.rollout_id, last.attempt.attempt_id, status=status)
    expected = [done, last.rollout_id] if end == "finish" else [done]
    batch = await asyncio.wait_for(waiting, 10)
    assert ids(batch) == expected
    await store.ack(batch, step=1)
    assert ids(await store.take(1, consumer="u", timeout=600)) == [done]


async def test_with_nothing_in_hand_a_take_waits_its_time(store: AnyStore) -> None:
    """Somebody may enqueue meanwhile."""
    waiting = asyncio.ensure_future(store.take(2, consumer="t", timeout=5))
    await asyncio.sleep(0)
    await store.statistics()
    await store.testing.tick(4)
    assert not waiting.done()
    done = await finish(store, 1)
    assert ids(await waiting) == done
    await store.ack(await store.take(1, consumer="u"), step=1)
    waiting = asyncio.ensure_future(store.take(2, consumer="u", timeout=5))
    await asyncio.sleep(0)
    await store.statistics()
    await store.testing.tick(6)
    assert (await waiting).number == 0


async def test_a_consumer_takes_what_its_filter_says(store: AnyStore) -> None:
    """Mode, tags, queue, group and status, also together; it is fixed by the first take."""
    plain = await finish(store, 1)
    train = await finish(store, 1, mode="train")
    tagged = await finish(store, 1, mode="train", tags={"level": 3})
    grouped = await finish(store, 1, group_id="g", queue="other")
    failed = await finish(store, 1, mode="val", status="failed")
    everything = plain + train + tagged + grouped
    filtered: list[tuple[str, dict[str, Any], list[Any]]] = [
        ("all", {}, everything),
        ("train", {"mode": "train"}, train + tagged),
        ("tagged", {"mode": "train", "tags": {"level": 3}}, tagged),
        ("group", {"group_id": "g"}, grouped),
        ("queue", {"queue": "other", "status_in": ["succeeded"]}, grouped),
        ("failed", {"status_in": ["failed"]}, failed),
        ("both", {"status_in": ["failed", "succeeded"]}, everything + failed),
        ("none", {"tags": {"level": 4}}, []),
    ]
    for name, filters, expected in filtered:
        waiting = asyncio.ensure_future(store.take(9, consumer=name, **filters))
        assert ids(await waiting) == expected, name
    later = await finish(store, 1, mode="train", tags={"level": 3, "more": True})
    await store.rewind("tagged", 0)
    assert ids(await store.take(9, consumer="tagged")) == tagged + later
    with pytest.raises(
        rs.ConsumerFilterError, match=r"'train' takes .*'mode': 'train'.*asks for .*'val'.*forget_consumer"
    ):
        await store.take(1, consumer="train", mode="val")
    with pytest.raises(rs.ConsumerFilterError):
        await store.take(1, consumer="all", status_in=["failed"])


async def test_a_filter_may_be_given_at_the_start(make_store: Callable[..., AnyStore]) -> None:
    """Then it is awaited from the beginning, and a take need not repeat it; one without a filter fixes it later."""
    store = make_store(consumers={"trainer": {"mode": "train"}, "other": None}, retention={"max_rollouts": 0})
    train = await finish(store, 1, mode="train")
    val = await finish(store, 1, mode="val")
    failed = await finish(store, 1, status="failed")
    shown = (await store.statistics())["consumers"]
    assert shown["trainer"]["filter"] == {"mode": "train", "status_in": ["succeeded"]}
    assert (shown["other"]["filter"], shown["trainer"]["awaited"], shown["other"]["awaited"]) == (None, 1, 3)
    with pytest.raises(rs.ConsumerFilterError, match="consumers="):
        await store.take(1, consumer="trainer", mode="val")
    assert ids(await store.take(5, consumer="trainer", mode="train")) == train
    assert ids(await store.take(5, consumer="other", mode="val")) == val
    assert (await store.statistics())["consumers"]["other"]["awaited"] == 0
    assert failed


async def test_a_consumer_is_forgotten(make_store: Callable[..., AnyStore]) -> None:
    """What it awaited or held can go; who waits in its name gets nothing; with a new filter it begins anew."""
    store = make_store(retention={"max_rollouts": 0}, consumers=["t"])
    held = await finish(store, 2)
    batch = await store.take(2, consumer="t")
    awaited = await finish(store, 1)
    await store.query_many_spans(held + awaited)
    await store.testing.tick(1)
    assert len(await store.query_rollouts()) == 3
    waiting = asyncio.ensure_future(store.take(2, consumer="t", timeout=60, max_open=2))
    await asyncio.sleep(0)
    (got,) = [await waiting]
    assert ids(got) == awaited  # nothing else can come
    waiting = asyncio.ensure_future(store.take(2, consumer="t", timeout=60, max_open=3))
    await asyncio.sleep(0)
    await store.statistics()
    assert await store.forget_consumer("t") == 3
    assert (await waiting).number == 0
    assert await store.forget_consumer("t") == 0
    await store.testing.tick(1)
    assert len(await store.query_rollouts()) == 0
    with pytest.raises(rs.BatchConflictError):
        await store.ack(batch, step=1)
    done = await finish(store, 1, mode="val")
    assert ids(await store.take(1, consumer="t", mode="val")) == done


async def test_what_is_given_back_comes_first_and_wakes_whoever_waits(store: AnyStore) -> None:
    """In the order in which it was taken, before what finished since."""
    first = await finish(store, 2)
    batch = await store.take(2, consumer="t")
    later = await finish(store, 1)
    await store.nack(batch)
    assert ids(await store.take(3, consumer="t")) == first + later


async def test_a_cancelled_take_leaves_nothing_behind(store: AnyStore) -> None:
    """Neither a call that waits nor a batch that nobody has."""
    waiting = asyncio.ensure_future(store.take(1, consumer="t", timeout=60))
    await asyncio.sleep(0)
    await store.statistics()
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    done = await finish(store, 1)
    assert ids(await store.take(1, consumer="t")) == done
    await store.rewind("t", 0)
    waiting = asyncio.ensure_future(store.take(1, consumer="t", timeout=60))
    await asyncio.sleep(0)
    waiting.cancel()  # it may have its answer already
    (answer,) = await asyncio.gather(waiting, return_exceptions=True)
    await store.statistics()
    assert ids(answer if waiting.done() and not waiting.cancelled() else await store.take(1, consumer="t")) == done


async def test_a_model_that_goes_back_to_its_checkpoint_sees_what_it_had_not_seen(store: AnyStore) -> None:
    """Consumed after the checkpoint, or taken and not consumed: all of that, in the order in which it was taken."""
    done = await finish(store, 8)
    for step in (1, 2, 3):
        await store.ack(await store.take(2, consumer="t"), step=step, note=f"loss {step}")
    held = await store.take(1, consumer="t")
    assert ids(held) == done[6:7]
    assert await store.checkpoint("t", 1) == 2
    assert await store.rewind("t", 1) == 5
    assert ids(await store.take(8, consumer="t")) == done[2:]
    entries = await store.ledger("t")
    assert [(e.rollout_id, e.step, e.is_durable) for e in entries[:2]] == [(i, 1, True) for i in done[:2]]
    assert entries[0].note == "loss 1"
    assert {e.step for e in entries[2:]} == {None}
    with pytest.raises(rs.ConflictError, match="released"):
        await store.rewind("t", 0)
    with pytest.raises(rs.ConflictError, match="before its last one"):
        await store.checkpoint("t", 0)


async def test_a_rewind_to_where_one_is_gives_back_what_is_held(store: AnyStore) -> None:
    """Said after each start of a trainer: also after the first, and after one in which nothing went wrong."""
    assert await store.rewind("t", 0) == 0
    done = await finish(store, 2)
    await store.ack(await store.take(1, consumer="t"), step=1)
    await store.take(1, consumer="t")
    assert await store.rewind("t", 1) == 1
    assert ids(await store.take(1, consumer="t")) == done[1:]


async def test_an_acknowledgement_may_be_said_again_and_no_other_may(store: AnyStore) -> None:
    """The same step is no news; another step, a batch that went back, and one that never was are conflicts."""
    await finish(store, 3)
    batch = await store.take(1, consumer="t")
    await store.ack(batch, step=5)
    await store.ack(batch, step=5)
    with pytest.raises(rs.BatchConflictError, match="step 5 has consumed"):
        await store.ack(batch, step=6)
    second = await store.take(1, consumer="t")
    with pytest.raises(rs.BatchConflictError, match="one before"):
        await store.ack(second, step=4)
    await store.nack(second)
    with pytest.raises(rs.BatchConflictError, match="any more"):
        await store.ack(second, step=6)
    with pytest.raises(rs.BatchConflictError, match="never was"):
        await store.ack(second.model_copy(update={"number": 9}), step=6)
    with pytest.raises(rs.BatchConflictError, match="taken nothing"):
        await store.nack(second.model_copy(update={"consumer": "nobody"}))
    await store.checkpoint("t", 7)
    third = await store.take(1, consumer="t")
    with pytest.raises(rs.BatchConflictError, match="durable at step 7"):
        await store.ack(third, step=7)


async def test_what_is_in_a_batch_is_sealed(store: AnyStore) -> None:
    """Late reports stay on their attempts; it is not run again, not deleted, and freed when all have trained on it."""
    (rollout_id,) = await finish(store, status="failed")
    (attempt,) = await store.query_attempts(rollout_id)
    batch = await store.take(1, consumer="t", status_in=["failed"])
    with pytest.raises(rs.SealedError, match="'t'"):
        await store.update_rollout(rollout_id, status="queuing")
    with pytest.raises(rs.SealedError):
        await store.start_attempt(rollout_id)
    with pytest.raises(rs.SealedError):
        await store.delete_rollouts([rollout_id])
    reward = {"agentlightning.reward.0.value": 2.0}
    late = make_span(rollout_id, attempt_id=attempt.attempt_id, name="agentlightning.annotation", attributes=reward)
    await store.add_span(late)
    await store.update_attempt(rollout_id, attempt.attempt_id, status="succeeded")
    after = await store.get_rollout_by_id(rollout_id)
    assert (after.status, after.reward) == ("failed", None)
    assert (after.attempt.status, after.attempt.reward) == ("succeeded", 2.0)
    await store.nack(batch)
    await store.update_rollout(rollout_id, status="queuing")
    assert (await store.take(1, consumer="t")).rollouts == []


async def test_a_rollout_is_released_when_all_that_took_it_have_a_checkpoint(
    make_store: Callable[..., AnyStore],
) -> None:
    """Until then it counts as unread: the retention rule lets it be."""
    store = make_store(retention={"max_rollouts": 0})
    (rollout_id,) = await finish(store)
    for consumer in ("a", "b"):
        await store.ack(await store.take(1, consumer=consumer), step=1)
    await store.query_spans(rollout_id)
    await store.checkpoint("a", 1)
    await store.testing.tick(1)
    assert await store.get_rollout_by_id(rollout_id) is not None
    await store.checkpoint("b", 1)
    await store.testing.tick(1)
    assert await store.get_rollout_by_id(rollout_id) is None
    assert (await store.statistics())["consumers"]["b"]["checkpoint"] == 1


@pytest.mark.parametrize("call", [
    lambda store: store.take(0, consumer="t"),
    lambda store: store.take(1, consumer=""),
    lambda store: store.take(1, consumer="t", timeout=-1),
    lambda store: store.take(1, consumer="t", mode="training"),
    lambda store: store.take(1, consumer="t", tags={"a": None}),
    lambda store: store.take(1, consumer="t", queue=""),
    lambda store: store.take(1, consumer="t", group_id=7),
    lambda store: store.take(1, consumer="t", status_in="failed"),
    lambda store: store.take(1, consumer="t", status_in=["cancelled"]),
    lambda store: store.take(1, consumer="t", status_in=[]),
    lambda store: store.take(1, consumer="t", max_open=0),
    lambda store: store.forget_consumer(""),
    lambda store: store.checkpoint("t", -1),
    lambda store: store.rewind("t", 1.5),
    lambda store: store.ack("batch", step=1),
])  # fmt: skip
async def test_bad_input_is_named_and_changes_nothing(store: AnyStore, call: Callable[..., Any]) -> None:
    """As everywhere."""
    with pytest.raises((ValueError, TypeError)):
        await call(store)
    assert (await store.statistics())["consumers"] == {}


def test_the_blocking_twins_do_the_same(store: AnyStore) -> None:
    """As everywhere."""
    rollout = store.sync.start_rollout("x")
    store.sync.update_attempt(rollout.rollout_id, rollout.attempt.attempt_id, status="succeeded")
    batch = store.sync.take(1, consumer="t", timeout=5)
    store.sync.ack(batch, step=1)
    assert store.sync.checkpoint("t", 1) == 1
    assert store.sync.rewind("t", 1) == 0
    assert len(store.sync.ledger("t")) == 1
    assert store.sync.forget_consumer("t") == 0
