"""Enqueue, start, query, update, cancel, release, delete."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import raystore as rs
from raystore.types.contract import AttemptedRollout, EnqueueRolloutRequest, Rollout, RolloutConfig
from tests.helpers import AnyStore, claim, make_span, present, status_of


async def test_enqueue_gives_a_queuing_rollout(store: AnyStore) -> None:
    """An enqueued rollout waits, has no attempt, and carries what it was given."""
    rollout = await store.enqueue_rollout(
        {"q": 1}, "train", None, RolloutConfig(max_attempts=2, retry_condition=["failed"]), {"a": 1}
    )
    assert type(rollout) is Rollout
    assert (rollout.status, rollout.mode, rollout.input, rollout.metadata) == ("queuing", "train", {"q": 1}, {"a": 1})
    assert rollout.config == RolloutConfig(max_attempts=2, retry_condition=["failed"])
    assert rollout.rollout_id.startswith("ro-") and len(rollout.rollout_id) == 15
    assert rollout.end_time is None


async def test_metadata_defaults_to_an_empty_dict(store: AnyStore) -> None:
    """Stores always write a dict."""
    assert (await store.enqueue_rollout("x")).metadata == {}


async def test_start_rollout_is_preparing_and_never_queued(store: AnyStore) -> None:
    """A started rollout has its first attempt and cannot be dequeued."""
    rollout = await store.start_rollout("x", worker_id="w")
    assert type(rollout) is AttemptedRollout
    assert (rollout.status, rollout.attempt.status, rollout.attempt.sequence_id) == ("preparing", "preparing", 1)
    assert rollout.attempt.attempt_id.startswith("at-") and len(rollout.attempt.attempt_id) == 11
    assert rollout.attempt.start_time == rollout.start_time
    assert rollout.attempt.worker_id == "w"
    assert await store.dequeue_rollout() is None


async def test_enqueue_many_keeps_order_and_latest_resources(store: AnyStore) -> None:
    """Answers are in the order of the requests, also across parts; the latest resources are resolved once."""
    update = await store.add_resources({})
    requests = [EnqueueRolloutRequest(input=i) for i in range(1200)]
    made = await store.enqueue_many_rollouts(requests)
    assert [rollout.input for rollout in made] == list(range(1200))
    assert {rollout.resources_id for rollout in made} == {update.resources_id}
    assert await store.enqueue_many_rollouts([]) == []
    claimed = await store.dequeue_many_rollouts(limit=1200)
    assert [rollout.input for rollout in claimed] == list(range(1200))


async def test_enqueue_group_shares_a_group(store: AnyStore) -> None:
    """A group is n rollouts of one prompt under one id."""
    group = await store.enqueue_group("prompt", 4, tags={"level": 3})
    assert len(group) == 4 and len({rollout.group_id for rollout in group}) == 1
    found = await store.query_rollouts(group_id=group[0].group_id)
    assert found == list(group)
    assert (await store.query_rollouts(tags={"level": 3})).total == 4


async def test_group_and_tags_are_lifted_from_metadata(store: AnyStore) -> None:
    """A well-formed group id and tags in the metadata count when the arguments are absent; nothing that steers does."""
    lifted = await store.enqueue_rollout(
        "x", metadata={"group_id": "g", "tags": {"a": 1}, "queue": "other", "priority": 9}
    )
    assert (lifted.group_id, lifted.tags, lifted.queue, lifted.priority) == ("g", {"a": 1}, "default", 0)
    malformed = await store.enqueue_rollout("x", metadata={"group_id": 5, "tags": {"a": [1]}})
    assert (malformed.group_id, malformed.tags) == (None, {})
    given = await store.enqueue_rollout("x", metadata={"group_id": "g"}, group_id="h")
    assert given.group_id == "h"


async def test_resources_id_defaults_to_the_latest_only_for_none(store: AnyStore) -> None:
    """None means latest; an empty-looking or unknown id is taken as it is."""
    update = await store.add_resources({})
    assert (await store.enqueue_rollout("x")).resources_id == update.resources_id
    assert (await store.enqueue_rollout("x", resources_id="unknown")).resources_id == "unknown"


async def test_same_rollout_id_and_content_returns_the_rollout(store: AnyStore) -> None:
    """A repeated enqueue with a caller-given id happens once."""
    first = await store.enqueue_rollout({"q": 1}, rollout_id="mine", tags={"a": 1})
    await store.add_resources({})
    again = await store.enqueue_rollout({"q": 1}, rollout_id="mine", tags={"a": 1})
    assert again == first
    assert (await store.query_rollouts()).total == 1


async def test_same_rollout_id_and_other_content_conflicts(store: AnyStore) -> None:
    """Other content under a caller-given id is refused and changes nothing."""
    await store.enqueue_rollout({"q": 1}, rollout_id="mine")
    with pytest.raises(rs.ConflictError, match="mine.*input"):
        await store.enqueue_rollout({"q": 2}, rollout_id="mine")
    assert (await store.get_rollout_by_id("mine")).input == {"q": 1}


async def test_get_and_query_return_exact_types(store: AnyStore) -> None:
    """Rollouts with attempts come as AttemptedRollout, others as Rollout."""
    waiting = await store.enqueue_rollout("a")
    started = await store.start_rollout("b")
    assert type(await store.get_rollout_by_id(waiting.rollout_id)) is Rollout
    assert type(await store.get_rollout_by_id(started.rollout_id)) is AttemptedRollout
    assert [type(rollout) for rollout in await store.query_rollouts()] == [Rollout, AttemptedRollout]
    assert await store.get_rollout_by_id("unknown") is None


async def test_query_filters(store: AnyStore) -> None:
    """Filters are joined by and, or by or; an empty list matches nothing; the 0.2 names work."""
    a, b, c = [await store.enqueue_rollout(i) for i in "abc"]
    await store.update_rollout(b.rollout_id, status="failed")
    assert [r.input for r in await store.query_rollouts(status_in=["queuing"])] == ["a", "c"]
    assert [r.input for r in await store.query_rollouts(status=["failed"])] == ["b"]
    assert [r.input for r in await store.query_rollouts(rollout_ids=[c.rollout_id, a.rollout_id])] == ["a", "c"]
    assert await store.query_rollouts(status_in=[]) == []
    assert await store.query_rollouts(rollout_id_in=[]) == []
    assert [r.input for r in await store.query_rollouts(rollout_id_contains=a.rollout_id[3:])] == ["a"]
    both: dict[str, Any] = {"status_in": ["failed"], "rollout_id_in": [a.rollout_id]}
    assert await store.query_rollouts(**both) == []
    assert [r.input for r in await store.query_rollouts(**both, filter_logic="or")] == ["a", "b"]
    assert [r.input for r in await store.query_rollouts(filter_logic="or")] == ["a", "b", "c"]


async def test_query_by_what_raystore_adds(store: AnyStore) -> None:
    """Queue, worker, mode and tags always apply, also with or."""
    await store.enqueue_rollout("a", "val", queue="slow", tags={"x": 1, "y": "z"})
    await store.enqueue_rollout("b", "train", tags={"x": 1})
    await store.dequeue_rollout("w1")
    assert [r.input for r in await store.query_rollouts(queue="slow")] == ["a"]
    assert [r.input for r in await store.query_rollouts(worker_id="w1")] == ["b"]
    assert [r.input for r in await store.query_rollouts(tags={"x": 1})] == ["a", "b"]
    assert [r.input for r in await store.query_rollouts(tags={"x": 1, "y": "z"})] == ["a"]
    assert [r.input for r in await store.query_rollouts(mode="train")] == ["b"]
    found = await store.query_rollouts(status_in=["queuing", "preparing"], filter_logic="or", queue="slow")
    assert [r.input for r in found] == ["a"]


async def test_query_pages_and_sorts(store: AnyStore) -> None:
    """`total` counts all matches; limit 0 gives none, an offset past the end an empty page; missing times sort last."""
    made = [await store.enqueue_rollout(i, priority=-i) for i in range(5)]
    page = await store.query_rollouts(limit=2, offset=1)
    assert ([r.input for r in page], page.total, len(page), page[0].input) == ([1, 2], 5, 2, 1)
    assert await store.query_rollouts(limit=0) == []
    assert await store.query_rollouts(offset=9) == []
    assert repr(page).startswith("<PaginatedResult (1:3 of 5) [")
    by_priority = await store.query_rollouts(sort_by="priority")
    assert [r.input for r in by_priority] == [4, 3, 2, 1, 0]
    store.testing.tick(1)
    await store.update_rollout(made[3].rollout_id, status="failed")
    assert [r.input for r in await store.query_rollouts(sort_by="end_time", limit=1)] == [3]
    first, *_ = await store.query_rollouts(sort_by="start_time", limit=1)
    newest = await store.query_rollouts(sort_by="start_time", sort_order="desc", limit=2, offset=1)
    everything = list(await store.query_rollouts())
    assert first == everything[0] and newest.total == len(everything)
    assert newest == sorted(everything, key=lambda r: r.start_time, reverse=True)[1:3]
    last = await store.query_rollouts(sort_by="end_time", sort_order="desc")
    assert last[-1].input == 3


@pytest.mark.parametrize(
    "bad",
    [{"limit": -2}, {"offset": -1}, {"sort_by": "colour"}, {"sort_order": "up"}, {"filter_logic": "xor"}],
    ids=str,
)
async def test_query_refuses_nonsense(store: AnyStore, bad: dict[str, int] | dict[str, str]) -> None:
    """What cannot be meant is refused by name."""
    await store.enqueue_rollout("x")
    with pytest.raises(ValueError, match=next(iter(bad))):
        await store.query_rollouts(**bad)


async def test_update_changes_only_what_is_set(store: AnyStore) -> None:
    """UNSET leaves a field, None is a value."""
    rollout = await store.enqueue_rollout("x", "train", metadata={"a": 1})
    updated = await store.update_rollout(rollout.rollout_id, mode=None, metadata={"b": (2,)})
    assert (updated.input, updated.mode, updated.metadata, updated.status) == ("x", None, {"b": (2,)}, "queuing")
    assert (await store.update_rollout(rollout.rollout_id, input=None)).input is None
    assert (await store.update_rollout(rollout.rollout_id, metadata=None)).metadata is None


@pytest.mark.parametrize("status", ["failed", "succeeded", "cancelled"])
async def test_update_to_a_finished_status_sets_end_time(store: AnyStore, status: rs.RolloutStatus) -> None:
    """Finishing stamps the end; doing so again stamps it again."""
    rollout = await store.enqueue_rollout("x")
    ended = await store.update_rollout(rollout.rollout_id, status=status)
    store.testing.tick(5)
    again = await store.update_rollout(rollout.rollout_id, status=status)
    assert again.end_time == present(ended.end_time) + 5
    assert await store.dequeue_rollout() is None


async def test_requeued_rollout_goes_to_the_tail_and_clears_end_time(store: AnyStore) -> None:
    """Any status may follow any other; a rollout that finished can be queued again."""
    first = await store.enqueue_rollout("first")
    await store.update_rollout(first.rollout_id, status="succeeded")
    await store.enqueue_rollout("second")
    again = await store.update_rollout(first.rollout_id, status="requeuing")
    assert again.end_time is None
    assert [r.input for r in await store.dequeue_many_rollouts(limit=3)] == ["second", "first"]


async def test_update_of_a_queued_rollout_keeps_its_place(store: AnyStore) -> None:
    """Setting queuing on a rollout that waits does not move it."""
    first = await store.enqueue_rollout("first")
    await store.enqueue_rollout("second")
    await store.update_rollout(first.rollout_id, status="queuing", metadata={"x": 1})
    assert present(await store.dequeue_rollout()).input == "first"


async def test_rollout_moved_to_running_leaves_the_queue(store: AnyStore) -> None:
    """A status set by hand takes the rollout out of line."""
    rollout = await store.enqueue_rollout("x")
    await store.update_rollout(rollout.rollout_id, status="running")
    assert await store.dequeue_rollout() is None
    await store.update_rollout(rollout.rollout_id, status="queuing")
    assert present(await store.dequeue_rollout()).rollout_id == rollout.rollout_id


async def test_update_of_an_unknown_rollout(store: AnyStore) -> None:
    """The message matches what either generation of the reference says."""
    with pytest.raises(ValueError, match="Rollout nonexistent not found") as caught:
        await store.update_rollout("nonexistent", status="failed")
    assert "Item does not exist with primary key(s): rollout_id='nonexistent'" in str(caught.value)
    assert isinstance(caught.value, rs.RolloutNotFoundError)


@pytest.mark.parametrize("bad", [{"status": None}, {"status": "done"}, {"config": None}, {"mode": "prod"}], ids=str)
async def test_update_refuses_bad_values_and_changes_nothing(
    store: AnyStore, bad: dict[str, None] | dict[str, str]
) -> None:
    """Validation comes before any change."""
    rollout = await store.enqueue_rollout("x", "train")
    with pytest.raises(rs.InvalidValueError):
        await store.update_rollout(rollout.rollout_id, input="y", **bad)
    assert await store.get_rollout_by_id(rollout.rollout_id) == rollout
    assert present(await store.dequeue_rollout()).input == "x"


async def test_cancel_settles_the_attempt_and_is_not_resurrected(store: AnyStore) -> None:
    """A cancelled rollout's attempt fails as cancelled; late reports stay on the attempt."""
    rollout = await claim(store, worker_id="w")
    (cancelled,) = await store.cancel_rollouts([rollout.rollout_id])
    assert cancelled.status == "cancelled" and cancelled.end_time is not None
    attempt = present(await store.get_latest_attempt(rollout.rollout_id))
    assert (attempt.status, attempt.outcome) == ("failed", "cancelled")
    await store.add_span(make_span(rollout))
    await store.update_attempt(rollout.rollout_id, "latest", status="running", worker_id="w2")
    await store.update_attempt(rollout.rollout_id, "latest", status="succeeded")
    assert await status_of(store, rollout) == "cancelled"
    assert present(await store.get_latest_attempt(rollout.rollout_id)).status == "succeeded"
    await store.start_attempt(rollout.rollout_id)
    assert await status_of(store, rollout) == "preparing"


async def test_cancel_by_group_and_tags(store: AnyStore) -> None:
    """What is given must all match; finished ones and unknown ids are skipped."""
    a = await store.enqueue_rollout("a", group_id="g", tags={"t": 1})
    await store.enqueue_rollout("b", group_id="g", tags={"t": 2})
    c = await store.enqueue_rollout("c", tags={"t": 1})
    assert [r.input for r in await store.cancel_rollouts(group_id="g", tags={"t": 1})] == ["a"]
    assert [r.input for r in await store.cancel_rollouts([c.rollout_id, "unknown", a.rollout_id])] == ["c"]
    assert [r.input for r in await store.cancel_rollouts(group_id="g")] == ["b"]
    with pytest.raises(ValueError, match="what to cancel"):
        await store.cancel_rollouts()


async def test_update_to_cancelled_leaves_the_attempt(store: AnyStore) -> None:
    """`update_rollout` never changes attempts; a later report does not resurrect the rollout."""
    rollout = await claim(store)
    await store.update_rollout(rollout.rollout_id, status="cancelled")
    assert present(await store.get_latest_attempt(rollout.rollout_id)).status == "preparing"
    await store.update_attempt(rollout.rollout_id, "latest", worker_id="w")
    await store.add_span(make_span(rollout))
    assert await status_of(store, rollout) == "cancelled"


async def test_deleted_rollout_leaves_nothing(store: AnyStore) -> None:
    """Deletion frees the rollout, its attempts, spans and counters; unknown ids are skipped."""
    rollout = await claim(store)
    await store.add_span(make_span(rollout, 7))
    before = await store.statistics()
    assert await store.delete_rollouts([rollout.rollout_id, "unknown"]) == 1
    assert await store.get_rollout_by_id(rollout.rollout_id) is None
    assert await store.query_spans(rollout.rollout_id) == []
    after = await store.statistics()
    assert (after["total_rollouts"], after["total_attempts"], after["total_spans"]) == (0, 0, 0)
    assert after["accounted_bytes"] == 0 < before["accounted_bytes"]
    with pytest.raises(ValueError, match="not found"):
        await store.add_span(make_span(rollout))


async def test_retention_by_count_never_deletes_what_nobody_read(make_store: Callable[..., AnyStore]) -> None:
    """Released rollouts go first, then read ones; unread ones stay whatever the rule says."""
    store = make_store(retention={"max_rollouts": 1})
    ids = [(await claim(store)).rollout_id for _ in range(4)]
    for rollout_id in ids:
        await store.update_attempt(rollout_id, "latest", status="succeeded")
    await store.query_spans(ids[0])
    await store.release([ids[2]])
    assert {r.rollout_id for r in await store.query_rollouts()} == {ids[1], ids[3]}


async def test_retention_by_age(make_store: Callable[..., AnyStore]) -> None:
    """An age deletes finished rollouts that were read or released, once they are that old."""
    store = make_store(retention=60)
    old, unread = [(await claim(store)).rollout_id for _ in range(2)]
    for rollout_id in (old, unread):
        await store.update_attempt(rollout_id, "latest", status="succeeded")
    assert await store.release([old]) == 1
    assert await store.release([old, "unknown"]) == 0
    store.testing.tick(59)
    assert (await store.query_rollouts()).total == 2
    store.testing.tick(2)
    assert [r.rollout_id for r in await store.query_rollouts()] == [unread]


async def test_default_config_of_the_store(make_store: Callable[..., AnyStore]) -> None:
    """A rollout without a configuration has the store's."""
    store = make_store(default_config=RolloutConfig(max_attempts=3, retry_condition=["failed"]))
    assert (await store.enqueue_rollout("x")).config.max_attempts == 3
    assert (await store.enqueue_rollout("x", config=RolloutConfig())).config.max_attempts == 1


async def test_answers_are_snapshots_and_arguments_are_copied(store: AnyStore) -> None:
    """Mutating an answer, or an argument afterwards, never changes the store."""
    task, metadata = {"q": [1]}, {"a": [1]}
    config = RolloutConfig()
    rollout = await store.enqueue_rollout(task, config=config, metadata=metadata)
    task["q"].append(2)
    metadata["a"].append(2)
    config.max_attempts = 9
    rollout.input["q"].append(3)
    rollout.status = "failed"
    stored = await store.get_rollout_by_id(rollout.rollout_id)
    assert (stored.input, stored.metadata, stored.status) == ({"q": [1]}, {"a": [1]}, "queuing")
    assert stored.config.max_attempts == 1
