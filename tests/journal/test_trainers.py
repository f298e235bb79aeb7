"""What consumers await, hold and have consumed, over restarts: of a store that ends, and of journals of format 1."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

import raystore as rs
from raystore.core.check import check
from tests.journal.test_golden import GOLDEN
from tests.journal.test_resume import assert_same


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the journal is."""
    return tmp_path / "journal"


def open_store(path: Any, **options: Any) -> rs.InMemoryLightningStore:
    return rs.InMemoryLightningStore(journal=path, clock="manual", **options)


def finish(
    store: rs.InMemoryLightningStore,
    count: int,
    status: rs.AttemptStatus = "succeeded",
    mode: rs.RolloutMode | None = None,
) -> list[Any]:
    done = []
    for _ in range(count):
        made = store.sync.start_rollout("x", mode)
        store.sync.update_attempt(made.rollout_id, "latest", status=status)
        done.append(made.rollout_id)
    return done


def ids(batch: rs.Batch) -> list[Any]:
    return [rollout.rollout_id for rollout in batch.rollouts]


def test_a_trainer_goes_on_after_a_restart_of_its_store(path: Path) -> None:
    """Held batches come again first, in their order; filters, steps and what was forgotten stay what they were."""
    named = {"consumers": {"named": {"mode": "val"}, "gone": None}}
    with open_store(path, **named) as store:
        done, val = finish(store, 5, mode="train"), finish(store, 1, mode="val")
        store.sync.ack(store.sync.take(1, consumer="t", mode="train"), step=1)
        held = [store.sync.take(1, consumer="t", max_open=2) for _ in range(2)]
        assert [ids(batch) for batch in held] == [done[1:2], done[2:3]]
        assert store.sync.forget_consumer("gone") == 6
        state = store._service.state
        check(state)
        before = store.sync.statistics()["consumers"]
    assert_same(state, path)
    with open_store(path, **named) as store:
        after = store.sync.statistics()["consumers"]
        assert "gone" not in after  # though it is named again
        assert after["t"]["open"] == [b | {"session": None} for b in before["t"]["open"]]
        assert [after[name]["filter"] for name in ("t", "named")] == [before[name]["filter"] for name in ("t", "named")]
        again = [store.sync.take(1, consumer="t", max_open=2) for _ in range(2)]
        assert [(ids(b), b.number) for b in again] == [(ids(b), b.number) for b in held]
        with pytest.raises(rs.BatchHeldError, match="this process"):
            store.sync.take(1, consumer="t", max_open=2)
        with pytest.raises(rs.ConsumerFilterError):
            store.sync.take(1, consumer="named", mode="train")
        assert ids(store.sync.take(5, consumer="named")) == val
        assert store.sync.rewind("t", 0) == 3
        assert ids(store.sync.take(9, consumer="t")) == done
        check(store._service.state)
        state = store._service.state
    assert_same(state, path)


def test_a_store_that_starts_with_another_filter_keeps_what_that_awaits(path: Path) -> None:
    """The option wins: it is said anew; what was consumed stays consumed."""
    with open_store(path, consumers={"t": {"mode": "train"}}) as store:
        train, val = finish(store, 2, mode="train"), finish(store, 1, mode="val")
        store.sync.ack(store.sync.take(1, consumer="t"), step=1)
    with open_store(path, consumers={"t": {"status_in": ["succeeded"]}}) as store:
        assert ids(store.sync.take(9, consumer="t")) == train[1:] + val
        check(store._service.state)


def test_a_batch_that_was_held_in_format_1_comes_again(tmp_path: Path) -> None:
    """And failed ones, which were taken then, may be asked for."""
    with tarfile.open(GOLDEN / "format-1" / "open-batches.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    path = tmp_path / "open-batches"
    told = json.loads((path / "facts.json").read_text())["consumers"]
    (path / "facts.json").unlink()
    with rs.InMemoryLightningStore(journal=path, resume="must") as store:
        check(store._service.state)
        known = store.sync.statistics()["consumers"]
        for name, (_, _, is_open, batches, _, _) in told.items():
            assert known[name]["filter"] is None
            if is_open:
                batch = store.sync.take(1, consumer=name, status_in=["failed", "succeeded"])
                assert (batch.number, ids(batch)) == (is_open[0], dict(batches)[is_open[0]])
        check(store._service.state)
    with rs.InMemoryLightningStore(journal=path, resume="must") as store:
        check(store._service.state)
