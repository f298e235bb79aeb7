"""Spans: numbers, adding, duplicates, querying, what they do to attempts."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import pytest

import raystore as rs
from raystore.types.contract import Event, Link, OtelResource, Span, SpanContext, TraceStatus
from tests.helpers import AnyStore, claim, make_span, present, status_of


async def test_numbers_count_per_rollout(store: AnyStore) -> None:
    """One counter for each rollout, whatever the attempt; unknown rollouts count too."""
    rollout = await claim(store)
    numbers = [await store.get_next_span_sequence_id(rollout.rollout_id, a) for a in ("x", "y", "x")]
    assert numbers == [1, 2, 3]
    assert await store.get_next_span_sequence_id("unknown", "x") == 1
    pairs = [("r1", "a"), ("r2", "a"), ("r1", "b"), ("r1", "a")]
    assert await store.get_many_span_sequence_ids(pairs) == [1, 1, 2, 3]
    assert await store.get_many_span_sequence_ids([]) == []


async def test_explicit_number_lifts_the_counter(store: AnyStore) -> None:
    """The counter continues behind the highest number written; a refused span does not lift it."""
    rollout = await claim(store)
    await store.add_span(make_span(rollout, 10))
    assert await store.get_next_span_sequence_id(rollout.rollout_id, "x") == 11
    with pytest.raises(ValueError, match="not found"):
        await store.add_span(make_span(rollout, 99, attempt_id="at-nope"))
    duplicate = make_span(rollout, 12)
    await store.add_span(duplicate)
    duplicate.sequence_id = 50
    assert await store.add_span(duplicate) is None
    assert await store.get_next_span_sequence_id(rollout.rollout_id, "x") == 13


async def test_add_span_returns_the_callers_object(store: AnyStore) -> None:
    """And stores an equal one, with everything on it."""
    rollout = await claim(store)
    context = SpanContext(trace_id="t" * 32, span_id="s" * 16, is_remote=True, trace_state={"k": "v"})
    span = Span(  # type: ignore[call-arg]  # which takes further fields, as the models within it do
        rollout_id=rollout.rollout_id, attempt_id=rollout.attempt.attempt_id, sequence_id=0,
        trace_id="t" * 32, span_id="s" * 16, parent_id="p" * 16, name="n",
        status=TraceStatus(status_code="ERROR", description="bad", more=1),  # type: ignore[call-arg]
        attributes={"s": "x", "b": True, "i": 1, "f": 0.5, "l": ["a", "b"]},
        events=[Event(name="e", attributes={"a": 1}, timestamp=1.5),
                Event(name="f", extra=[1])],  # type: ignore[call-arg]
        links=[Link(context=context, attributes={"x": 1}), Link(context=context)],
        start_time=1.0, end_time=2.0, context=context, parent=None,
        resource=OtelResource(attributes={"service.name": "a"}, schema_url="u"), anything={"else": (1, 2)},
    )  # fmt: skip
    assert await store.add_span(span) is span
    (stored,) = await store.query_spans(rollout.rollout_id)
    assert stored == span and stored is not span
    assert stored.model_dump() == span.model_dump()
    assert Span.model_validate(stored.model_dump()) == span


@pytest.mark.parametrize(
    ("before", "attempt_after", "rollout_after"),
    [
        ("preparing", "running", "running"),
        ("running", "running", "running"),
        ("unresponsive", "running", "failed"),
        ("timeout", "timeout", "failed"),
        ("failed", "failed", "failed"),
        ("succeeded", "succeeded", "succeeded"),
    ],
)
async def test_what_a_span_does(
    store: AnyStore, before: rs.AttemptStatus, attempt_after: str, rollout_after: str
) -> None:
    """A span is a heartbeat; it starts a preparing attempt, revives an unresponsive one, and ends nothing."""
    rollout = await claim(store)
    await store.update_attempt(rollout.rollout_id, "latest", status=before)
    store.testing.tick(4)
    await store.add_span(make_span(rollout))
    attempt = present(await store.get_latest_attempt(rollout.rollout_id))
    assert attempt.status == attempt_after
    assert attempt.last_heartbeat_time == rollout.attempt.start_time + 4
    assert await status_of(store, rollout) == rollout_after


@pytest.mark.parametrize(
    ("status", "after", "claimable"),
    [("unresponsive", "running", False), ("timeout", "requeuing", True), ("failed", "requeuing", True)],
)
async def test_late_span_and_a_waiting_retry(
    store: AnyStore, status: rs.AttemptStatus, after: str, claimable: bool
) -> None:
    """An unresponsive attempt that comes back withdraws its retry; a failed or timed out one does not."""
    rollout = await claim(store, max_attempts=2, retry_condition=["failed", "timeout", "unresponsive"])
    await store.update_attempt(rollout.rollout_id, "latest", status=status)
    await store.add_span(make_span(rollout))
    assert await status_of(store, rollout) == after
    assert (await store.dequeue_rollout() is not None) == claimable


async def test_span_of_an_old_attempt_marks_only_that_attempt(store: AnyStore) -> None:
    """Late spans are kept and do not move the rollout."""
    rollout = await claim(store)
    await store.start_attempt(rollout.rollout_id)
    await store.add_span(make_span(rollout))
    old, _ = await store.query_attempts(rollout.rollout_id)
    assert (old.status, old.last_heartbeat_time is not None) == ("running", True)
    assert await status_of(store, rollout) == "preparing"
    assert (await store.query_spans(rollout.rollout_id)).total == 1


async def test_errors_of_add_span(store: AnyStore) -> None:
    """Rollout first, then attempt, in the reference's words."""
    rollout = await claim(store)
    with pytest.raises(ValueError, match="Rollout nope not found"):
        await store.add_span(make_span("nope", attempt_id="at"))
    with pytest.raises(ValueError, match=f"Attempt at-x not found for rollout {rollout.rollout_id}"):
        await store.add_span(make_span(rollout, attempt_id="at-x"))
    with pytest.raises(rs.InvalidValueError):
        await store.add_span({"rollout_id": "x"})  # type: ignore[arg-type]  # wrong on purpose
    waiting = await store.enqueue_rollout("x")
    with pytest.raises(ValueError, match=f"Attempt at-x not found for rollout {waiting.rollout_id}"):
        await store.add_span(make_span(waiting.rollout_id, attempt_id="at-x"))


async def test_a_span_names_its_attempt(store: AnyStore) -> None:
    """ "latest" is no attempt's id, however spans are added: by then the newest may be somebody else's."""
    rollout = await claim(store)
    span = make_span(rollout, attempt_id="latest")
    for add in (store.add_span(span), store.add_many_spans([span]), store.add_many_spans([make_span(rollout), span])):
        with pytest.raises(ValueError, match=f"Attempt latest not found for rollout {rollout.rollout_id}"):
            await add
    assert [kept.attempt_id for kept in await store.query_spans(rollout.rollout_id)] == [rollout.attempt.attempt_id]


async def test_duplicates_are_refused(store: AnyStore, caplog: pytest.LogCaptureFixture) -> None:
    """A span id the attempt already has gives None and an ERROR log, and is no heartbeat."""
    rollout = await claim(store)
    span = make_span(rollout)
    await store.add_span(span)
    store.testing.tick(5)
    with caplog.at_level(logging.ERROR, "raystore"):
        assert await store.add_span(span) is None
    assert "Duplicated span added" in caplog.text
    assert (await store.query_spans(rollout.rollout_id)).total == 1
    assert present(await store.get_latest_attempt(rollout.rollout_id)).last_heartbeat_time == rollout.attempt.start_time
    other = await store.start_attempt(rollout.rollout_id)
    same_id = make_span(other, span_id=span.span_id)
    assert await store.add_span(same_id) is same_id


async def test_duplicates_are_kept_if_asked(make_store: Callable[..., AnyStore]) -> None:
    """`duplicate_spans="keep"` stores every span, as the 0.2 reference did."""
    store = make_store(duplicate_spans="keep")
    rollout = await claim(store)
    span = make_span(rollout)
    added = await asyncio.gather(*(store.add_span(span) for _ in range(30)))
    assert all(one is span for one in added)
    assert (await store.query_spans(rollout.rollout_id)).total == 30


async def test_add_many_spans_groups_and_returns_the_stored(store: AnyStore) -> None:
    """Groups in order of first appearance; the first of duplicates wins; a part holds at most 512."""
    a, b = await claim(store), await claim(store)
    spans = [make_span(a, 1), make_span(b, 1), make_span(a, 2)]
    assert await store.add_many_spans([*spans, spans[0]]) == [spans[0], spans[2], spans[1]]
    assert await store.add_many_spans([]) == []
    many = [make_span(a, i) for i in range(3, 1503)]
    assert len(await store.add_many_spans(many)) == 1500
    assert [s.sequence_id for s in await store.query_spans(a.rollout_id)] == list(range(1, 1503))


async def test_a_failing_group_stops_the_later_ones(store: AnyStore) -> None:
    """Earlier groups stay stored, later ones are not tried."""
    a, b = await claim(store), await claim(store)
    spans = [make_span(a, 1), make_span("nope", attempt_id="at"), make_span(b, 1)]
    with pytest.raises(ValueError, match="nope not found"):
        await store.add_many_spans(spans)
    assert (await store.query_spans(a.rollout_id)).total == 1
    assert (await store.query_spans(b.rollout_id)).total == 0


async def test_query_spans_order_and_filters(store: AnyStore) -> None:
    """By sequence number unless asked otherwise; filters never leak other rollouts."""
    rollout, other = await claim(store), await claim(store)
    await store.add_span(make_span(other, 1, name="b"))
    for number, name in ((3, "a"), (1, "b"), (2, "ab")):
        await store.add_span(make_span(rollout, number, name=name, trace_id=f"t{number}", parent_id=f"p{number}"))
    rollout_id = rollout.rollout_id

    async def names(**filters: Any) -> list[Any]:
        return [span.name for span in await store.query_spans(rollout_id, **filters)]

    assert await names() == ["b", "ab", "a"]
    assert await names(sort_by=None) == ["a", "b", "ab"]
    assert await names(sort_by="name", sort_order="desc") == ["b", "ab", "a"]
    assert await names(name="b") == ["b"]
    assert await names(name_contains="a") == ["ab", "a"]
    assert await names(name="b", trace_id="t3") == []
    assert await names(name="b", trace_id="t3", filter_logic="or") == ["b", "a"]
    assert await names(filter_logic="or") == ["b", "ab", "a"]
    assert await names(parent_id_contains="p", limit=1, offset=1) == ["ab"]
    assert await names(span_id="nope") == []
    with pytest.raises(ValueError, match="sort_by"):
        await store.query_spans(rollout_id, sort_by="colour")


async def test_query_spans_by_attempt(store: AnyStore) -> None:
    """ "latest" is the newest attempt, with or without spans."""
    first = await claim(store)
    await store.add_span(make_span(first, 1))
    second = await store.start_attempt(first.rollout_id)
    assert await store.query_spans(first.rollout_id, "latest") == []
    await store.add_span(make_span(second, 2))
    latest = await store.query_spans(first.rollout_id, "latest")
    assert [span.sequence_id for span in latest] == [2]
    assert [s.sequence_id for s in await store.query_spans(first.rollout_id, first.attempt.attempt_id)] == [1]
    assert (await store.query_spans(first.rollout_id)).total == 2
    assert await store.query_spans(first.rollout_id, "at-nope") == []
    assert await store.query_spans("nope") == []
    assert await store.query_spans("nope", "latest") == []


async def test_query_many_spans(store: AnyStore) -> None:
    """Spans of many rollouts in one call, by sequence number; unknown ids give an empty list."""
    a, b = await claim(store), await claim(store)
    for rollout in (a, b):
        await store.add_many_spans([make_span(rollout, 2), make_span(rollout, 1)])
    found = await store.query_many_spans([b.rollout_id, "nope", a.rollout_id])
    assert list(found) == [b.rollout_id, "nope", a.rollout_id]
    assert [span.sequence_id for span in found[a.rollout_id]] == [1, 2]
    assert found["nope"] == []


async def test_reward_is_lifted(store: AnyStore) -> None:
    """The primary reward of a reward span shows on attempt and rollout."""
    rollout = await claim(store)
    reward = {"agentlightning.reward.0.name": "r", "agentlightning.reward.0.value": 0.25}
    await store.add_span(make_span(rollout, name="agentlightning.annotation", attributes=reward))
    found = await store.get_rollout_by_id(rollout.rollout_id)
    assert (found.reward, found.attempt.reward) == (0.25, 0.25)
    assert rs.find_final_reward(await store.query_spans(rollout.rollout_id)) == 0.25


async def test_add_otel_span(store: AnyStore) -> None:
    """A span of the OpenTelemetry SDK is stored with the next number, or the given one."""
    from opentelemetry.sdk.trace import ReadableSpan, TracerProvider

    rollout = await claim(store)
    tracer = TracerProvider().get_tracer("t")
    with (
        tracer.start_as_current_span("outer") as outer,
        tracer.start_as_current_span("inner", attributes={"k": 1}) as inner,
    ):
        inner.add_event("e", {"x": 1})
    ids = rollout.rollout_id, rollout.attempt.attempt_id
    await store.add_span(make_span(rollout, 5))
    first = present(await store.add_otel_span(*ids, inner))
    second = await store.add_otel_span(rollout_id=ids[0], attempt_id=ids[1], readable_span=outer, sequence_id=0)
    assert second is not None
    assert (first.sequence_id, second.sequence_id) == (6, 0)
    assert first.parent_id == second.span_id and len(first.span_id) == 16 and len(first.trace_id) == 32
    assert (first.name, first.attributes, first.events[0].name) == ("inner", {"k": 1}, "e")
    assert isinstance(inner, ReadableSpan)
    assert abs(present(first.start_time) - present(inner.start_time) / 1e9) < 1e-3
    stored = await store.query_spans(ids[0], name="inner")
    assert stored[0] == first
    assert await store.add_otel_span(*ids, inner) is None


async def test_payloads_of_any_class_round_trip(store: AnyStore) -> None:
    """Tasks, metadata and attributes come back as they were, types included."""
    task = {
        "tuple": (1, 2),
        "set": {1},
        "bytes": b"x",
        "big": 2**80,
        "complex": 1 + 2j,
        "lone": "\ud800",
        "ba": bytearray(b"y"),
    }
    rollout = await store.enqueue_rollout(task, metadata={"t": (1,)})
    assert rollout.input == task
    assert [type(value) for value in rollout.input.values()] == [type(value) for value in task.values()]
    assert rollout.metadata == {"t": (1,)}


async def test_a_class_nobody_can_import_round_trips(store: AnyStore) -> None:
    """A task of a class that lives only in this function works: the store never opens payloads."""

    class Task:
        def __init__(self, x: int) -> None:
            self.x = x

    await store.enqueue_rollout(Task(5))
    claimed = present(await store.dequeue_rollout())
    assert claimed.input.x == 5


async def test_payload_limits(make_store: Callable[..., AnyStore]) -> None:
    """A value beyond its limit is refused with what to do, and nothing is changed."""
    store = make_store(limits={"value_bytes": 1000, "span_bytes": 1000})
    with pytest.raises(rs.PayloadTooLargeError, match="input is .* bytes and the limit is 1000"):
        await store.enqueue_rollout("x" * 2000)
    rollout = await claim(store)
    with pytest.raises(rs.PayloadTooLargeError, match="span"):
        await store.add_span(make_span(rollout, attributes={"x": "y" * 2000}))
    assert (await store.query_spans(rollout.rollout_id)).total == 0
