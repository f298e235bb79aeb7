"""Pauses and limits of queues in the core: what is handed out, and when."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from raystore.core import pauses
from raystore.core.check import check
from raystore.core.state import Session
from raystore.errors import InvalidValueError, StoreOverloadedError
from tests.core.conftest import Core


def pause(core: Core, session: Session, *queues: str, keep: bool = False) -> Any:
    return core.run("pause_queues", session=session, queues=list(queues) or None, keep=keep)


def resume(core: Core, session: Session, *queues: str, others: bool = False) -> Any:
    return core.run("resume_queues", session=session, queues=list(queues) or None, others=others)


def limit(core: Core, *, queue: str = "default", max_running: int | None = None, per_minute: int | None = None) -> Any:
    return core.run("limit_queue", queue=queue, max_running=max_running, per_minute=per_minute)


def claim(core: Core, session: Session, *queues: str, limit: int = 1) -> list[tuple[str, str]]:
    got = core.run("dequeue", session=session, queues=list(queues) or ["default"], limit=limit, worker_id=None)
    return [(rollout.rollout_id, attempt.attempt_id) for rollout, attempt, _ in got]


def steady(core: Core) -> Session:
    """A session that is never silent."""
    session = core.open("s")
    session.eternal = True
    return session


# -- pauses ------------------------------------------------------------------------------------------------------------


def test_a_paused_queue_is_passed_over(core: Core) -> None:
    """Of several queues the next one is served; a rollout that came during the pause keeps its place."""
    session = core.open("s")
    pause(core, session, "first")
    first = core.enqueue(queue="first")
    second = core.enqueue(queue="second")
    assert [key[0] for key in claim(core, session, "first", "second", limit=5)] == [second]
    assert resume(core, session, "first") == []
    later = core.enqueue(queue="first")
    assert [key[0] for key in claim(core, session, "first", "second", limit=5)] == [first, later]


def test_a_pause_of_all_queues_covers_those_that_come_later(core: Core) -> None:
    """It stays when one queue is resumed by name, since it is no pause of that queue."""
    session = core.open("s")
    pause(core, session)
    core.enqueue(queue="new")
    assert claim(core, session, "new") == []
    assert [row[0] for row in resume(core, session, "new")] == [None]
    assert claim(core, session, "new") == []
    resume(core, session)
    assert len(claim(core, session, "new")) == 1


def test_what_runs_goes_on_during_a_pause(core: Core) -> None:
    """Spans, ends and starts by hand are nothing that is handed out."""
    session = core.open("s")
    rollout_id = core.enqueue()
    other = core.enqueue()
    (key,) = core.hold(session)
    pause(core, session)
    core.report(key, "running", session)
    core.report(key, "succeeded", session)
    assert core.status(rollout_id) == "succeeded"
    core.run("start_attempt", session=session, rollout_id=other, worker_id=None)
    assert core.status(other) == "preparing"


def test_a_pause_ends_with_its_session(core: Core) -> None:
    """However it ends; the work is offered again."""
    for how in ("end", "silence"):
        mine, other = core.open(f"mine {how}"), core.open(f"other {how}")
        core.enqueue()
        pause(core, mine)
        core.state.take_effects()
        if how == "end":
            core.end(mine)
        else:
            core.now += 50
            other.last_heard = core.now
            core.tick(20)
        assert core.state.take_effects().queues == {"default"}
        assert len(claim(core, other)) == 1


def test_a_kept_pause_ends_by_resume_only(core: Core) -> None:
    """Its session may end; anybody may resume it."""
    mine, other = core.open("mine"), core.open("other")
    core.enqueue()
    (row,) = pause(core, mine, "default", keep=True)
    assert row == ("default", "mine", core.now, True)
    core.end(mine)
    assert claim(core, other) == []
    assert resume(core, other) == []
    assert len(claim(core, other)) == 1


def test_a_queue_is_paused_as_long_as_one_session_pauses_it(core: Core) -> None:
    """Each resumes what it has paused; all at once only somebody who asks for that."""
    one, other, operator = core.open("one"), core.open("other"), core.open("operator")
    core.enqueue()
    pause(core, one, "default")
    core.tick(1)
    assert [row[1] for row in pause(core, other, "default")] == ["one", "other"]
    assert [row[1] for row in resume(core, one)] == ["other"]
    assert [row[1] for row in resume(core, operator)] == ["other"]
    assert claim(core, operator) == []
    assert resume(core, operator, others=True) == []
    assert len(claim(core, operator)) == 1


def test_pausing_again_changes_nothing_but_that_it_may_be_kept(core: Core) -> None:
    """One pause for each session and queue, since when it was made first; a kept one stays kept."""
    session = core.open("s")
    first = core.now
    pause(core, session, "default")
    core.tick(5)
    assert pause(core, session, "default") == [("default", "s", first, False)]
    assert pause(core, session, "default", keep=True) == [("default", "s", first, True)]
    assert pause(core, session, "default", keep=True) == [("default", "s", first, True)]
    pause(core, session, "default")
    core.end(session)
    assert pauses.rows(core.state.gates) == [("default", "s", first, True)]


def test_to_resume_what_is_not_paused_is_harmless(core: Core) -> None:
    """Nothing changes, and nothing is said."""
    session = core.open("s")
    before = core.state.changes.last
    assert resume(core, session, "unknown", others=True) == []
    assert core.state.changes.last == before
    assert core.state.take_effects().said == []


def test_there_is_an_end_to_pauses_and_limits(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    """One too many is refused as a whole, and what is there may be changed."""
    monkeypatch.setattr(pauses, "PAUSES", 2)
    monkeypatch.setattr(pauses, "LIMITS", 1)
    session = core.open("s")
    pause(core, session, "a")
    with pytest.raises(StoreOverloadedError):
        pause(core, session, "b", "c")
    assert [row[0] for row in pause(core, session, "a", "b")] == ["a", "b"]
    limit(core, queue="a", max_running=1)
    with pytest.raises(StoreOverloadedError):
        limit(core, queue="b", max_running=1)
    limit(core, queue="b")  # no limit is none more
    assert limit(core, queue="a", max_running=2)[1] == 2


def test_suspects_wait_through_a_pause(core: Core) -> None:
    """Nobody is kept free for a suspect of a queue that hands out nothing."""
    lost, other = core.open("lost"), core.open("other")
    core.enqueue()
    core.enqueue()
    core.hold(lost, 2)
    core.end(lost)
    free = core.enqueue(queue="free")
    pause(core, other, "default")
    assert [key[0] for key in claim(core, other, "default", "free", limit=3)] == [free]
    assert other.reserved_since is None
    resume(core, other)
    assert claim(core, other, "default", "free") == []  # it is drained for them now
    assert other.reserved_since is not None


# -- how much runs -----------------------------------------------------------------------------------------------------


def test_no_more_run_than_may(core: Core) -> None:
    """Within one claim of many, too; an end makes room for one."""
    session = core.open("s")
    core.enqueue()
    for _ in range(4):
        core.enqueue()
    (running,) = core.hold(session)  # before there is a limit
    assert limit(core, max_running=3)[3:] == (1, None)
    more = claim(core, session, limit=5)
    assert len(more) == 2
    assert limit(core, max_running=3)[3:] == (3, "max_running")
    core.state.take_effects()
    core.report(running, "succeeded", session)
    assert core.state.take_effects().queues == {"default"}
    assert len(claim(core, session, limit=5)) == 1
    assert limit(core)[3:] == (3, None)
    assert len(claim(core, session, limit=5)) == 1


ENDS: dict[str, Callable[[Core, Session, tuple[str, str]], Any]] = {
    "success": lambda core, session, key: core.report(key, "succeeded", session),
    "retry": lambda core, session, key: core.report(key, "timeout", session),
    "timeout": lambda core, session, key: core.tick(31),
    "cancel": lambda core, session, key: core.run(
        "cancel_rollouts", rollout_ids=[key[0]], group_id=None, tags=None
    ),
    "by hand": lambda core, session, key: core.run(
        "update_rollout", rollout_id=key[0], changes={"status": "failed"}
    ),
    "deletion": lambda core, session, key: core.run("delete_rollouts", rollout_ids=[key[0]]),
    "decline": lambda core, session, key: core.decline(session, key),
    "unacknowledged": lambda core, session, key: core.tick(6),
    "lost": lambda core, session, key: core.end(session),
}  # fmt: skip


@pytest.mark.parametrize("how", ENDS)
def test_every_end_of_an_attempt_frees_its_place(core: Core, how: str) -> None:
    """Whoever waits is offered the place, and no place is lost."""
    session, other = core.open("s"), core.open("other")
    core.enqueue(config=[30.0, None, 3, ["timeout"]])
    core.enqueue()
    limit(core, max_running=1)
    (key,) = claim(core, session)
    if how not in ("decline", "unacknowledged"):
        core.acknowledge(session, [key])
    core.state.take_effects()
    ENDS[how](core, session, key)
    check(core.state)
    assert core.state.take_effects().queues == {"default"}
    other.last_heard = core.now
    assert len(claim(core, other, limit=5)) == 1


def test_what_starts_by_hand_counts_and_is_not_refused(core: Core) -> None:
    """A started rollout takes a place; so does one that a late span brings back."""
    session = core.open("s")
    limit(core, max_running=1)
    late = core.enqueue(config=[None, 5.0, 3, ["unresponsive"]])
    (key,) = core.hold(session)
    core.tick(6)
    assert core.status(late) == "requeuing"
    core.run("start_rollout", session=session, request={"input": b"x", "metadata": None}, worker_id=None)
    assert claim(core, session) == []
    row = [-1, "s", "t", None, "n", None, None, None, b"\x01", -1]
    core.run("add_spans", session=session, rollout_id=key[0], attempt_id=key[1], spans=[row])
    assert core.status(late) == "running"
    assert limit(core, max_running=1)[3:] == (2, "max_running")


# -- how much starts ---------------------------------------------------------------------------------------------------


def test_any_minute_has_so_many_claims_at_most(core: Core) -> None:
    """The window slides: each claim makes room a minute after it, and not at the full minute."""
    session = steady(core)
    for _ in range(10):
        core.enqueue()
    limit(core, per_minute=2)
    assert len(claim(core, session)) == 1
    core.tick(40)
    assert len(claim(core, session, limit=5)) == 1
    core.tick(20)
    assert claim(core, session) == []  # a full minute is one in which it would be the third
    core.state.take_effects()
    core.tick(0.5)
    assert core.state.take_effects().queues == {"default"}
    assert len(claim(core, session, limit=5)) == 1
    core.tick(40)
    assert len(claim(core, session, limit=5)) == 1
    core.tick(61)
    assert len(claim(core, session, limit=5)) == 2


def test_a_changed_rate_knows_the_claims_of_the_last_minute(core: Core) -> None:
    """A lower one counts them, a higher one allows the difference; without one nothing is counted."""
    session = steady(core)
    for _ in range(20):
        core.enqueue()
    limit(core, per_minute=4)
    assert len(claim(core, session, limit=9)) == 4
    assert limit(core, per_minute=2)[4] == "per_minute"
    core.tick(30)
    assert limit(core, per_minute=4)[4] == "per_minute"
    assert limit(core, per_minute=6)[4] is None
    assert len(claim(core, session, limit=9)) == 2
    core.tick(31)
    assert limit(core, per_minute=2)[4] == "per_minute"
    core.tick(30)
    assert len(claim(core, session, limit=9)) == 2
    assert limit(core, max_running=100)[4] is None
    assert len(claim(core, session, limit=9)) == 9
    assert limit(core, per_minute=1)[4] is None


def test_a_claim_that_was_taken_back_counts(core: Core) -> None:
    """Its caller may have begun: the rate is never exceeded, whatever became of the claims."""
    session = steady(core)
    core.enqueue()
    limit(core, per_minute=1)
    (key,) = claim(core, session)
    assert core.decline(session, key)
    assert claim(core, session) == []
    core.tick(61)
    assert len(claim(core, session)) == 1


def test_a_limit_of_one_queue_leaves_the_others_alone(core: Core) -> None:
    """Of several queues the next one is served."""
    session = steady(core)
    for queue in ("slow", "slow", "fast"):
        core.enqueue(queue=queue)
    limit(core, queue="slow", max_running=1, per_minute=5)
    assert len(claim(core, session, "slow", "fast", limit=3)) == 2
    core.enqueue(queue="fast")
    assert len(claim(core, session, "slow", "fast", limit=3)) == 1


@pytest.mark.parametrize("wrong", [{"max_running": 0}, {"per_minute": 0}, {"per_minute": 100_001}, {"queue": ""}])
def test_a_wrong_limit_changes_nothing(core: Core, wrong: dict[str, Any]) -> None:
    """It is refused by name, and what was set stays."""
    limit(core, max_running=1, per_minute=1)
    before = core.state.gates.shown()
    with pytest.raises(InvalidValueError, match=next(iter(wrong))):
        limit(core, **wrong)
    assert core.state.gates.shown() == before
