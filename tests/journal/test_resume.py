"""A store in this process that ends and goes on: what was acknowledged is there, exactly as it was."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

import raystore as rs
from raystore.core.snapshot import digest, parts
from raystore.errors import JournalInUseError, JournalMissingError
from raystore.journal.opening import read_run
from raystore.types.contract import EnqueueRolloutRequest, RolloutConfig
from tests.helpers import make_span


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the journal is."""
    return tmp_path / "journal"


@pytest.fixture
def open_store(path: Path) -> Iterator[Callable[..., Any]]:
    """Opens the store of the journal, and closes it in the end."""
    stores = []

    def make(**options: Any) -> Any:
        stores.append(rs.InMemoryLightningStore(**{"journal": path, "clock": "manual", **options}))
        return stores[-1]

    yield make
    for store in stores:
        store.close()


def assert_same(live: Any, path: Any) -> None:
    """The journal says exactly what the store holds."""
    replayed = read_run(path).state
    differing = [(a, b) for a, b in zip(parts(live), parts(replayed), strict=True) if a != b]
    assert differing[:1] == []
    assert digest(live) == digest(replayed)


KINDS = [
    "enqueue", "group", "bulk", "dequeue", "dequeue", "park", "start", "span", "span", "finish", "fail", "number",
    "cancel", "tick", "resources", "update", "release", "delete", "worker", "save", "save",
]  # fmt: skip


async def some_work(store: Any, lots: Random, count: int = 60) -> None:
    """Calls of all kinds, drawn by lot."""
    claimed: list[Any] = []
    for number in range(count):
        kind = lots.choice(KINDS)
        running = claimed[-1] if claimed else None
        try:
            if kind == "enqueue":
                config = RolloutConfig(timeout_seconds=5, max_attempts=3, retry_condition=["timeout", "failed"])
                await store.enqueue_rollout({"n": number}, config=config, tags={"n": number % 3}, priority=number % 2)
            elif kind == "group":
                await store.enqueue_group("task", 3, group_id=f"g{number % 4}")
            elif kind == "bulk":
                await store.enqueue_many_rollouts([EnqueueRolloutRequest(input=i) for i in range(5)])
            elif kind == "dequeue":
                if (got := await store.dequeue_rollout(f"w{number % 3}")) is not None:
                    claimed.append(got)
            elif kind == "park":
                waiting = asyncio.ensure_future(store.dequeue_rollout("w9", timeout=30))
                await asyncio.sleep(0)
                await store.enqueue_rollout("for whoever waits")
                claimed.append(await waiting)
            elif kind == "start":
                claimed.append(await store.start_rollout("started"))
            elif kind == "span" and running:
                ids = (running.rollout_id, running.attempt.attempt_id)
                await asyncio.gather(*(store.add_span(make_span(running, i)) for i in range(1, 4)))
                await store.get_next_span_sequence_id(*ids)
            elif kind == "save" and running:
                state = lots.choice([None, number, "x" * 50_000])
                await store.save_state(running.rollout_id, running.attempt.attempt_id, state, [make_span(running, 0)])
            elif kind in ("finish", "fail") and running:
                status = "succeeded" if kind == "finish" else "failed"
                await store.update_attempt(running.rollout_id, running.attempt.attempt_id, status=status)
                claimed.pop()
            elif kind == "cancel":
                await store.cancel_rollouts(group_id=f"g{number % 4}")
            elif kind == "tick":
                await store.testing.tick(lots.choice([1.0, 3.0, 7.0]))
            elif kind == "resources":
                await store.update_resources(
                    lots.choice(["a", "b"]), {"p": rs.PromptTemplate(template=str(number), engine="f-string")}
                )
            elif kind == "update" and running:
                await store.update_rollout(running.rollout_id, status=lots.choice(["queuing", "succeeded"]))
            elif kind == "release":
                await store.release([r.rollout_id for r in await store.query_rollouts(status=["succeeded"], limit=3)])
            elif kind == "delete":
                await store.delete_rollouts(
                    [r.rollout_id for r in await store.query_rollouts(status=["cancelled"], limit=2)]
                )
            elif kind == "worker":
                await store.update_worker(f"w{number % 3}", {"load": number})
            elif kind == "number":
                await store.get_many_span_sequence_ids([("ro-unknown", "at-x")])
        except ValueError:
            pass  # refused: also a fact to be replayed


@pytest.mark.parametrize("seed", range(8))
def test_a_replay_is_the_same_state_bit_for_bit(open_store: Callable[..., Any], path: Path, seed: int) -> None:
    """Whatever was asked, refused, timed out or waited for: the journal makes the same state of it."""
    store = open_store(durability="process")
    asyncio.run(some_work(store, random.Random(seed), 200))
    store.sync.check()
    store.close()
    assert_same(store._service.state, path)


def test_a_store_goes_on_where_it_was(open_store: Callable[..., Any], path: Path) -> None:
    """Queue, finished work, spans and resources are there; what ran is offered again, since its process has ended."""
    store = open_store()
    first, second, third = (store.sync.enqueue_rollout(i) for i in range(3))
    store.sync.update_resources("policy", {"p": rs.PromptTemplate(template="x", engine="f-string")}, policy_version=7)
    done = store.sync.dequeue_rollout("w")
    store.sync.add_span(make_span(done, attributes={"answer": 42}))
    store.sync.update_attempt(done.rollout_id, done.attempt.attempt_id, status="succeeded")
    running = store.sync.dequeue_rollout("w")
    store.close()

    again = open_store()
    assert again.info.store_id == store.info.store_id
    assert again.info.epoch == store.info.epoch + 1
    assert again.sync.get_rollout_by_id(first.rollout_id).status == "succeeded"
    assert again.sync.get_latest_resources().policy_version == 7
    (span,) = again.sync.query_spans(first.rollout_id)
    assert span.attributes == {"answer": 42}
    assert running.rollout_id == second.rollout_id
    assert again.sync.get_rollout_by_id(second.rollout_id).status == "requeuing"
    assert [again.sync.dequeue_rollout().rollout_id for _ in range(2)] == [second.rollout_id, third.rollout_id]
    again.sync.check()
    again.close()
    assert_same(again._service.state, path)


def test_a_store_goes_on_whose_rollouts_have_statuses_set_by_hand(open_store: Callable[..., Any], path: Path) -> None:
    """Whatever the contract lets be set: running without an attempt, waiting with one, finished and queued again."""
    store, untried = open_store(), {}
    for status in ("preparing", "running", "failed", "succeeded", "cancelled", "requeuing", "queuing"):
        made = store.sync.enqueue_rollout("x")
        untried[made.rollout_id] = store.sync.update_rollout(made.rollout_id, status=status).status
        started = store.sync.start_rollout("x")
        store.sync.update_rollout(started.rollout_id, status=status)
    store.close()
    again = open_store()
    again.sync.check()
    assert {i: again.sync.get_rollout_by_id(i).status for i in untried} == untried
    again.close()
    assert_same(again._service.state, path)


def test_resume_says_what_is_asked_for(open_store: Callable[..., Any], path: Path) -> None:
    """ "must" needs a run, "never" an empty directory, and nobody writes where a living store does."""
    with pytest.raises(JournalMissingError, match="resume='must'"):
        open_store(resume="must")
    store = open_store(resume="never")
    with pytest.raises(JournalInUseError, match="running store"):
        open_store()
    store.close()
    with pytest.raises(JournalInUseError, match="resume='never'"):
        open_store(resume="never")
    open_store(resume="must").close()
    with pytest.raises(ValueError, match="resume"):
        open_store(resume="perhaps")


async def fill(store: Any, rollouts: int = 40, spans: int = 8) -> list[Any]:
    """Ids of rollouts with spans of 1.6 KB each."""
    made = []
    for number in range(rollouts):
        rollout = await store.start_rollout(number)
        sent = [make_span(rollout, i, attributes={"text": f"{number}/{i}/" + "x" * 1500}) for i in range(1, spans + 1)]
        await store.add_many_spans(sent[:3])
        await asyncio.gather(*(store.add_span(span) for span in sent[3:]))
        made.append(rollout.rollout_id)
    return made


def texts(spans: Any) -> list[Any]:
    return [span.attributes["text"][:-1500] for span in spans]


@pytest.fixture(params=["memory", pytest.param("ray", marks=pytest.mark.timeout(60))])
def make_any(request: pytest.FixtureRequest, path: Path) -> Callable[..., Any]:
    """Makes stores of either kind with the journal."""
    make = request.getfixturevalue(f"make_{request.param}_store")
    return lambda **options: make(**{"journal": path, **options})


async def test_evicted_spans_are_read_from_disk(make_any: Callable[..., Any]) -> None:
    """With a journal eviction frees memory and loses nothing: whole traces, pages of them, and filters."""
    store = make_any(eviction_memory_threshold=200_000, safe_memory_threshold=100_000)
    made = await fill(store)
    counted = await store.statistics()
    assert counted["eviction_passes"] > 0
    assert counted["evicted_rollouts"] == 0
    assert counted["total_spans"] == 320
    for number, rollout_id in enumerate(made):
        assert texts(await store.query_spans(rollout_id)) == [f"{number}/{i}/" for i in range(1, 9)]
    assert texts(await store.query_spans(made[0], limit=2, offset=3, sort_order="desc")) == ["0/5/", "0/4/"]
    many = await store.query_many_spans(made)
    assert [len(spans) for spans in many.values()] == [8] * 40


async def test_spans_are_on_disk_after_a_restart(open_store: Callable[..., Any]) -> None:
    """No body is loaded by a replay, and each is found, also in segments of earlier processes."""
    store = open_store()
    first = await fill(store, 5)
    store.close()
    store = open_store()
    second = await fill(store, 5)
    store.close()
    store = open_store()
    assert (await store.statistics())["total_span_bytes"] < 80 * 1500
    assert texts(await store.query_spans(first[1])) == [f"1/{i}/" for i in range(1, 9)]
    assert texts(await store.query_spans(second[4])) == [f"4/{i}/" for i in range(1, 9)]
    await store.check()


def test_a_run_is_opened_for_reading(open_store: Callable[..., Any], path: Path) -> None:
    """While it runs, and when it has ended: everything is there, nothing can be changed, nobody is disturbed."""
    store = open_store()
    rollout = store.sync.start_rollout({"task": 1})
    store.sync.add_span(make_span(rollout, attributes={"answer": 42}))
    before = sorted(file.name for file in path.iterdir())
    with rs.recover(path) as run:
        assert run.sync.get_rollout_by_id(rollout.rollout_id).input == {"task": 1}
        (span,) = run.sync.query_spans(rollout.rollout_id)
        assert span.attributes == {"answer": 42}
        assert run.sync.get_rollout_by_id(rollout.rollout_id).status == "running"
        with pytest.raises(rs.ReadOnlyError, match="opened for reading"):
            run.sync.enqueue_rollout("x")
    assert sorted(file.name for file in path.iterdir()) == before
    store.sync.update_attempt(rollout.rollout_id, rollout.attempt.attempt_id, status="succeeded")
    store.close()
    assert rs.recover(path).sync.get_rollout_by_id(rollout.rollout_id).status == "succeeded"
    with pytest.raises(JournalMissingError):
        rs.recover(path / "elsewhere")


def test_a_session_that_is_reserved_while_it_waits_is_in_the_journal(
    open_store: Callable[..., Any], path: Path
) -> None:
    """A waiting call that is offered nothing may be reserved for a suspect, and that must come back."""
    store = open_store()
    service = store._service
    busy = service.open_session("busy")

    def call(session: Any, verb: str, **arguments: Any) -> Any:
        return service.call(session, 1, verb, arguments, lambda ticket, value: True)

    def lose(queue: str) -> None:
        dying = service.open_session(f"dying of {queue}")
        request = {"input": b"\x01\xa1s", "metadata": None, "queue": queue}
        rollout, _ = call(dying, "start_rollout", request=request, worker_id=None)
        service.end_session(dying, why="test")
        assert rollout.rollout_id in service.state.suspects

    def start() -> Any:
        request = {"input": b"\x01\xa1l", "metadata": None}
        return call(busy, "start_rollout", request=request, worker_id=None)[1]

    wanted = {"limit": 1, "worker_id": None}
    first = start()
    lose("one")
    assert call(busy, "dequeue", queues=["one"], **wanted) == []  # it is drained
    call(
        busy,
        "update_attempt",
        rollout_id=first.rollout_id,
        attempt_id=first.attempt_id,
        changes={"status": "succeeded"},
    )
    start()
    assert (busy.reserved_since, service.state.drained) == (None, "busy")
    call(busy, "dequeue", queues=["two"], timeout=60.0, **wanted)
    lose("two")
    assert busy.reserved_since is not None
    store.close()
    assert_same(service.state, path)
