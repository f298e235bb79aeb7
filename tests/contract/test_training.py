"""Training on each finished rollout exactly once: take, ack, nack, checkpoint, rewind."""

from __future__ import annotations

import asyncio

import pytest

import raystore as rs
from tests.helpers import make_span


async def finish(store, count=1, status="succeeded", **request):
    """Ids of rollouts that have run, in the order in which they finished."""
    done = []
    for _ in range(count):
        rollout = await store.start_rollout("x", **request)
        await store.update_attempt(rollout.rollout_id, rollout.attempt.attempt_id, status=status)
        done.append(rollout.rollout_id)
    return done


def ids(batch):
    return [rollout.rollout_id for rollout in batch.rollouts]


async def test_each_finished_rollout_comes_once_in_completion_order(store):
    """Failed ones too; cancelled and dropped ones never; each consumer on its own."""
    first = await finish(store, 2)
    cancelled = await store.enqueue_rollout("x")
    await store.cancel_rollouts([cancelled.rollout_id])
    second = await finish(store, 1, status="failed")
    batch = await store.take(2, consumer="t")
    assert (ids(batch), batch.number, batch.consumer) == (first, 1, "t")
    await store.ack(batch, step=1)
    batch = await store.take(5, consumer="t")
    assert (ids(batch), batch.number) == (second, 2)
    assert batch.rollouts[0].status == "failed"
    assert ids(await store.take(5, consumer="other")) == first + second
    await store.ack(batch, step=2)
    empty = await store.take(1, consumer="t")
    assert (empty.rollouts, empty.number) == ([], 0)


async def test_a_batch_that_is_held_is_given_again(store):
    """Whoever comes back after a crash goes on with it, whatever it asks for."""
    first = await finish(store, 3)
    batch = await store.take(2, consumer="t")
    assert await store.take(1, consumer="t") == batch
    assert ids(await store.take(3, consumer="t", timeout=30)) == first[:2]


async def test_take_waits_until_there_are_enough_and_then_gives_what_there_is(store):
    """The third completion ends the wait; the end of the time ends another."""
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


async def test_what_is_given_back_comes_first_and_wakes_whoever_waits(store):
    """In the order in which it was taken, before what finished since."""
    first = await finish(store, 2)
    batch = await store.take(2, consumer="t")
    later = await finish(store, 1)
    await store.nack(batch)
    assert ids(await store.take(3, consumer="t")) == first + later


async def test_a_model_that_goes_back_to_its_checkpoint_sees_what_it_had_not_seen(store):
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


async def test_a_rewind_to_where_one_is_gives_back_what_is_held(store):
    """Said after each start of a trainer: also after the first, and after one in which nothing went wrong."""
    assert await store.rewind("t", 0) == 0
    done = await finish(store, 2)
    await store.ack(await store.take(1, consumer="t"), step=1)
    await store.take(1, consumer="t")
    assert await store.rewind("t", 1) == 1
    assert ids(await store.take(1, consumer="t")) == done[1:]


async def test_an_acknowledgement_may_be_said_again_and_no_other_may(store):
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


async def test_what_is_in_a_batch_is_sealed(store):
    """Late reports stay on their attempts; it is not run again, not deleted, and freed when all have trained on it."""
    (rollout_id,) = await finish(store, status="failed")
    (attempt,) = await store.query_attempts(rollout_id)
    batch = await store.take(1, consumer="t")
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


async def test_a_rollout_is_released_when_all_that_took_it_have_a_checkpoint(make_store):
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
    lambda store: store.checkpoint("t", -1),
    lambda store: store.rewind("t", 1.5),
    lambda store: store.ack("batch", step=1),
])  # fmt: skip
async def test_bad_input_is_named_and_changes_nothing(store, call):
    """As everywhere."""
    with pytest.raises((ValueError, TypeError)):
        await call(store)
    assert (await store.statistics())["consumers"] == {}


def test_the_blocking_twins_do_the_same(store):
    """As everywhere."""
    rollout = store.sync.start_rollout("x")
    store.sync.update_attempt(rollout.rollout_id, rollout.attempt.attempt_id, status="succeeded")
    batch = store.sync.take(1, consumer="t", timeout=5)
    store.sync.ack(batch, step=1)
    assert store.sync.checkpoint("t", 1) == 1
    assert store.sync.rewind("t", 1) == 0
    assert len(store.sync.ledger("t")) == 1
