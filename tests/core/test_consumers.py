"""Whose a batch is: handed over like a claim, left behind by a session that ends, taken over by another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from raystore.core import retention, training
from raystore.core.state import CLAIM_SECONDS, Session
from raystore.core.training import COMING, WANTED, eviction_class
from raystore.errors import BatchConflictError, BatchHeldError
from tests.core.conftest import Core


def finish(core: Core, count: int = 1, status: str = "succeeded", **request: Any) -> list[Any]:
    """Ids of finished rollouts."""
    done = [core.enqueue(**request) for _ in range(count)]
    for rollout_id in done:
        core.run("update_rollout", rollout_id=rollout_id, changes={"status": status})
    return done


def take(core: Core, session: Session, count: int = 9, **more: Any) -> tuple[list[str], int]:
    pairs, number = core.run("take", session=session, consumer="t", count=count, **more)
    return [rollout.rollout_id for rollout, _ in pairs], number


def test_a_batch_of_an_ended_session_comes_again_before_anything_else(core: Core) -> None:
    """In its order, under its number, to whoever asks next; then what is new."""
    done, (one, two) = finish(core, 4), (core.open("one"), core.open("two"))
    assert take(core, one, 2, max_open=2) == (done[:2], 1)
    assert take(core, one, 1, max_open=2) == (done[2:3], 2)
    assert core.acknowledge(one, [("t", 1), ("t", 2)]) == []
    with pytest.raises(BatchHeldError, match="taken by session one"):
        take(core, two, max_open=2)
    core.end(one)
    assert [b["session"] for b in training.describe(core.state)["t"]["open"]] == [None, None]
    assert take(core, two, 9) == (done[:2], 1)
    assert take(core, two, 9, max_open=3) == (done[2:3], 2)
    assert take(core, two, 9, max_open=3) == (done[3:], 3)


def test_who_was_only_silent_has_no_say_in_a_batch_that_another_took_over(core: Core) -> None:
    """Else both would train on it. As long as nobody took it, its word still counts."""
    done, (one, two) = finish(core, 2), (core.open("one"), core.open("two"))
    take(core, one, 1)
    core.end(one)
    back = core.open("one, again")
    core.run("ack", session=back, consumer="t", batch=1, at_step=1, note=None)
    take(core, back, 1)
    core.end(back)
    assert take(core, two) == (done[1:], 2)
    third = core.open("one, once more")
    for verb, more in (("ack", {"at_step": 2, "note": None}), ("nack", {})):
        with pytest.raises(BatchConflictError, match="taken over by session two"):
            core.run(verb, session=third, consumer="t", batch=2, **more)
    core.run("ack", session=two, consumer="t", batch=2, at_step=2, note=None)


def test_a_batch_that_is_not_acknowledged_comes_to_the_next(core: Core) -> None:
    """Its caller may be gone; one that was only slow has it again if nobody took it, and is told if somebody did."""
    done, (one, two) = finish(core, 2), (core.open("one"), core.open("two"))
    take(core, one, 1)
    core.tick(CLAIM_SECONDS - 1)
    with pytest.raises(BatchHeldError):
        take(core, two, 1)
    core.tick(2)
    assert core.acknowledge(one, [("t", 1)]) == []  # late, and nobody minded
    with pytest.raises(BatchHeldError):
        take(core, two, 1)
    core.run("nack", session=one, consumer="t", batch=1)
    assert take(core, one, 1) == (done[:1], 2)
    core.tick(CLAIM_SECONDS + 1)
    assert take(core, two, 1) == (done[:1], 2)
    assert core.acknowledge(one, [("t", 2)]) == [("t", 2)]
    assert core.acknowledge(two, [("t", 2)]) == []
    core.tick(30)
    with pytest.raises(BatchHeldError):
        take(core, core.open("three"), 1)


def test_an_acknowledged_batch_is_its_sessions_for_as_long_as_that_lives(core: Core) -> None:
    """A step of training may take hours."""
    finish(core, 1)
    session = core.open("one")
    take(core, session)
    core.acknowledge(session, [("t", 1)])
    for _ in range(100):
        core.tick(50)
        session.last_heard = core.now
    core.run("ack", session=session, consumer="t", batch=1, at_step=1, note=None)
    assert session.batches == {}


def test_a_declined_batch_comes_again_first(core: Core) -> None:
    """The caller of a take had gone when its answer came."""
    done, session = finish(core, 2), core.open("one")
    take(core, session, 1)
    assert core.decline(session, ("t", 1))
    assert not core.decline(session, ("t", 1))
    assert take(core, session) == (done, 2)


def test_what_was_dropped_is_awaited_by_nobody(core: Core) -> None:
    """Unless somebody says by hand that it failed like any other."""
    rollout_id, session = core.enqueue(), core.open("one")
    core.run("checkpoint", consumer="t", at_step=0)
    (key,) = core.hold(session)
    core.finish(key, "failed", "dropped", session)
    assert training.describe(core.state)["t"]["awaited"] == 0
    core.report(key, "failed", session)
    assert take(core, session, status_in=["failed"])[0] == [rollout_id]


def test_a_mode_that_is_set_later_counts(core: Core) -> None:
    """For what is awaited, and for what may still come."""
    rollout_id, other, session = core.enqueue(mode="val"), core.enqueue(mode="train"), core.open("one")
    assert core.run("take", session=session, consumer="t", count=1, mode="train", timeout=5.0) is None
    known = core.state.consumers["t"]
    assert training.may_still_come(core.state, known)
    core.run("update_rollout", rollout_id=other, changes={"mode": "val"})
    assert not training.may_still_come(core.state, known)
    core.run("update_rollout", rollout_id=rollout_id, changes={"status": "succeeded"})
    core.run("update_rollout", rollout_id=rollout_id, changes={"mode": "train"})
    assert take(core, session)[0] == [rollout_id]


def test_what_will_be_awaited_goes_only_if_memory_is_in_danger(
    make_core: Callable[..., Core], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What runs for a consumer stays beyond the threshold, as far as one call may bring."""
    monkeypatch.setattr(retention, "DANGER_BYTES", 20_000)
    core = make_core(eviction_bytes=10_000, safe_bytes=8_000, spans_only=True)
    core.run("checkpoint", consumer="t", at_step=0)
    session, ids = core.open("one"), [core.enqueue() for _ in range(40)]
    keys = core.hold(session, 40)
    for number, (rollout_id, attempt_id) in enumerate(keys):
        row = [-1, f"s{number}", "t", None, "n", None, None, None, b"\x01" * 10, 1_000]
        core.run("add_spans", session=session, rollout_id=rollout_id, attempt_id=attempt_id, spans=[row])
        assert eviction_class(core.state, core.state.entries[rollout_id]) == COMING or number > 29
        assert len(core.state.spans.evicted) == max(number + 1 - 30, 0)
    core.report(keys[35], "succeeded", session)
    assert eviction_class(core.state, core.state.entries[keys[35][0]]) == WANTED
    assert core.state.memory_full and core.state.waits_for == "t"
    assert len(ids) == 40
