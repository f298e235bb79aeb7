"""The small parts: queues, deadlines, changes, completions, step ids, pauses, eviction at scale."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import Field, fields
from typing import Any

import pytest

from raystore.core import expiry
from raystore.core.indexes import ChangeFeed, CompletionLog
from raystore.core.queues import Deadlines, LazyHeap, Order, Queues
from raystore.core.state import AttemptKey, Effects, ReplyCache, Step
from raystore.errors import CursorTooOldError
from tests.core.conftest import Core


def test_queue_keeps_places_through_any_traffic() -> None:
    """Against a sorted list: put, discard, put back at the old place."""
    rng, queues = random.Random(1), Queues()
    model: dict[str, Order] = {}
    orders: dict[str, Order] = {}
    for number in range(3000):
        name = f"r{rng.randrange(200)}"
        if name in model:
            assert queues.discard(name)
            del model[name]
        else:
            order = orders.get(name) if rng.random() < 0.5 else None
            order = order or queues.tail(rng.randrange(3))
            orders[name] = model[name] = order
            queues.put("q", name, order)
        expected = min(model, key=model.__getitem__) if model else None
        assert queues.first(["q"]) == expected and queues.length("q") == len(model)
        if number % 500 == 0:
            queues.check()


def test_a_lazy_heap_is_a_dictionary_that_knows_its_first() -> None:
    """Whatever was put, put again and discarded: the lowest priority comes first, of equal ones what was put first."""
    rng = random.Random(2)
    heap, model = LazyHeap[int, int](), dict[int, tuple[int, int]]()
    for number in range(3000):
        key, priority = rng.randrange(100), rng.randrange(20)
        if rng.random() < 0.5:
            heap.pop(key, None)
            model.pop(key, None)
        else:
            heap.put(key, priority)
            if key not in model or model[key][0] != priority:
                model[key] = (priority, number)
        first = heap.first()
        assert (first and first[2]) == min(model, key=model.__getitem__, default=None)
        assert len(heap) == len(model) and sum(1 for _ in heap) == len(model)
        if first and rng.random() < 0.1:
            assert heap.take() == first[2]
            del model[first[2]]
    other = LazyHeap[int, int]()
    other.fill(heap.priorities())
    assert dict(other.priorities()) == {key: priority for key, (priority, _) in model.items()}


def test_deadlines_fire_strictly_after_and_only_when_really_due() -> None:
    """What moved later is met again; what moved earlier is met in time."""
    due = {"a": 5.0, "b": 7.0}
    deadlines = Deadlines(due.get)
    for key in due:
        deadlines.guard(key)
    assert list(deadlines.due(5.0, 10)) == []
    due["a"] = 9.0
    assert list(deadlines.due(6.0, 10)) == [] and deadlines.next() == 7.0
    due["b"] = 6.0
    deadlines.guard("b")
    assert list(deadlines.due(6.5, 10)) == ["b"]
    del due["a"]
    assert deadlines.next() is None


def test_change_feed_is_bounded_and_resumes() -> None:
    """Cursors are sequence numbers; too old a one is told the oldest."""
    feed = ChangeFeed(length=3)
    for number in range(5):
        feed.append(float(number), "k" if number % 2 else "j")
    assert [c.sequence for c in feed.after(None, None, 10)[0]] == [3, 4, 5]
    assert feed.after(2, None, 2)[1] == 4
    assert [c.sequence for c in feed.after(2, frozenset({"k"}), 10)[0]] == [4]
    with pytest.raises(CursorTooOldError) as caught:
        feed.after(1, None, 1)
    assert caught.value.oldest == 3
    assert feed.after(5, None, 1) == ([], 5)


def test_completion_log_stays_small() -> None:
    """Entries without meaning are dropped, order is kept."""
    log = CompletionLog()
    for number in range(1000):
        log.append(f"r{number % 10}")
    assert [rollout_id for _, rollout_id in log.after(None)] == [f"r{n}" for n in range(10)]
    assert len(log._ids) < 100
    log.discard("r3")
    assert "r3" not in log and len(log) == 9


def test_ids_follow_from_the_seed() -> None:
    """A step that is replayed mints the same ids, in the contract's formats."""
    first, again, other = (Step(0.0, 0.0, seed) for seed in (7, 7, 8))
    ids = [first.mint("ro-", 12, ()), first.mint("at-", 8, ())]
    assert ids == [again.mint("ro-", 12, ()), again.mint("at-", 8, ())]
    assert other.mint("ro-", 12, ()) != ids[0]
    assert [len(i) for i in ids] == [15, 11]


def test_a_pause_moves_deadlines_claims_and_sessions(core: Core) -> None:
    """Time in which the store stood still counts for nobody."""
    session = core.open("a")
    timed = core.enqueue(config=[10.0, None, 1, []])
    core.hold(session)
    waiting = core.enqueue()
    core.claim(session)
    core.tick(4)
    core.now += 100
    expiry.pause(core.state, core.step(), 100)
    core.tick(0.5)
    assert core.status(timed) == "preparing" and core.status(waiting) == "preparing" and session.ended_at is None
    core.tick(1)
    assert core.status(waiting) == "queuing"
    core.tick(5)
    assert core.status(timed) == "failed"


def test_refused_verbs_change_nothing(core: Core) -> None:
    """A verb is one step: all of it happens, or it raises and nothing did."""
    core.enqueue("a", rollout_id="mine")
    before = core.state.rollouts_made
    other = {"input": b"\x01b", "metadata": None, "rollout_id": "mine", "mode": "val"}
    with pytest.raises(ValueError):
        core.run("enqueue", requests=[{"input": b"n", "metadata": None}, other])
    assert core.state.rollouts_made == before and len(core.state.queues) == 1


def test_eviction_does_not_sort_everything(make_core: Callable[..., Core]) -> None:
    """A pass costs what it evicts: the next pass finds the next oldest."""
    core = make_core(eviction_bytes=50_000, safe_bytes=40_000, spans_only=True)
    session = core.open("a")
    ids = [core.enqueue() for _ in range(200)]
    for rollout_id in ids:
        (key,) = core.hold(session)
        row = [1, "s", "t", None, "n", None, None, None, b"x", 1000]
        core.run("add_spans", session=session, rollout_id=rollout_id, attempt_id=key[1], spans=[row])
        core.report(key, "succeeded", session)
    kept = [rollout_id for rollout_id in ids if core.state.spans.has(rollout_id)]
    assert kept == ids[-len(kept) :] and 40 <= len(kept) <= 50
    assert core.state.spans.evicted == set(ids) - set(kept)


class Counted(dict[AttemptKey, float]):
    """A mapping that counts how often somebody looks for a key."""

    looks = 0

    def __contains__(self, key: object) -> bool:
        self.looks += 1
        return super().__contains__(key)


def test_handing_work_to_many_parked_calls_looks_at_each_only_now_and_then() -> None:
    """What was handed is forgotten once it is acknowledged, at a price that does not grow with what is open."""
    line, claims, count = ReplyCache(), Counted(), 5_000
    for ticket in range(count):
        claims[f"r{ticket}", "a"] = 0.0
        line.hand(ticket, [(f"r{ticket}", "a")], claims)
    assert set(line.handed) == set(range(count))
    for ticket in range(count, 2 * count):
        claims.pop((f"r{ticket - count}", "a"))  # acknowledged
        claims[f"r{ticket}", "a"] = 0.0
        line.hand(ticket, [(f"r{ticket}", "a")], claims)
        assert line.handed.keys() >= {ticket, ticket - count + 1}
    assert claims.looks <= 4 * count
    claims.clear()
    for ticket in range(2 * count, 2 * count + 200):
        line.hand(ticket, [(f"r{ticket}", "a")], claims)
    assert len(line.handed) <= 65


def test_a_full_store_resumes_once_it_is_below_the_safe_threshold(make_core: Callable[..., Core]) -> None:
    """Paused for memory: releasing rollouts one by one evicts each of them, until work is handed out again."""
    core = make_core(eviction_bytes=10_000, safe_bytes=8_000, spans_only=True, pause_when_full=True)
    session = core.open("a")
    ids = []
    for _ in range(11):
        ids.append(core.enqueue())
        (key,) = core.hold(session)
        row = [1, "s", "t", None, "n", None, None, None, b"x", 1000]
        core.run("add_spans", session=session, rollout_id=key[0], attempt_id=key[1], spans=[row])
        core.report(key, "succeeded", session)
    core.enqueue("next")
    assert (core.state.memory_full, core.claim(session)) == (True, [])
    for rollout_id in ids[:3]:
        core.run("release", rollout_ids=[rollout_id])
    assert not core.state.memory_full and len(core.claim(session)) == 1


def test_heaps_do_not_grow_with_what_is_gone(core: Core) -> None:
    """Rollouts that were deleted leave nothing in the eviction heaps."""
    session = core.open("a")
    for _ in range(3000):
        rollout_id = core.enqueue()
        (key,) = core.hold(session)
        row = [1, "s", "t", None, "n", None, None, None, b"x", -1]
        core.run("add_spans", session=session, rollout_id=key[0], attempt_id=key[1], spans=[row])
        core.report(key, "succeeded", session)
        core.run("release", rollout_ids=[rollout_id])
        core.run("delete_rollouts", rollout_ids=[rollout_id])
    assert not any(map(len, core.state.eviction_heaps))
    assert core.state.total_bytes == 0


def test_reading_what_is_new_does_not_walk_the_feed() -> None:
    """From either end the same changes come, in order."""
    feed = ChangeFeed(length=1000)
    for number in range(2500):
        feed.append(0.0, str(number))
    for cursor in (1500, 1600, 2100, 2499, 2500):
        changes, after = feed.after(cursor, None, 10_000)
        assert [c.sequence for c in changes] == list(range(cursor + 1, 2501)) and after == 2500


@pytest.mark.parametrize("field", fields(Effects), ids=lambda field: field.name)
def test_a_state_with_any_effect_is_not_quiet(field: Field[Any]) -> None:
    """Each operation asks that only: an effect that is forgotten there would wait for the next one."""
    state = Core().state
    assert (state.is_quiet, bool(state.effects)) == (True, False)
    value = getattr(state.effects, field.name)
    setattr(state.effects, field.name, True if value is False else type(value)(["something"]))
    assert (state.is_quiet, bool(state.effects)) == (False, True)
