"""Memory: thresholds, eviction classes, statistics, pausing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

import raystore as rs
from tests.helpers import AnyStore, claim, make_span, present

SIZE = 1000


def sized(span: Any) -> int:
    """An estimator that finds every span 1,000 bytes large."""
    return SIZE


@pytest.fixture
def small(make_store: Callable[..., AnyStore]) -> AnyStore:
    """A store that holds four spans and evicts down to two."""
    return make_store(eviction_memory_threshold=4 * SIZE, safe_memory_threshold=2 * SIZE, span_size_estimator=sized)


async def add(store: Any, rollout: Any, number: int = 1) -> None:
    await store.add_span(make_span(rollout, number))


async def is_evicted(store: Any, rollout: Any) -> bool:
    try:
        await store.query_spans(rollout.rollout_id)
    except RuntimeError:
        return True
    return False


async def fill(store: Any, count: int) -> list[Any]:
    """Rollouts with a span each, the oldest first."""
    made = []
    for _ in range(count):
        made.append(await claim(store))
        await add(store, made[-1])
        store.testing.tick(1)
    return made


async def test_oldest_start_first_down_to_the_safe_threshold(small: AnyStore) -> None:
    """Crossing the threshold drops whole rollouts, oldest first; rollouts and attempts stay."""
    made = await fill(small, 5)
    assert [await is_evicted(small, r) for r in made] == [True, True, True, False, False]
    for rollout in made:
        assert (await small.get_rollout_by_id(rollout.rollout_id)).attempt.attempt_id == rollout.attempt.attempt_id


async def test_exactly_the_threshold_does_not_evict(small: AnyStore) -> None:
    """The comparison is strict."""
    made = await fill(small, 4)
    assert (await small.statistics())["total_span_bytes"] == 4 * SIZE
    assert not await is_evicted(small, made[0])


async def test_evicted_spans_raise_for_ever(small: AnyStore) -> None:
    """Reading what was evicted raises, also when later spans arrived, unless a part is asked for."""
    made = await fill(small, 5)
    with pytest.raises(rs.SpansEvictedError, match=f"Spans for rollout {made[0].rollout_id} have been evicted"):
        await small.query_spans(made[0].rollout_id)
    await add(small, made[0], 2)
    with pytest.raises(RuntimeError):
        await small.query_spans(made[0].rollout_id)
    with pytest.raises(rs.SpansEvictedError):
        await small.query_many_spans([made[4].rollout_id, made[0].rollout_id])
    part = await small.query_spans(made[0].rollout_id, allow_partial=True)
    assert [span.sequence_id for span in part] == [2]


async def test_classes_go_in_order(small: AnyStore) -> None:
    """Released first, then finished and read, then finished, then running; age decides within a class only."""
    running, unread, read, released = await fill(small, 4)
    for rollout in (unread, read, released):
        await small.update_attempt(rollout.rollout_id, "latest", status="succeeded")
    await small.query_spans(read.rollout_id)
    await small.release([released.rollout_id])
    made = await fill(small, 1)
    assert [await is_evicted(small, r) for r in (released, read, unread, running)] == [True, True, True, False]
    assert not await is_evicted(small, made[0])


async def test_the_rollout_being_written_goes_last(small: AnyStore) -> None:
    """Though the oldest, it keeps its spans if another can go; alone, it cannot."""
    old, *others = await fill(small, 4)
    await add(small, old, 2)
    assert not await is_evicted(small, old)
    assert [await is_evicted(small, r) for r in others] == [True, True, True]
    for number in range(3, 6):
        await add(small, old, number)
    assert await is_evicted(small, old)
    assert (await small.statistics())["total_span_bytes"] == 0


async def test_statistics_count_evictions(small: AnyStore) -> None:
    """What is gone is counted apart from what is there."""
    await fill(small, 5)
    found = await small.statistics()
    assert (found["total_spans"], found["total_span_bytes"]) == (2, 2 * SIZE)
    assert (found["evicted_spans"], found["evicted_rollouts"], found["eviction_passes"]) == (3, 3, 1)
    assert (found["eviction_threshold_bytes"], found["safe_threshold_bytes"]) == (4 * SIZE, 2 * SIZE)
    assert found["last_eviction_seconds"] > 0
    kinds = [change.kind for change in (await small.changes(kinds=["evicted"])).items]
    assert kinds == ["evicted"]


async def test_pause_hands_out_no_work_until_memory_is_free(make_store: Callable[..., AnyStore]) -> None:
    """With on_memory_full="pause" only released rollouts are evicted, and work waits."""
    store = make_store(
        eviction_memory_threshold=4 * SIZE, safe_memory_threshold=2 * SIZE,
        span_size_estimator=sized, on_memory_full="pause",
    )  # fmt: skip
    made = await fill(store, 5)
    assert not any([await is_evicted(store, r) for r in made])
    waiting = await store.enqueue_rollout("next")
    assert await store.dequeue_rollout() is None
    assert (await store.statistics())["memory_full"]
    task = asyncio.ensure_future(store.dequeue_rollout(timeout=60))
    await asyncio.sleep(0)
    await store.delete_rollouts([r.rollout_id for r in made[:3]])
    assert present(await task).rollout_id == waiting.rollout_id
    assert not await is_evicted(store, made[4])


async def test_without_an_estimator_everything_counts(make_store: Callable[..., AnyStore]) -> None:
    """Encoded bytes of spans with an overhead for each, and inputs and resources; spans alone are evicted."""
    store = make_store(eviction_memory_threshold=200_000, safe_memory_threshold=100_000)
    rollout = await claim(store)
    before = await store.statistics()
    await store.add_span(make_span(rollout, attributes={"x": "y" * 5000}))
    after = await store.statistics()
    assert 5000 < after["total_span_bytes"] - before["total_span_bytes"] < 7000
    await store.enqueue_rollout("z" * 60_000)
    await store.add_resources({"p": rs.PromptTemplate(template="p" * 60_000, engine="f-string")})
    assert (await store.statistics())["payload_bytes"] > 120_000
    for number in range(2, 20):
        await store.add_span(make_span(rollout, number, attributes={"x": "y" * 5000}))
    assert await is_evicted(store, rollout)


async def test_estimator_runs_in_the_caller_and_its_error_is_the_callers(make_store: Callable[..., AnyStore]) -> None:
    """An estimator that raises stores nothing; its result is taken as a whole number, 0 or more."""

    def picky(span: Any) -> float:
        if span.name == "bad":
            raise ZeroDivisionError("no size")
        return -5 if span.name == "negative" else 7.9

    store = make_store(span_size_estimator=picky)
    rollout = await claim(store)
    with pytest.raises(ZeroDivisionError, match="no size"):
        await store.add_span(make_span(rollout, name="bad"))
    await store.add_span(make_span(rollout, 1, name="negative"))
    await store.add_span(make_span(rollout, 2, name="good"))
    found = await store.statistics()
    assert (found["total_spans"], found["total_span_bytes"]) == (2, 7)


@pytest.mark.parametrize(
    ("eviction", "safe", "message"),
    [
        (0.0, None, "eviction_memory_threshold ratio must be greater than 0 and at most 1"),
        (1.5, None, "eviction_memory_threshold ratio must be greater than 0 and at most 1"),
        (-1, None, "eviction_memory_threshold must be non-negative"),
        (0, None, "eviction_memory_threshold must be at least 1 bytes"),
        (0.5, 1.5, "safe_memory_threshold ratio must be between 0 and 1 inclusive"),
        (0.5, -1, "safe_memory_threshold must be non-negative"),
        (100, 100, "safe_memory_threshold must be smaller than eviction_memory_threshold"),
        (100, 0.5, "safe_memory_threshold must be smaller than eviction_memory_threshold"),
        (True, None, "eviction_memory_threshold=True must be a ratio"),
        ("1G", None, "eviction_memory_threshold='1G' must be a ratio"),
    ],
)
async def test_threshold_errors(
    make_store: Callable[..., AnyStore], eviction: float | bool | str, safe: float | None, message: str
) -> None:
    """Each bad threshold is named, and no store is made."""
    with pytest.raises(ValueError, match=message):
        make_store(eviction_memory_threshold=eviction, safe_memory_threshold=safe)


async def test_threshold_defaults_and_ratios(make_store: Callable[..., AnyStore]) -> None:
    """70 % of the capacity and 80 % of that; an int is bytes, a float a ratio of the capacity."""
    default = await make_store().statistics()
    capacity = default["memory_capacity_bytes"]
    assert default["eviction_threshold_bytes"] == int(0.7 * capacity)
    assert default["safe_threshold_bytes"] == int(0.8 * default["eviction_threshold_bytes"])
    ratios = await make_store(eviction_memory_threshold=0.5, safe_memory_threshold=0.25).statistics()
    assert (ratios["eviction_threshold_bytes"], ratios["safe_threshold_bytes"]) == (
        int(0.5 * capacity), int(0.25 * capacity),
    )  # fmt: skip
    one_byte = await make_store(eviction_memory_threshold=1).statistics()
    assert (one_byte["eviction_threshold_bytes"], one_byte["safe_threshold_bytes"]) == (1, 0)


# -- what a consumer awaits or holds -----------------------------------------------------------------------------------


@pytest.fixture
def make_small(make_store: Callable[..., AnyStore]) -> Callable[..., Any]:
    """Makes stores that hold four spans and evict down to two."""

    def make(**options: Any) -> AnyStore:
        return make_store(
            eviction_memory_threshold=4 * SIZE, safe_memory_threshold=2 * SIZE, span_size_estimator=sized, **options
        )

    return make


async def finish(store: Any, made: list[Any], **more: Any) -> None:
    for rollout in made:
        await store.update_attempt(rollout.rollout_id, "latest", status="succeeded", **more)


async def test_memory_full_of_what_a_consumer_awaits_makes_the_store_wait_for_it(
    make_small: Callable[..., Any],
) -> None:
    """Though a monitor has read all of it; nothing is evicted, the consumer is named, and gets a short batch."""
    store = make_small(consumers=["t"])
    made = await fill(store, 5)  # running ones, which it will await
    await finish(store, made)
    assert not any([await is_evicted(store, r) for r in made])
    waiting = await store.enqueue_rollout("next")
    assert await store.dequeue_rollout() is None
    found = await store.statistics()
    assert (found["memory_full"], found["waits_for_consumer"], found["consumers"]["t"]["awaited"]) == (True, "t", 5)
    (change,) = (await store.changes(kinds=["memory_full"])).items
    assert change.detail["consumer"] == "t" and change.detail["awaited"] + change.detail["held"] > 0
    parked = asyncio.ensure_future(store.dequeue_rollout(timeout=60))
    batch = await asyncio.wait_for(store.take(100, consumer="t", timeout=600), 30)
    assert len(batch.rollouts) == 5
    await store.ack(batch, step=1)
    assert (await store.statistics())["memory_full"] and not any([await is_evicted(store, r) for r in made])
    assert await store.checkpoint("t", 1) == 5
    assert (await parked).rollout_id == waiting.rollout_id
    assert [await is_evicted(store, r) for r in made] == [True, True, True, False, False]
    assert (await store.statistics())["waits_for_consumer"] is None


async def test_a_take_that_waits_gets_what_there_is_once_memory_is_full(make_small: Callable[..., Any]) -> None:
    """Else both would wait for each other."""
    store = make_small()
    waiting = asyncio.ensure_future(store.take(100, consumer="t", timeout=600))
    await asyncio.sleep(0)
    await store.enqueue_rollout("could still come")
    made = [await store.start_rollout(number) for number in range(5)]
    for rollout in made:
        await add(store, rollout)
    await finish(store, made[:1])
    batch = await asyncio.wait_for(waiting, 30)
    assert [rollout.rollout_id for rollout in batch.rollouts] == [made[0].rollout_id]


async def test_who_does_not_come_again_is_forgotten(make_small: Callable[..., Any]) -> None:
    """Then what it awaited and held may go, and the store goes on."""
    store = make_small(consumers=["t", "gone"])
    made = await fill(store, 5)
    await finish(store, made)
    batch = await store.take(5, consumer="t")
    await store.ack(batch, step=1)
    await store.checkpoint("t", 1)
    assert (await store.statistics())["waits_for_consumer"] == "gone"
    assert await store.forget_consumer("gone") == 5
    found = await store.statistics()
    assert not found["memory_full"] and found["total_span_bytes"] == 2 * SIZE


async def test_what_no_consumer_awaits_goes_first_and_in_its_order(make_store: Callable[..., AnyStore]) -> None:
    """Released, consumed, read, not read, running, whatever their age; what is awaited or held stays."""
    store = make_store(
        eviction_memory_threshold=8 * SIZE + SIZE // 2, safe_memory_threshold=8 * SIZE + SIZE // 10,
        span_size_estimator=sized, consumers={"t": {"mode": "train"}},
    )  # fmt: skip
    made = {}
    for name in ("awaited", "consumed", "held", "running", "unread", "read", "released", "filler"):
        mode: rs.RolloutMode = "train" if name in ("awaited", "consumed", "held") else "val"
        made[name] = await store.start_rollout(name, mode)
        await add(store, made[name])
        await store.testing.tick(1)
    for name in ("consumed", "held", "awaited"):
        await finish(store, [made[name]])
        if name != "awaited":
            batch = await store.take(1, consumer="t")
        if name == "consumed":
            await store.ack(batch, step=1)
            await store.checkpoint("t", 1)
    await finish(store, [made[name] for name in ("unread", "read", "released")])
    await store.query_spans(made["read"].rollout_id)
    await store.release([made["released"].rollout_id, made["awaited"].rollout_id])
    gone = []
    for number in range(2, 7):
        await add(store, made["filler"], number)
        left = await store.query_many_spans([made["running"].rollout_id], allow_partial=True)
        gone.append((await store.statistics())["evicted_spans"])
        for name in ("released", "consumed", "read", "unread", "running")[: number - 1]:
            spans = await store.query_spans(made[name].rollout_id, allow_partial=True)
            assert not spans, f"{name} was to go before what went"
    assert gone == [1, 2, 3, 4, 5] and not left[made["running"].rollout_id]
    await add(store, made["filler"], 7)
    assert [await is_evicted(store, made[name]) for name in ("filler", "held", "awaited")] == [True, False, False]
