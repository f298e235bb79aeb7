"""Numbers of numpy and torch are numbers wherever they come in: nothing becomes its text, nothing is lost unsaid.

Two tables: kinds of values, and places where a value can enter.
"""

from __future__ import annotations

import datetime
import enum
import fractions
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import raystore as rs
from tests.conftest import MakeMemoryStore
from tests.helpers import AnyStore


class Tensor:
    """What raystore looks at in a tensor of torch, which is too large to be installed for a test."""

    def __init__(self, value: float | list[float] | list[int], dtype: str = "float32") -> None:
        self._array = np.array(value, dtype)
        self.dtype = f"torch.{dtype}"
        self.ndim, self.shape = self._array.ndim, self._array.shape

    def item(self) -> Any:
        return self._array.item()

    def tolist(self) -> Any:
        return self._array.tolist()


class Bare:
    """The least that such a thing can do."""

    def __init__(self, value: float | list[float] | bool) -> None:
        self._value = value

    def item(self) -> float | bool:
        if isinstance(self._value, list):
            (one,) = self._value
            return one
        return self._value

    def tolist(self) -> float | list[float] | bool:
        return self._value


class Level(enum.IntEnum):
    HIGH = 3


class Colour(str, enum.Enum):  # noqa: UP042 - its text is not its value, other than that of a StrEnum
    RED = "red"


SCALARS: list[tuple[Any, Any]] = [
    (np.int64(3), 3), (np.uint8(3), 3), (np.int32(-3), -3), (np.float64(0.1), 0.1), (np.float32(0.5), 0.5),
    (np.float16(0.25), 0.25), (np.longdouble(0.5), 0.5), (np.bool_(True), True), (np.bool_(False), False),
    (np.array(3), 3), (np.array(0.5, "float32"), 0.5), (Tensor(0.5), 0.5), (Tensor(3, "int64"), 3), (Bare(0.5), 0.5),
    (np.str_("a"), "a"), (Level.HIGH, 3), (Colour.RED, "red"), (3, 3), (True, True), (0.1, 0.1),
]  # fmt: skip
NESTED: list[tuple[Any, Any]] = [
    (None, None), (b"\xff", b"\xff"),
    (np.arange(3), [0, 1, 2]), (np.ones((2, 2), "float32"), [[1.0, 1.0], [1.0, 1.0]]), (Tensor([0.5, 1]), [0.5, 1.0]),
    (Bare([0.5]), [0.5]),
    ([1, 0.5, True, "x", None], [1, 0.5, True, "x", None]), ([np.int64(1), 0.5], [1, 0.5]),
    ([[np.int8(1)], (np.float32(0.5),)], [[1], (0.5,)]), ((1, "a"), (1, "a")), (range(3), [0, 1, 2]),
    ({"a": np.float32(0.5), "b": {"c": [np.bool_(True)]}}, {"a": 0.5, "b": {"c": [True]}}),
    ([{"role": "user", "content": "hi"}], [{"role": "user", "content": "hi"}]), ({np.int64(1): 2}, {1: 2}),
    ([], []), ({}, {}), (np.array([], "int64"), []), (np.array([1, None], object), [1, None]),
]  # fmt: skip
ENDLESS: list[object] = []
ENDLESS.append(ENDLESS)
REFUSED: list[Any] = [
    Decimal("0.5"), fractions.Fraction(1, 2), 1j, np.complex64(1), np.datetime64("2026-01-01"), np.datetime64(3, "ns"),
    np.timedelta64(3, "ns"), np.longdouble("0.1"), np.zeros(2, [("a", "i4")]), datetime.date(2026, 1, 1), Path("x"),
    {1}, object(), [1, [object()]], {"a": {"b": Decimal(1)}}, lambda: 1, ENDLESS,
]  # fmt: skip


def same(one: Any, other: Any) -> Any:
    """Equal, and of the same types all through."""
    if isinstance(one, dict):
        return isinstance(other, dict) and list(one) == list(other) and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


def through_the_context(value: Any) -> list[Any]:
    """An attribute given to `ctx.span`, one set on the open span, and one of `ctx.llm`."""

    def agent(task: Any, ctx: rs.Context) -> None:
        with ctx.span("s", first=value) as span:
            span.set("second", value)
            span.update({"third": value})
        ctx.llm(prompt_ids=[1], response_ids=[2], fourth=value)

    run = rs.run_one(agent, "x")
    return [*run.spans[0].attributes.values(), run.spans[1].attributes["fourth"]]


def through_a_span(value: Any) -> list[Any]:
    """An attribute of a span that is made directly, and one that is made from attributes."""
    span = rs.Span.from_attributes(attributes={"x": value})
    again = rs.Span.model_validate(span.model_dump() | {"attributes": {"x": value}})
    return [span.attributes["x"], again.attributes["x"]]


def through_opentelemetry(value: Any) -> list[Any]:
    """An attribute of a span of OpenTelemetry, past what its SDK checks."""
    from opentelemetry.sdk.trace import TracerProvider

    span: Any = TracerProvider().get_tracer("t").start_span("s")
    span.end()
    span._attributes = {"x": value}
    return [rs.Span.from_opentelemetry(span, "r", "a", 1).attributes["x"]]


WAYS = [through_the_context, through_a_span, through_opentelemetry]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("value", "kept"), SCALARS + NESTED, ids=lambda value: type(value).__name__)
def test_attributes_are_kept_exactly(way: Callable[..., list[Any]], value: Any, kept: Any) -> None:
    """As plain numbers, lists and mappings."""
    for found in way(value):
        assert same(found, kept)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("value", REFUSED, ids=lambda value: type(value).__name__)
def test_attributes_without_a_plain_form_are_refused_by_name(way: Callable[..., list[Any]], value: Any) -> None:
    """They do not become their text."""
    with pytest.raises(ValueError, match=r"attribute (x|first)"):
        way(value)


def test_attributes_are_copies() -> None:
    """What the caller does to its list later changes no span."""
    given: dict[str, Any] = {"list": [1], "nested": {"a": [1]}}
    span = rs.Span.from_attributes(attributes=given)
    given["list"].append(2)
    given["nested"]["a"].append(2)
    assert span.attributes == {"list": [1], "nested": {"a": [1]}}


async def test_a_span_that_was_changed_after_it_was_made(store: AnyStore) -> None:
    """Numbers of numpy that came in since are stored as plain ones; what has no plain form comes back as it was."""
    started = await store.start_rollout("x")
    span = rs.Span.from_attributes(
        attributes={}, rollout_id=started.rollout_id, attempt_id=started.attempt.attempt_id, sequence_id=1
    )
    more: dict[str, Any] = {"n": np.float32(0.5), "list": [np.int64(1), 2.5], "when": datetime.date(2026, 1, 1)}
    span.attributes |= more
    span.events.append(rs.Event(name="e", attributes={"n": np.arange(2)}))
    await store.add_span(span)
    (stored,) = await store.query_spans(started.rollout_id)
    assert same(stored.attributes, {"n": 0.5, "list": [1, 2.5], "when": datetime.date(2026, 1, 1)})
    assert same(stored.events[0].attributes, {"n": [0, 1]})


async def test_tags(store: AnyStore) -> None:
    """As an argument, in a request, in the metadata, and as a filter."""
    for number, (value, kept) in enumerate(SCALARS):
        name = f"t{number}"
        made = await store.enqueue_rollout("x", tags={name: value})
        request = rs.EnqueueRolloutRequest(input="x", tags={name: value})
        more = await store.enqueue_many_rollouts([request])
        lifted = await store.enqueue_rollout("x", metadata={"tags": {name: value}})
        assert all(same(rollout.tags, {name: kept}) for rollout in (made, *more, lifted)), value
        assert (await store.query_rollouts(tags={name: value})).total == 3, value


async def test_tags_without_a_plain_form_are_refused_by_name(store: AnyStore) -> None:
    """Not kept as their text."""
    for value in REFUSED:
        with pytest.raises(rs.InvalidValueError, match=r"tags\['t'\]"):
            await store.enqueue_rollout("x", tags={"t": value})
        with pytest.raises(ValueError, match=r"tags\.t\n.*a str, int, float or bool"):
            rs.EnqueueRolloutRequest(input="x", tags={"t": value})


REWARDS: list[tuple[Any, float]] = [
    (np.float32(0.5), 0.5), (np.int64(1), 1.0), (np.bool_(True), 1.0), (True, 1.0), (False, 0.0), (3, 3.0),
    (np.array([0.5]), 0.5), (np.array(0.5), 0.5), (Tensor(0.5), 0.5), (Tensor([0.5]), 0.5), (Level.HIGH, 3.0),
    (Bare(True), 1.0), (np.longdouble(0.5), 0.5),
]  # fmt: skip


def returned(value: Any) -> Any:
    """What the agent returns."""
    return rs.run_one(lambda task, ctx: value, "x")


def emitted(value: Any) -> Any:
    """What the agent gives to `ctx.reward`, with a dimension."""
    return rs.run_one(lambda task, ctx: ctx.reward(value, other=value), "x")


def as_a_span(value: Any) -> Any:
    """A reward in a span that was made elsewhere."""
    attributes = {"agentlightning.reward.0.value": value}
    span = rs.Span.from_attributes(attributes=attributes, name="agentlightning.annotation")
    return rs.run_one(lambda task, ctx: [span], "x")


@pytest.mark.parametrize("way", [returned, emitted, as_a_span])
def test_rewards(way: Callable[..., Any]) -> None:
    """A bool is a reward, and so is the one number of an array; in a span, where it is kept as a list, it is none."""
    for value, reward in REWARDS:
        run = way(value)
        expected = None if way is as_a_span and getattr(value, "ndim", 0) > 0 else reward
        assert same(run.reward, expected) and same(rs.find_final_reward(run.spans), expected), value


@pytest.mark.parametrize("way", [returned, emitted])
@pytest.mark.parametrize(
    "value", [*REFUSED, "1", np.arange(2), Tensor([1, 2]), float("nan")], ids=lambda value: type(value).__name__
)
def test_what_is_no_reward_is_refused_by_name(way: Callable[..., Any], value: Any) -> None:
    """The agent fails and says so."""
    with pytest.raises((rs.InvalidValueError, TypeError), match=r"^reward=|^the agent returned"):
        way(value)


WHOLE = [np.int64(1), np.uint8(1), np.array(1), Tensor(1, "int64"), Level.HIGH]
NOT_WHOLE = [True, np.bool_(True), 1.0, np.float64(1.0), "1", Decimal(1), None, [1], np.array([1, 2]), 1j]


def places_for_whole_numbers(store: AnyStore) -> dict[str, Callable[[Any], Any]]:
    """Every argument that is a whole number, as a call."""
    return {
        "limit of dequeue": lambda n: store.dequeue_many_rollouts(limit=n),
        "limit of query_rollouts": lambda n: store.query_rollouts(limit=n),
        "offset of query_rollouts": lambda n: store.query_rollouts(offset=n),
        "limit of query_spans": lambda n: store.query_spans("x", limit=n),
        "limit of query_workers": lambda n: store.query_workers(limit=n),
        "n of enqueue_group": lambda n: store.enqueue_group("x", n),
        "n of take": lambda n: store.take(n, consumer="t"),
        "step of checkpoint": lambda n: store.checkpoint("t", n),
        "step of rewind": lambda n: store.rewind("u", n),
        "limit of completed": lambda n: store.completed(limit=n),
        "limit of changes": lambda n: store.changes(limit=n),
        "priority": lambda n: store.enqueue_rollout("x", priority=n),
        "max_attempts": lambda n: store.enqueue_rollout(
            "x", config=rs.RolloutConfig(max_attempts=n, retry_condition=["failed"])
        ),
    }


async def test_whole_numbers_as_arguments(store: AnyStore) -> None:
    """Taken everywhere, and never for less than they are."""
    for place, call in places_for_whole_numbers(store).items():
        for value in WHOLE:
            await call(value)
        for value in NOT_WHOLE:
            lax = place in ("priority", "max_attempts")  # pydantic's, which takes "1" and 1.0 as the contract does
            if not lax:
                with pytest.raises(rs.InvalidValueError, match="whole number"):
                    await call(value)


async def test_seconds_as_arguments(store: AnyStore) -> None:
    """Durations and times too."""
    seconds: list[Any] = [np.float32(0), np.int64(0), np.array(0.0), Tensor(0.0), 0]
    for value in seconds:
        assert await store.dequeue_rollout(timeout=value) is None
        assert await store.wait_for_rollouts(rollout_ids=[], timeout=value) == []
        assert (await store.completed(timeout=value)).items == []
        assert (await store.take(1, consumer="t", timeout=value)).rollouts == []
        config = rs.RolloutConfig(timeout_seconds=value, unresponsive_seconds=value)
        assert same(config.timeout_seconds, 0.0) and same(config.unresponsive_seconds, 0.0)
        started = await store.start_rollout("x")
        ids = started.rollout_id, started.attempt.attempt_id
        assert same((await store.update_attempt(*ids, last_heartbeat_time=value)).last_heartbeat_time, 0.0)
    no_seconds: list[Any] = [True, np.bool_(True), "1", Decimal(1), float("nan"), np.float64("nan"), [1.0]]
    for value in no_seconds:
        with pytest.raises(rs.InvalidValueError, match="timeout"):
            await store.dequeue_rollout(timeout=value)
        with pytest.raises(rs.InvalidValueError, match="timeout"):
            await store.wait_for_rollouts(rollout_ids=[], timeout=value)


def test_options_of_a_store(make_memory_store: MakeMemoryStore) -> None:
    """Numbers of a configuration, too."""
    store = make_memory_store(
        max_queued=np.int64(1), max_deliveries=np.int32(2), retention={"max_rollouts": np.int64(3)},
        keep_resources=np.int8(1), eviction_memory_threshold=np.float32(0.5), limits={"value_bytes": np.int64(10_000)},
    )  # fmt: skip
    store.sync.enqueue_rollout("x")
    with pytest.raises(rs.OverloadedError, match=r"max_queued is 1\."):
        store.sync.enqueue_rollout("y")
