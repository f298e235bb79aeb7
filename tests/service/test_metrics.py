"""`metrics`: what happened, and what held the run back, of a store in process and of one that was started again."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

import raystore as rs
from raystore.core.state import Settings, State
from raystore.service import sampling
from raystore.service.parking import Parking
from raystore.service.sampling import Sampler
from tests.helpers import until


async def finish(store: rs.InMemoryLightningStore, count: int, reward: float = 1.0) -> None:
    """Run so many rollouts to their end."""
    for number in range(count):
        await store.enqueue_rollout(number, mode="train")
    for claimed in await store.dequeue_many_rollouts(limit=count):
        await store.finish_attempt(
            claimed.rollout_id, claimed.attempt.attempt_id, [], "succeeded",
            calls={"turns": 2, "prompt_tokens": 10, "response_tokens": 4, "finish_reasons": {"stop": 2}},
        )  # fmt: skip


async def test_a_store_says_what_happened() -> None:
    """In all, in each bucket, and nothing of before."""
    async with rs.InMemoryLightningStore(clock="manual") as store:
        await finish(store, 3)
        await store.testing.tick(120)
        await finish(store, 2)
        whole, last = await store.metrics(), await store.metrics(seconds=60)
    assert (whole["total"]["enqueued"], whole["total"]["finished"]) == (5, {"ok": 5})
    assert [bucket["enqueued"] for bucket in whole["buckets"]] == [3, 2]
    assert [bucket["enqueued"] for bucket in last["buckets"]] == [2]
    assert (whole["total"]["turns"], whole["total"]["response_tokens"]) == (10, 20)
    assert whole["total"]["finish_reasons"] == {"stop": 10}
    assert whole["memory"]["total"] > 0 and whole["journal_lag_seconds"] is None


async def test_a_store_that_was_started_again_has_its_counts(tmp_path: Path) -> None:
    """From the operations, and from a snapshot."""
    async with rs.InMemoryLightningStore(journal=tmp_path / "j") as store:
        await finish(store, 4)
        before = await store.metrics()
    async with rs.InMemoryLightningStore(journal=tmp_path / "j") as store:
        after = await store.metrics()
        assert after["total"] == before["total"]
        assert after["journal_lag_seconds"] is not None
    assert [bucket["spans"] for bucket in after["buckets"]] == [bucket["spans"] for bucket in before["buckets"]]


@pytest.mark.parametrize(("name", "value"), [("seconds", -1.0), ("seconds", "x"), ("versions", -1), ("versions", 1.5)])
async def test_wrong_arguments_are_named(name: str, value: object) -> None:
    async with rs.InMemoryLightningStore() as store:
        with pytest.raises(rs.InvalidValueError, match=name):
            await store.metrics(**{name: value})  # type: ignore[arg-type]


async def test_the_store_looks_while_somebody_waits() -> None:
    """A trainer that waits for its batch, and runners without work; a store in which nothing goes on rests."""
    async with rs.InMemoryLightningStore() as store:
        waiting = asyncio.create_task(store.take(1, consumer="t", timeout=60))
        idle = asyncio.create_task(store.dequeue_rollout(timeout=60, queues=["other"]))

        async def looked() -> bool:
            return (await store.metrics())["sampled_seconds"] >= 2

        await until(looked)
        found = await store.metrics()
        assert found["shares"]["trainer_waited"] == found["shares"]["runners_idle"] == 1.0
        assert found["shares"]["paused"] == found["shares"]["memory_full"] == 0.0
        assert found["waited_seconds"] == {"t": pytest.approx(found["sampled_seconds"])}
        for task in (waiting, idle):
            task.cancel()
        await asyncio.gather(waiting, idle, return_exceptions=True)

        async def rests() -> bool:
            before = (await store.metrics())["sampled_seconds"]
            await asyncio.sleep(1.5 * sampling.SAMPLE_SECONDS)
            return (await store.metrics())["sampled_seconds"] == before

        await until(rests)


def test_a_standstill_counts_for_little() -> None:
    """A process that was frozen did not look."""
    state = State(Settings(eviction_bytes=10**9, safe_bytes=10**8))
    sampler = Sampler()
    nobody: Parking = Parking.__new__(Parking)
    nobody.by_kind = {"batch": {}}
    nobody._all = {}
    sampler.begin(0.0)
    sampler.look(500.0, 500.0, state, nobody, is_behind=False)
    found = sampling.described(sampler.since(0.0))
    assert found["sampled_seconds"] == sampling.LONGEST_SECONDS
    assert found["loop_lag_seconds"] == pytest.approx(500.0 - sampling.SAMPLE_SECONDS)
    assert found["shares"]["store"] == 1.0
    assert sampler.at is None


async def test_an_answer_is_the_callers_own() -> None:
    """What is done to it does nothing to the store; and an end that is told again is counted once."""
    async with rs.InMemoryLightningStore() as store:
        made = await store.start_rollout("x")
        for _ in range(3):
            await store.update_rollout(made.rollout_id, status="succeeded")
        first = await store.metrics()
        assert sum(first["total"]["finished"].values()) == 1
        first["buckets"][0]["finished"].clear()
        assert sum((await store.metrics())["total"]["finished"].values()) == 1
