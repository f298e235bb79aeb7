"""Values that cannot be decoded in the reading process: the record is delivered, and reading the field says why."""

from __future__ import annotations

import copy
import pickle
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest

import raystore as rs
from tests.conftest import MakeMemoryStore
from tests.helpers import AnyStore, present

MODULE = "users_tasks"


class Tasks:
    """A module that some processes have and others have not."""

    def __init__(self) -> None:
        self.module = types.ModuleType(MODULE)
        self.task = type("Task", (), {"__module__": MODULE, "__eq__": lambda self, other: True})
        vars(self.module)["Task"] = self.task
        self.come()

    def come(self) -> None:
        sys.modules[MODULE] = self.module

    def go(self) -> None:
        sys.modules.pop(MODULE, None)

    def one(self) -> Any:
        return self.task()


@pytest.fixture
def tasks() -> Iterator[Tasks]:
    """Here at first."""
    made = Tasks()
    yield made
    made.go()


def reads(record: Any, name: str, what: str) -> bool:
    """That reading this field says what is missing, each time, and that it is no lack of an attribute."""
    for _ in range(2):
        with pytest.raises(rs.PayloadNotReadableError, match=rf"{what}.*{MODULE}.*Install the package") as caught:
            getattr(record, name)
        assert caught.value.module == MODULE
    with pytest.raises(rs.PayloadNotReadableError):
        hasattr(record, name)
    return True


@pytest.fixture
def unreadable(store: AnyStore, tasks: Tasks) -> AnyStore:
    """A store whose records hold such values in every place, read by a process without the module."""
    sync = store.sync
    task = tasks.one()
    made = sync.enqueue_rollout(task, metadata={"task": task}, rollout_id="mine")
    sync.enqueue_rollout("plain", rollout_id="other")
    (claimed, _) = sync.dequeue_many_rollouts(limit=2, worker_id="w")
    ids = made.rollout_id, claimed.attempt.attempt_id
    sync.update_attempt(*ids, metadata={"task": task})
    sync.update_worker("w", {"task": task})
    sync.update_resources("res", {"object": rs.ObjectResource(value=task)})
    span: Any = rs.Span.from_attributes(attributes={}, rollout_id=ids[0], attempt_id=ids[1], sequence_id=1, name="s")
    span.attributes["task"] = task
    span.extra_field = 5
    sync.add_span(span)
    for rollout_id in ("mine", "other"):
        sync.update_attempt(rollout_id, "latest", status="succeeded")
    tasks.go()
    return store


async def test_no_query_raises(unreadable: AnyStore) -> None:
    """Whatever is asked for comes, and the good records with it."""
    store = unreadable
    page = await store.query_rollouts()
    batch = await store.take(2, consumer="t")
    completed = await store.completed()
    waited = await store.wait_for_rollouts(rollout_ids=["mine", "other"])
    found = [await store.get_rollout_by_id("mine"), await store.wait_for_rollout("mine")]
    for records in (page.items, batch.rollouts, completed.items, waited):
        assert [record.rollout_id for record in records] == ["mine", "other"]
        assert records[1].input == "plain" and records[0].status == "succeeded"
        found.append(records[0])
    for record in found:
        assert type(record) in (rs.Rollout, rs.AttemptedRollout)
        assert reads(record, "input", "input of rollout mine") and reads(record, "metadata", "metadata of rollout mine")
    (attempt,) = await store.query_attempts("mine")
    assert reads(attempt, "metadata", "metadata of attempt") and attempt.status == "succeeded"
    assert reads(await store.get_latest_attempt("mine"), "metadata", "metadata of attempt")
    assert reads(page.items[0].attempt, "metadata", "metadata of attempt")
    assert reads(await store.get_worker_by_id("w"), "heartbeat_stats", "heartbeat_stats of worker w")
    assert reads((await store.query_workers()).items[0], "heartbeat_stats", "heartbeat_stats of worker w")
    for update in (present(await store.get_resources_by_id("res")), present(await store.get_latest_resources())):
        assert reads(update, "resources", "resources of resources res, version 1") and update.version == 1
    (span,) = await store.query_spans("mine")
    (same,) = (await store.query_many_spans(["mine"]))["mine"]
    assert span.name == "s" and span == same and type(span) is rs.Span
    assert reads(span, "attributes", "body of span") and reads(span, "status", "body of span")
    assert rs.find_final_reward([span]) is None
    assert [r.rollout_id async for r in store.as_completed(["mine", "other"], timeout=5)] == ["mine", "other"]


async def test_such_a_record_can_be_shown_and_copied(unreadable: AnyStore) -> None:
    """`repr` shows the problem, a dump raises it, copies and pickles have it too, and two readings are equal."""
    store = unreadable
    one: Any
    one, two = await store.get_rollout_by_id("mine"), await store.get_rollout_by_id("mine")
    assert one == two and one != await store.get_rollout_by_id("other")
    assert MODULE in repr(one) and "not readable here" in str(one) and "rollout_id='mine'" in repr(one)
    for copied in (
        copy.copy(one), copy.deepcopy(one), one.model_copy(), one.model_copy(deep=True), pickle.loads(pickle.dumps(one))
    ):  # fmt: skip
        assert copied == one and reads(copied, "input", "input of rollout mine")
    assert one.model_copy(update={"input": "other"}).input == "other"
    batch, page = await store.take(2, consumer="t"), await store.query_rollouts()
    for record in (one, batch, page, await store.completed(), (await store.query_spans("mine")).items[0]):
        with pytest.raises(rs.PayloadNotReadableError):
            record.model_dump()
        with pytest.raises(rs.PayloadNotReadableError):
            record.model_dump_json()
        assert repr(record)
    with pytest.raises(rs.PayloadNotReadableError):
        dict(one)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        one.nothing  # noqa: B018


async def test_such_a_span_can_be_added_where_it_can_be_read(
    unreadable: AnyStore, make_memory_store: MakeMemoryStore, tasks: Tasks
) -> None:
    """A copy into another store says what is missing, or copies all of it."""
    (span,) = await unreadable.query_spans("mine")
    other = make_memory_store()
    started = await other.start_rollout("x")
    copied = span.model_copy(update={"rollout_id": started.rollout_id, "attempt_id": started.attempt.attempt_id})
    with pytest.raises(rs.PayloadNotReadableError, match=MODULE):
        await other.add_span(copied)
    tasks.come()
    await other.add_span(copied)
    stored: Any
    (stored,) = await other.query_spans(started.rollout_id)
    assert stored == copied and stored.attributes == {"task": tasks.one()} and stored.extra_field == 5


async def test_it_is_read_as_soon_as_it_can_be(unreadable: AnyStore, tasks: Tasks) -> None:
    """The module may come later; then a record is like any other."""
    store = unreadable
    span: Any
    rollout, (span,) = await store.get_rollout_by_id("mine"), await store.query_spans("mine")
    assert reads(rollout, "input", "input") and reads(span, "attributes", "body")
    tasks.come()
    assert rollout.input == tasks.one() and rollout.metadata == {"task": tasks.one()}
    assert span.attributes == {"task": tasks.one()} and span.status.status_code == "OK" and span.extra_field == 5
    assert rollout.model_dump()["input"] == tasks.one()


async def test_a_hand_written_runner_gets_the_record(store: AnyStore, tasks: Tasks) -> None:
    """It can say itself what becomes of the attempt."""
    await store.enqueue_rollout(tasks.one())
    tasks.go()
    claimed = present(await store.dequeue_rollout())
    assert reads(claimed, "input", "input of rollout") and claimed.attempt.status == "preparing"
    await store.update_attempt(claimed.rollout_id, claimed.attempt.attempt_id, status="failed")
    assert present(await store.get_rollout_by_id(claimed.rollout_id)).status == "failed"


async def test_a_runner_fails_what_it_cannot_read(make_memory_store: MakeMemoryStore, tasks: Tasks) -> None:
    """What nobody can decode fails in the end, as a fault of the infrastructure, which says what is missing."""
    store = make_memory_store()
    bad, good = await store.enqueue_many_rollouts(
        [rs.EnqueueRolloutRequest(input=tasks.one()), rs.EnqueueRolloutRequest(input=1.0)]
    )
    tasks.go()
    with rs.RunnerPool(store, lambda task, ctx: task, size=1):
        done = await store.wait_for_rollouts(rollout_ids=[bad.rollout_id, good.rollout_id], timeout=30)
    assert {rollout.rollout_id: rollout.status for rollout in done} == {
        bad.rollout_id: "failed", good.rollout_id: "succeeded"
    }  # fmt: skip
    attempt = present(await store.get_latest_attempt(bad.rollout_id))
    assert attempt.outcome == "infra" and MODULE in present(attempt.error)


async def test_a_value_that_raises_for_another_reason(store: AnyStore) -> None:
    """Its own error is named."""
    await store.enqueue_rollout(Spiteful())
    (rollout,) = await store.query_rollouts()
    with pytest.raises(rs.PayloadNotReadableError, match="ZeroDivisionError: not today") as caught:
        rollout.input  # noqa: B018
    assert caught.value.module is None and isinstance(caught.value.__cause__, ZeroDivisionError)


class Spiteful:
    """Cannot be unpickled."""

    def __reduce__(self) -> Any:
        return _raise, ()


def _raise() -> None:
    raise ZeroDivisionError("not today")
