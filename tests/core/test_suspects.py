"""Rollouts that may end their processes: who gets them, when, and who is to blame for what is lost together."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest

from raystore.core import check, expiry
from raystore.core.claims import JOB_ENDED, end_session
from raystore.core.queues import OVERDUE
from raystore.core.state import CLAIM_SECONDS
from tests.core.conftest import Core

PATIENCE = 10.0


def ids(keys: list[tuple[str, str]]) -> list[Any]:
    return [rollout_id for rollout_id, _ in keys]


def a_suspect(core: Core, task: str = "suspect") -> Any:
    """A rollout that was lost with its process once."""
    dying = core.open(f"dying of {task}")
    request = {"input": task.encode(), "metadata": None}
    made, _ = core.run("start_rollout", session=dying, request=request, worker_id=None)
    core.end(dying)
    assert core.state.entries[made.rollout_id].suspect
    return made.rollout_id


def a_busy_session(core: Core, name: str = "busy") -> Any:
    """A session that runs something, and goes on with it."""
    session = core.open(name)
    core.enqueue("long")
    core.hold(session)
    return session


def test_the_second_withdrawn_claim_makes_a_suspect(core: Core) -> None:
    """Whoever dies before it acknowledges may have died of the work, but twice is no chance."""
    first, second = core.open("a"), core.open("b")
    made = core.enqueue()
    for session, is_suspect in ((first, False), (second, True)):
        core.claim(session)
        core.tick(CLAIM_SECONDS + 0.1)
        entry = core.state.entries[made]
        assert (entry.suspect, entry.withdrawals > 0, core.status(made)) == (is_suspect, True, "queuing")
    assert entry.deliveries == 0 and core.outcomes(made) == []


def test_a_suspect_waits_for_an_idle_session_for_so_long_and_no_longer(core: Core) -> None:
    """Then any caller that lives gets it, at its old place, be it as busy as it may."""
    busy = a_busy_session(core)
    suspect = a_suspect(core)
    later = core.enqueue("later")
    core.tick(PATIENCE - 1)
    assert core.claim(busy) == []  # it is drained
    core.tick(1.5)
    assert "default" in core.state.effects.queues  # so that whoever waits is looked at
    assert ids(core.claim(busy, 2)) == [suspect, later]


def test_an_idle_session_has_a_suspect_at_once_and_takes_nothing_else_for_so_long(core: Core) -> None:
    """It runs alone, so that a loss tells; but one that runs for hours does not keep the other places empty."""
    idle = core.open("idle")
    suspect = a_suspect(core)
    later = core.enqueue("later")
    assert ids(core.hold(idle, 5)) == [suspect]
    core.tick(PATIENCE - 1)
    assert core.claim(idle) == []
    core.state.take_effects()
    core.tick(1.5)
    assert "default" in core.state.effects.queues
    assert ids(core.claim(idle)) == [later]


def test_no_session_is_drained_for_longer_however_many_suspects_come(core: Core) -> None:
    """Others that come meanwhile do not begin its time anew; and it is served until it was idle."""
    busy = a_busy_session(core)
    first = a_suspect(core, "first")
    assert core.claim(busy) == []
    core.tick(PATIENCE - 1)
    a_suspect(core, "second")
    plain = core.enqueue("plain")
    assert core.claim(busy) == []
    core.tick(1.5)
    assert set(ids(core.hold(busy, 2))) == {first, plain}
    core.tick(1)
    third = core.enqueue("third")
    assert ids(core.hold(busy)) == [third]  # the second suspect waits on


def test_a_drain_ends_with_the_last_suspect(core: Core) -> None:
    """It was for nothing: somebody else fell idle sooner."""
    busy, idle = a_busy_session(core), core.open("idle")
    suspect = a_suspect(core)
    later = core.enqueue("later")
    assert core.claim(busy) == []
    assert ids(core.hold(idle)) == [suspect]
    assert ids(core.claim(busy)) == [later]


def test_without_patience_nobody_waits(make_core: Callable[..., Core]) -> None:
    """A store whose processes run one thing each has no use for it."""
    core = make_core(suspect_patience_seconds=0.0)
    busy = a_busy_session(core)
    suspect = a_suspect(core)
    core.tick(0.001)
    assert ids(core.claim(busy)) == [suspect]


def lose_together(core: Core, *rollout_ids: Any) -> None:
    """One process has all of these, and ends."""
    session = core.open(f"session {core.seed}")
    for rollout_id in rollout_ids:
        core.run("start_attempt", session=session, rollout_id=rollout_id, worker_id=None)
    core.end(session)


def test_what_was_lost_most_often_is_to_blame(core: Core) -> None:
    """Of what is lost together one is charged at most: a tie charges nobody."""
    one, other, fresh = core.enqueue("one"), core.enqueue("other"), core.enqueue("fresh")

    def charged() -> list[Any]:
        return [core.state.entries[i].deliveries for i in (one, other, fresh)]

    lose_together(core, one, other)
    assert charged() == [0, 0, 0]
    lose_together(core, one)
    assert charged() == [1, 0, 0]
    lose_together(core, other, one)
    assert charged() == [2, 0, 0]
    lose_together(core, fresh, other)
    assert charged() == [2, 1, 0]
    lose_together(core, one, other)  # as often as each other by now
    assert charged() == [2, 1, 0]


def test_a_claim_that_was_lost_most_often_is_not_charged(core: Core) -> None:
    """Nobody acknowledged it; what was lost beside it is not to blame either."""
    suspect = a_suspect(core)
    session = core.open("a")
    core.claim(session)
    plain = core.enqueue("plain")
    core.run("start_attempt", session=session, rollout_id=plain, worker_id=None)
    core.end(session)
    assert [core.state.entries[i].deliveries for i in (suspect, plain)] == [1, 0]  # of its first loss, alone


@pytest.mark.parametrize("is_known", [False, True])
def test_what_a_stopped_job_held_is_withdrawn(core: Core, is_known: bool) -> None:
    """It waits at its old place, neither charged nor suspected, whether its claim was acknowledged or not."""
    session = core.open("a")
    held, claimed, later = (core.enqueue(task) for task in ("held", "claimed", "later"))
    keys = core.hold(session)
    if is_known:
        core.report(keys[0], "running", session)
    core.claim(session)
    end_session(core.state, core.step(), session, why=JOB_ENDED)
    entries = [core.state.entries[i] for i in (held, claimed)]
    assert [entry.rollout.status for entry in entries] == ["requeuing", "queuing"]
    assert [(e.deliveries, e.suspect, e.losses, e.withdrawals) for e in entries] == [(0, False, 0, 0)] * 2
    assert core.outcomes(held) == ["withdrawn"] and core.outcomes(claimed) == []
    assert ids(core.hold(core.open("b"), 3)) == [held, claimed, later]
    assert entries[0].charged == 1  # the one that runs


def test_a_pause_is_nobodys_patience(core: Core) -> None:
    """A store that stood still could serve nobody: what waits goes on waiting."""

    busy = a_busy_session(core)
    suspect = a_suspect(core)
    assert core.claim(busy) == []
    core.now += 60
    expiry.pause(core.state, core.step(), 60)
    core.tick(PATIENCE - 1)
    assert core.claim(busy) == []
    core.tick(1.5)
    assert ids(core.claim(busy)) == [suspect]


class Crowd:
    """Sessions that claim, work and die at random, some of what they run being poison."""

    def __init__(self, core: Core, seed: int, *, places: int = 3, processes: int = 3) -> None:
        self.core, self.lots, self.places = core, random.Random(seed), places
        self.names = (f"p{number}" for number in itertools.count())
        self.sessions = [core.open(next(self.names)) for _ in range(processes)]
        self.poison: set[str] = set()
        self.empty_since: dict[str, float] = {}

    def turn(self, *, kills: float = 0.0, never_idle: bool = False) -> None:
        """A second passes."""
        core = self.core
        core.tick(1.0)
        for number, session in enumerate(self.sessions):
            session.last_heard = core.now
            if any(rollout_id in self.poison for rollout_id, _ in session.held) or self.lots.random() < kills:
                core.end(session)
                self.empty_since.pop(session.session_id, None)
                self.sessions[number] = session = core.open(next(self.names))
                if never_idle:  # it does something else from its first moment on
                    core.run(
                        "start_rollout", session=session, request={"input": b"s", "metadata": None}, worker_id=None
                    )
            own = 1 if never_idle else 0
            for key in list(session.held)[own:]:
                if self.lots.random() < 0.3:
                    core.report(key, "succeeded", session)
            while len(session.held) < self.places:
                if not core.hold(session):
                    self.came_away_empty(session)
                    break
                self.empty_since.pop(session.session_id, None)
        check.check(core.state)

    def came_away_empty(self, session: Any) -> None:
        """A call is parked only while nothing it may claim is queued: no exception but the patience."""
        queues = self.core.state.queues
        assert queues.first(["default"], (OVERDUE,)) is None, "what has waited for long enough is for anybody"
        if queues.first(["default"]) is None:
            self.empty_since.pop(session.session_id, None)
            return
        since = self.empty_since.setdefault(session.session_id, self.core.now)
        assert self.core.now - since <= PATIENCE, "a live caller waits, and there is work"


@pytest.mark.parametrize("seed", range(20))
def test_a_live_caller_never_waits_longer_than_the_patience(core: Core, seed: int) -> None:
    """Whatever dies around it, and however many suspects there are."""
    crowd = Crowd(core, seed)
    for number in range(120):
        if crowd.lots.random() < 0.7:
            core.enqueue(str(number), priority=crowd.lots.randrange(2))
        crowd.turn(kills=0.08)


@pytest.mark.parametrize("never_idle", [False, True])
@pytest.mark.parametrize("seed", range(10))
def test_poison_ends_and_its_neighbours_do_not(core: Core, seed: int, never_idle: bool) -> None:
    """Also where no session ever falls idle; what only stood beside it is done in the end."""
    crowd = Crowd(core, seed)
    if never_idle:
        for session in crowd.sessions:
            core.run("start_rollout", session=session, request={"input": b"s", "metadata": None}, worker_id=None)
    innocent = [core.enqueue(str(number)) for number in range(10)]
    poison = [core.enqueue("poison") for _ in range(2)]
    innocent += [core.enqueue(str(number)) for number in range(10)]
    crowd.poison.update(poison)
    for number in range(400):
        if number % 3 == 0 and number < 200:
            innocent.append(core.enqueue("more"))
        crowd.turn(never_idle=never_idle)
    assert [core.status(i) for i in poison] == ["failed"] * 2
    assert {core.status(i) for i in innocent} == {"succeeded"}
