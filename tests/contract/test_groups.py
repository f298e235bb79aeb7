"""Groups: enqueued together, replaced and cancelled by rule, taken whole, each once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest

import raystore as rs
from tests.helpers import AnyStore, present


async def finish(store: AnyStore, rollouts: Sequence[rs.Rollout], status: rs.AttemptStatus = "succeeded") -> list[str]:
    """Run rollouts; their ids."""
    for rollout in rollouts:
        started = await store.start_attempt(rollout.rollout_id)
        await store.update_attempt(rollout.rollout_id, started.attempt.attempt_id, status=status)
    return [rollout.rollout_id for rollout in rollouts]


def ids(batch: rs.GroupBatch) -> list[list[str]]:
    """The rollouts of each group of a batch."""
    return [[rollout.rollout_id for rollout in group.rollouts] for group in batch.groups]


async def status_of(store: AnyStore, group_id: str | None) -> rs.GroupStatus:
    return present(await store.get_group(present(group_id))).status


async def test_a_group_from_its_enqueueing_to_the_model(store: AnyStore) -> None:
    """Open, complete, taken whole with rewards in order, trained; seen from all sides."""
    made = await store.enqueue_group({"q": 1}, 3, tags={"level": 3}, mode="train", min_size=2)
    group_id = present(made[0].group_id)
    group = present(await store.get_group(group_id))
    assert (group.status, group.input, group.n, group.min_size, group.end_time) == ("open", {"q": 1}, 3, 2, None)
    assert group.members == [rollout.rollout_id for rollout in made] and group.tags == {"level": 3}
    done = await finish(store, list(reversed(made)))
    batch = await store.take_groups(2, consumer="t")
    assert isinstance(batch, rs.GroupBatch) and isinstance(batch, rs.Batch) and batch.number == 1
    assert ids(batch) == [list(reversed(done))]
    (taken,) = batch.groups
    assert (taken.group_id, taken.status, taken.rewards, taken.input) == (group_id, "complete", [None] * 3, {"q": 1})
    assert [rollout.attempt.status for rollout in taken.rollouts] == ["succeeded"] * 3
    assert batch.rollouts == taken.rollouts
    assert rs.GroupBatch.model_validate_json(batch.model_dump_json()) == batch
    await store.ack(batch, step=1, note="loss 0.5")
    assert await status_of(store, group_id) == "trained"
    assert [entry.step for entry in await store.ledger("t")] == [1, 1, 1]
    assert (await store.take_groups(1, consumer="t")).groups == []
    assert (await store.statistics())["groups_by_status"] == {"trained": 1}
    assert (await store.statistics())["consumers"]["t"]["takes"] == "groups"
    assert any(line.startswith("now: trained") for line in await store.story(group_id))
    assert await store.get_group("none") is None


async def test_a_take_waits_for_whole_groups(store: AnyStore) -> None:
    """Not for rollouts: the last member of the second group ends the wait, and the end of the time another."""
    groups = [await store.enqueue_group(number, 2) for number in range(3)]
    waiting = asyncio.ensure_future(store.take_groups(2, consumer="t", timeout=60))
    await asyncio.sleep(0)
    first = await finish(store, groups[0])
    await finish(store, groups[1][:1])
    assert not waiting.done()
    second = await finish(store, groups[1][1:])
    batch = await waiting
    assert ids(batch) == [first, [groups[1][0].rollout_id, *second]]
    await store.ack(batch, step=1)
    waiting = asyncio.ensure_future(store.take_groups(2, consumer="t", timeout=5))
    await asyncio.sleep(0)
    third = await finish(store, groups[2])  # nothing more can come
    assert ids(await waiting) == [third]


async def test_the_end_of_a_group_ends_the_wait_of_whoever_waits_for_nothing_else(store: AnyStore) -> None:
    """Failed, cancelled or late: what there is, is given."""
    done, late, failing, cancelled = [
        await store.enqueue_group(number, 2, deadline_seconds=10 if number == 1 else None) for number in range(4)
    ]
    waiting = asyncio.ensure_future(store.take_groups(9, consumer="t", timeout=60))
    await asyncio.sleep(0)
    expected = await finish(store, done)
    await finish(store, failing, "failed")
    await store.cancel_rollouts(group_id=cancelled[0].group_id)
    await store.statistics()
    assert not waiting.done()
    await store.testing.tick(11)
    assert ids(await waiting) == [expected]
    assert [await status_of(store, group[0].group_id) for group in (late, failing, cancelled)] == [
        "failed", "failed", "cancelled",
    ]  # fmt: skip
    rollouts = await store.query_rollouts(group_id=late[0].group_id)
    assert [rollout.status for rollout in rollouts] == ["cancelled"] * 2


async def test_what_is_given_back_or_undone_comes_again_first(store: AnyStore) -> None:
    """Whole, in the order in which it was taken; what a checkpoint covers does not."""
    done = [await finish(store, await store.enqueue_group(number, 2)) for number in range(3)]
    batch = await store.take_groups(2, consumer="t")
    await store.nack(batch)
    assert ids(await store.take_groups(1, consumer="t")) == done[:1]
    assert await store.rewind("t", 0) == 2
    for step in (1, 2):
        await store.ack(await store.take_groups(1, consumer="t"), step=step)
    assert await store.checkpoint("t", 1) == 2
    await store.take_groups(1, consumer="t")
    assert await store.rewind("t", 1) == 4
    assert ids(await store.take_groups(9, consumer="t")) == done[1:]


async def test_a_consumer_holds_as_many_batches_as_it_may(store: AnyStore) -> None:
    """As with `take`."""
    for number in range(2):
        await finish(store, await store.enqueue_group(number, 1))
    await store.take_groups(1, consumer="t")
    with pytest.raises(rs.BatchHeldError, match="batch 1"):
        await store.take_groups(1, consumer="t")
    assert (await store.take_groups(1, consumer="t", max_open=2)).number == 2


async def test_rollouts_or_groups(store: AnyStore) -> None:
    """One of both for each consumer, fixed at its first take."""
    await finish(store, await store.enqueue_group("x", 2))
    assert len((await store.take(9, consumer="of rollouts")).rollouts) == 2
    assert len((await store.take_groups(9, consumer="of groups")).groups) == 1
    with pytest.raises(rs.ConsumerUnitError, match="'of rollouts' has taken rollouts .* asks for groups"):
        await store.take_groups(1, consumer="of rollouts")
    with pytest.raises(rs.ConsumerUnitError, match="'of groups' has taken groups .* asks for rollouts"):
        await store.take(1, consumer="of groups", timeout=1)


async def test_members_are_replaced(store: AnyStore) -> None:
    """By new rollouts of the group, which the next runner claims."""
    made = await store.enqueue_group("x", 2, replace=1, metadata={"k": 1}, queue="q", priority=2)
    await finish(store, made[:1], "failed")
    group = present(await store.get_group(present(made[0].group_id)))
    assert (group.status, len(group.members)) == ("open", 3)
    claimed = present(await store.dequeue_rollout(queues=["q"]))
    assert claimed.rollout_id == group.members[2]
    assert (claimed.input, claimed.metadata, claimed.group_id, claimed.priority) == ("x", {"k": 1}, group.group_id, 2)
    await store.update_attempt(claimed.rollout_id, claimed.attempt.attempt_id, status="succeeded")
    await finish(store, made[1:])
    assert ids(await store.take_groups(1, consumer="t")) == [[claimed.rollout_id, made[1].rollout_id]]
    changes = (await store.changes(kinds=["replaced", "group_complete"])).items
    assert [(c.kind, c.rollout_id) for c in changes] == [("replaced", made[0].rollout_id), ("group_complete", None)]


async def test_a_group_that_was_only_given_its_size_is_only_watched(store: AnyStore) -> None:
    """One that fails takes nobody with it."""
    made = await store.enqueue_group("x", 3)
    await finish(store, made[:1], "failed")
    assert await status_of(store, made[0].group_id) == "failed"
    assert await finish(store, made[1:]) and (await store.query_rollouts(status_in=["succeeded"])).total == 2


async def test_the_same_group_twice(store: AnyStore) -> None:
    """Is the same group, with what became of it; another content is refused by the names of what differs."""
    value = {"b": {1, 2}, "a": [1]}
    made = await store.enqueue_group(value, 2, group_id="g", spare=1, tags={"k": 1})
    await finish(store, made[:1])
    again = await store.enqueue_group({"a": [1], "b": {2, 1}}, 2, group_id="g", spare=1, tags={"k": 1})
    assert [r.rollout_id for r in again] == [r.rollout_id for r in made] and again[0].status == "succeeded"
    with pytest.raises(rs.GroupConflictError, match=r"Group g exists .*spare, input differ"):
        await store.enqueue_group("other", 2, group_id="g", tags={"k": 1})
    with pytest.raises(rs.ConflictError):
        await store.enqueue_many_groups([rs.EnqueueGroupRequest(input=value, n=2, group_id="g")])
    assert (await store.statistics())["total_rollouts"] == 3


async def test_many_groups_in_one_call(store: AnyStore) -> None:
    """In the order of the requests, also across parts; all or none; those that exist are as they were."""
    requests = [rs.EnqueueGroupRequest(input=n, n=2, group_id=f"g{n}", deadline_seconds=9) for n in range(700)]
    made = await store.enqueue_many_groups(requests[:650])
    assert [(group.group_id, group.input, len(group.members)) for group in made] == [
        (f"g{n}", n, 2) for n in range(650)
    ]
    again = await store.enqueue_many_groups(requests)
    assert again[:650] == made and (await store.statistics())["total_rollouts"] == 1400
    page = await store.query_groups(limit=2, offset=698)
    assert ([group.group_id for group in page], page.total) == (["g698", "g699"], 700)
    assert (await store.query_groups(status_in=["complete"])).total == 0
    assert [group.group_id for group in await store.query_groups(group_id_in=["g7", "none"])] == ["g7"]
    with pytest.raises(rs.GroupConflictError):
        await store.enqueue_many_groups(
            [rs.EnqueueGroupRequest(input="new", n=1), requests[0].model_copy(update={"n": 3})]
        )
    with pytest.raises(ValueError, match="group_id='g1'.*once per call"):
        await store.enqueue_many_groups([requests[1], requests[1]])
    assert (await store.statistics())["total_rollouts"] == 1400
    assert await store.enqueue_many_groups([]) == []


@pytest.mark.parametrize(
    ("rule", "named"),
    [
        ({"n": 0}, "n=0"), ({"n": 2, "min_size": 3}, "min_size=3.*from 2 to n, which is 2"),
        ({"n": 2, "min_size": 1}, "min_size=1"), ({"n": 2, "spare": -1}, "spare=-1"),
        ({"n": 2, "replace": -1}, "replace=-1"), ({"n": 2, "deadline_seconds": 0}, "deadline_seconds=0"),
        ({"n": 2, "deadline_seconds": -1}, "deadline_seconds=-1"), ({"n": 10_000, "spare": 1}, "n=10000.*10,000"),
        ({"n": 1_000_001}, "n=1000001.*1,000,000"),
    ],
    ids=str,
)  # fmt: skip
async def test_a_rule_that_cannot_be_is_refused(store: AnyStore, rule: dict[str, Any], named: str) -> None:
    """By name, with what was expected, alone and among many; nothing is enqueued."""
    with pytest.raises(rs.InvalidValueError, match=named):
        await store.enqueue_group("x", **rule)
    request = rs.EnqueueGroupRequest(input="x", n=1).model_copy(update=rule)
    with pytest.raises(rs.InvalidValueError, match=rf"groups\[1\]\.{named}"):
        await store.enqueue_many_groups([rs.EnqueueGroupRequest(input="y", n=2), request])
    assert (await store.statistics())["total_rollouts"] == 0


async def test_a_group_needs_room_in_the_queue_for_all_of_it(make_store: Callable[..., AnyStore]) -> None:
    """Or none of it is enqueued; a replacement is never refused."""
    store = make_store(max_queued=3)
    with pytest.raises(rs.OverloadedError):
        await store.enqueue_group("x", 3, spare=1)
    made = await store.enqueue_group("x", 3, replace=1)
    claimed = present(await store.dequeue_rollout())
    await store.enqueue_rollout("fills the queue again")
    await store.update_attempt(claimed.rollout_id, claimed.attempt.attempt_id, status="failed")
    assert len(present(await store.get_group(present(made[0].group_id))).members) == 4


@pytest.mark.parametrize("rule", [{}, {"min_size": 2}], ids=str)
async def test_a_large_group_is_cancelled_whole(store: AnyStore, rule: dict[str, Any]) -> None:
    """In one answer, also where many rollouts are cancelled in pieces."""
    made = await store.enqueue_group("x", 250, **rule)
    await finish(store, made[:3])
    cancelled = await store.cancel_rollouts(group_id=made[0].group_id)
    assert [rollout.rollout_id for rollout in cancelled] == [rollout.rollout_id for rollout in made[3:]]
    assert await status_of(store, made[0].group_id) == "cancelled"


async def test_a_long_batch_of_groups_comes_whole(store: AnyStore) -> None:
    """In pages, unseen; with inputs that count."""
    requests = [rs.EnqueueGroupRequest(input="x" * 400_000, n=3) for _ in range(20)]
    made = await store.enqueue_many_groups(requests)
    for group in made:
        for rollout_id in group.members:
            await store.update_rollout(rollout_id, status="succeeded")
    batch = await store.take_groups(20, consumer="t")
    assert [group.group_id for group in batch.groups] == [group.group_id for group in made]
    assert ids(batch) == [group.members for group in made]


def test_the_blocking_twin(store: AnyStore) -> None:
    """Has groups as well."""
    made = store.sync.enqueue_group("x", 2, min_size=2)
    for rollout in made:
        store.sync.update_rollout(rollout.rollout_id, status="succeeded")
    batch = store.sync.take_groups(1, consumer="t", timeout=1)
    store.sync.ack(batch, step=1)
    assert [group.status for group in store.sync.query_groups()] == ["trained"]
