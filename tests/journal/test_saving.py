"""Saved states in a journal: there after a restart and after a snapshot, while former ones do not stay on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import raystore as rs
from raystore.journal.compaction import compact
from raystore.journal.files import Directory
from raystore.journal.opening import read_run
from tests.helpers import make_span, present

MIB = 1024 * 1024


def store_of(path: Path, **options: Any) -> rs.InMemoryLightningStore:
    return rs.InMemoryLightningStore(journal=path, **{"durability": "process", **options})


async def long_rollout(store: rs.InMemoryLightningStore, turns: int, *, size: int = 10) -> rs.AttemptedRollout:
    """A rollout whose agent has saved so many turns, and recorded one more."""
    await store.enqueue_rollout("long")
    rollout = present(await store.dequeue_rollout())
    for turn in range(turns):
        span = make_span(rollout, 0, name=f"turn {turn}")
        await store.save_state(rollout.rollout_id, rollout.attempt.attempt_id, [turn, b"x" * size], [span])
    await store.add_unnumbered_spans([make_span(rollout, 0, name="not saved")])
    return rollout


async def assert_goes_on(store: rs.InMemoryLightningStore, rollout_id: str, turns: int) -> rs.AttemptedRollout:
    """The next attempt has the newest state, and the spans until then; `turns` have been saved."""
    following = present(await store.dequeue_rollout())
    assert following.rollout_id == rollout_id and following.attempt.resumed_from is not None
    state = await store.get_saved_state(rollout_id, following.attempt.attempt_id)
    assert state[0] == turns - 1
    spans = await store.query_spans(rollout_id, "latest")
    assert [span.name for span in spans] == [f"turn {turn}" for turn in range(turns)]
    assert {span.attempt_id for span in spans} == {following.attempt.attempt_id}
    return following


@pytest.mark.parametrize("size", [10, 100_000])
async def test_a_store_that_is_started_again_has_the_state(tmp_path: Path, size: int) -> None:
    """With the marks of attempts before, of records alone and of a snapshot."""
    path = tmp_path / "journal"
    store = store_of(path)
    rollout = await long_rollout(store, 3, size=size)
    store.close()
    store = store_of(path)
    second = await assert_goes_on(store, rollout.rollout_id, 3)
    ids = second.rollout_id, second.attempt.attempt_id
    await store.save_state(*ids, [3, b""], [make_span(second, 0, name="turn 3")])
    await store.check()
    store.close()
    directory = Directory(path)
    epoch, number, _ = directory.segments()[-1]
    assert "differs" not in compact(directory, epoch, number)
    run = read_run(path)
    assert run.differences == []
    store = store_of(path)
    third = await assert_goes_on(store, rollout.rollout_id, 4)
    await store.finish_attempt(third.rollout_id, third.attempt.attempt_id, [], "succeeded")
    assert len(await store.query_spans(rollout.rollout_id, rollout.attempt.attempt_id)) == 4
    await store.check()
    store.close()


async def test_spans_of_a_prefix_are_read_from_disk(tmp_path: Path) -> None:
    """Memory is full, and their bodies are in the journal only: they count as the next attempt's nevertheless."""
    store = store_of(
        tmp_path / "journal", eviction_memory_threshold=10_000, safe_memory_threshold=100, max_deliveries=5
    )
    rollout = await long_rollout(store, 40)
    ids = rollout.rollout_id, rollout.attempt.attempt_id
    await store.finish_attempt(*ids, [], "unresponsive", outcome="withdrawn")
    await assert_goes_on(store, rollout.rollout_id, 40)
    (span, *_) = await store.query_spans(rollout.rollout_id, "latest")
    assert span.attributes == {"k": "v"}
    store.close()


async def test_former_states_do_not_stay_on_disk(tmp_path: Path) -> None:
    """A snapshot has the newest one; the records of the spans that were saved with them stay, and are small."""
    path = tmp_path / "journal"
    store = store_of(path, durability="none")
    rollout = await long_rollout(store, 20, size=MIB)
    store.close()
    directory = Directory(path)

    def size() -> int:
        return sum(file.stat().st_size for file in path.iterdir())

    assert size() > 20 * MIB
    epoch, number, _ = directory.segments()[-1]
    assert "differs" not in compact(directory, epoch, number)
    assert size() < 3 * MIB
    store = store_of(path)
    await assert_goes_on(store, rollout.rollout_id, 20)
    store.close()
