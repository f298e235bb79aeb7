"""The selection report on stores of both kinds: of a feed, of another consumer, through restarts, and wrong calls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import raystore as rs
from tests.feed.conftest import Failed, running, spans_of, trained
from tests.helpers import AnyStore, present

FEED: dict[str, Any] = {"resources_id": "policy", "size": 2, "batch": 2, "require": ()}


async def test_a_feed_says_what_it_trained_on_and_what_it_left(store: AnyStore) -> None:
    """Failures that are masked, groups that are filtered, and items that never came to a training."""

    async def agent(rollout: Any) -> float:
        if rollout.input == 3:
            raise Failed
        return float(rollout.input % 4 == 0)

    feed = store.feed("train", list(range(8)), **FEED, seed=None, budget=None)
    async with running(store, agent):
        groups = await trained(feed, keep=lambda group: group.index != 5)
    report = await store.selection_report("train")
    kept = {group.index for batch in groups for group in batch}
    assert kept == {0, 1, 2, 4, 6, 7}
    endings = {one.ending: one.rollouts for one in report.endings}
    assert endings == {"trained": 12, "masked": 2, "filtered": 2}
    assert (report.started, report.trained, report.under_way) == (16, 12, 0)
    assert report.items == {"train": {"trained": 6, "filtered": 1, "failed": 1}}
    assert report.starved == {"train": (2, [3, 5])}
    assert report.sentences[-1] == "Items 3, 5 were drawn and never trained on"
    assert "trained" in report.table() and report.svg().startswith("<svg")
    await feed.close()


async def test_turns_and_tokens_are_those_that_runners_report(store: AnyStore) -> None:
    feed = store.feed("train", [1, 2], **FEED, seed=None)
    await feed.publish([0.0], version=0)
    batches = feed.batches()
    for _ in range(4):
        rollout = present(await store.dequeue_rollout(timeout=30))
        calls = {"turns": 3, "prompt_tokens": 50, "response_tokens": 7, "finish_reasons": {"stop": 3}}
        await store.finish_attempt(
            rollout.rollout_id, rollout.attempt.attempt_id, spans_of(rollout, 1.0), "succeeded", calls=calls
        )
    before = await store.selection_report("train")
    assert (before.started, before.trained, before.under_way) == (4, 0, 4)
    batch = await anext(batches)
    await feed.publish([1.0], version=1)
    await batch.ack(step=1)
    (trained_on,) = (await store.selection_report("train")).endings
    assert (trained_on.turns.mean, trained_on.tokens.mean, trained_on.turns.count) == (3.0, 7.0, 4)
    await feed.close()


async def test_of_another_consumer_what_the_store_still_has(store: AnyStore) -> None:
    """Rollouts by its filter: those that it took and consumed, those that failed, and those that it still awaits."""
    for number in range(8):
        await store.enqueue_rollout(number, mode="train", tags={"env": "math" if number % 2 else "code"})
    await store.enqueue_rollout("not asked for", mode="val")
    for number in range(9):
        rollout = present(await store.dequeue_rollout(timeout=30))
        status: Any = "failed" if number in (2, 5) else "succeeded"
        await store.finish_attempt(rollout.rollout_id, rollout.attempt.attempt_id, spans_of(rollout, 0.5), status)
    batch = await store.take(4, consumer="own", mode="train")
    await store.ack(batch, step=1)
    report = await store.selection_report("own")
    assert {one.ending: one.rollouts for one in report.endings} == {"trained": 4, "failed": 2, "under way": 2}
    assert "Counted are the rollouts that the store still has" in " ".join(report.sentences)
    assert {row.value for row in report.values if row.dimension == "environment"} == {"math", "code"}


async def test_a_name_that_nobody_has_and_times_that_are_none(store: AnyStore) -> None:
    with pytest.raises(rs.InvalidValueError, match="the name of a feed, or of another consumer; there is none"):
        await store.selection_report("train")
    feed = store.feed("train", [1], **FEED)
    await feed.publish([0.0], version=0)
    with pytest.raises(rs.InvalidValueError, match=r"consumer='trian'.*there are 'train'|'trian'"):
        await store.selection_report("trian")
    for wrong in ("yesterday", True, float("nan"), [1]):
        with pytest.raises(rs.InvalidValueError, match="since"):
            await store.selection_report("train", since=wrong)  # type: ignore[arg-type]
    with pytest.raises(rs.InvalidValueError, match="consumer"):
        await store.selection_report(7)  # type: ignore[arg-type]
    assert (await store.selection_report("train", since=4e9)).started in (0, 2)
    await feed.close()


async def test_a_journal_has_it_all(tmp_path: Path) -> None:
    """A run that was left in the middle tells the same from its journal, and goes on from there."""
    path = str(tmp_path / "journal")

    async def agent(rollout: Any) -> float:
        return float(rollout.input % 2)

    def made(store: rs.InMemoryLightningStore) -> rs.Feed:
        return store.feed("train", list(range(12)), **FEED, seed=None)

    with rs.InMemoryLightningStore(journal=path) as store:
        feed = made(store)
        async with running(store, agent):
            await trained(feed, keep=lambda group: group.index % 3 != 2, steps=2)
        await feed.close()
        before = await store.selection_report("train")
    with rs.InMemoryLightningStore(journal=path) as again:
        known = await again.selection_report("train")
        assert known.endings[0] == before.endings[0] and known.trained == before.trained == 8
        assert known.items == before.items
        feed = made(again)
        assert await feed.restore(step=1) == 2
        assert (await again.selection_report("train")).trained == 4
        await feed.close()
    read = rs.recover(path)
    assert (await read.selection_report("train")).trained == 4
    read.close()
