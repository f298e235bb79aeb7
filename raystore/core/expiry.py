"""Deadlines: attempts that time out or fall silent, backoffs, groups, claims and sessions, what retention deletes.

Before every operation the service calls `due`, which finds the deadlines that have passed, and `advance`, which applies
them. So no answer shows an attempt that runs past its deadline. The cost depends on how many deadlines have passed, not
on the size of the store. If there are many, a slice of them is applied, and always those of the rollouts that the
operation names. A journal records what `due` found, so that a replay applies the same.
Not here: how a deadline is computed (`state`), the clock and its alarm (`service.clock`), when the alarm is set
(`service.service`), calls whose timeout is over (`service.parking`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from raystore.core import claims, feeds, groups, pauses, retention
from raystore.core.attempts import settle
from raystore.core.claims import end_session, offer_to_anybody
from raystore.core.lifecycle import ACTIVE, OUTCOME_OF_EVENT, SILENCE, TIMEOUT
from raystore.core.rollouts import end_backoff
from raystore.core.state import Entry, HandedKey, State, Step

SLICE = 1_000  #: deadlines worked off in one step


@dataclass(slots=True)
class Due:
    """What is due at one instant, by name: found by whoever has a clock, worked off by `advance`."""

    expired: list[str]  # rollouts whose latest attempt timed out or fell silent, or that have backed off long enough
    withdrawn: list[tuple[str, HandedKey]]  # claims and batches, with their sessions
    silent: list[str]  # sessions that have ended
    forgotten: list[str]  # sessions that ended long ago
    deleted: list[str]  # rollouts that the retention rule lets go
    impatient: list[str] = field(default_factory=list)  # suspects that have waited for an idle session long enough
    released: list[str] = field(default_factory=list)  # sessions that have taken nothing for a suspect long enough
    overdue: list[str] = field(default_factory=list)  # groups whose deadline has passed
    allowed: list[str] = field(default_factory=list)  # queues whose rate allows another claim

    def __bool__(self) -> bool:
        return any(getattr(self, name) for name in self.__slots__)

    def lists(self) -> list[list[Any]]:
        """All of it, in the order of the fields."""
        return [getattr(self, name) for name in self.__slots__]


def due(state: State, step: Step, named: Iterable[str] = ()) -> Due:
    """What is due, up to a slice of each kind, and of the rollouts that are named in any case."""
    active_now = step.now - state.paused
    expired = list(state.deadlines.due(active_now, SLICE))
    if len(expired) == SLICE:
        known = set(expired)
        expired += [i for i in dict.fromkeys(named) if i not in known and _is_due(state, i, active_now)]
    withdrawn = list(state.claim_deadlines.due(step.age, SLICE))
    sessions = list(state.session_deadlines.due(step.age, SLICE))
    ended = {session_id for session_id in sessions if state.sessions[session_id].ended_at is not None}
    impatient = list(state.patience_deadlines.due(step.age, SLICE))
    return Due(
        expired,
        withdrawn,
        [session_id for session_id in sessions if session_id not in ended],
        [session_id for session_id in sessions if session_id in ended],
        retention.due(state, step.now, SLICE),
        [name for is_session, name in impatient if not is_session],
        [name for is_session, name in impatient if is_session],
        list(state.group_deadlines.due(active_now, SLICE)),
        list(state.gates.deadlines.due(step.now, SLICE)),
    )


def advance(
    state: State,
    step: Step,
    due: Due,
    *,
    take_back: Callable[..., Any] = claims.take_back,
    end_session: Callable[..., Any] = claims.end_session,
) -> None:
    """Work off what is due. An earlier format has other rules for claims and sessions."""
    active_now = step.now - state.paused
    for rollout_id in due.expired:
        expire(state, step, state.entries[rollout_id], active_now)
    for session_id, key in due.withdrawn:
        take_back(state, step, state.sessions[session_id], key, why="withdrawn")
    for session_id in due.silent:
        end_session(state, step, state.sessions[session_id], why="silence")
    for session_id in due.forgotten:
        forget_session(state, session_id)
    groups.end_overdue(state, step, due.overdue)
    retention.delete(state, step, rollout_ids=due.deleted)
    for rollout_id in due.impatient:
        offer_to_anybody(state, rollout_id)
    if due.released:  # what they wait for may have been there all the while
        state.offer_all()
    if due.allowed:
        pauses.allow(state, step, due.allowed)


def _is_due(state: State, rollout_id: str, active_now: float) -> bool:
    deadline = state.deadlines.deadline_of(rollout_id)
    return deadline is not None and active_now > deadline


def expire(state: State, step: Step, entry: Entry, active_now: float) -> None:
    """The latest attempt of a rollout timed out or fell silent, or the backoff of the rollout is over."""
    if state.queues.backs_off_until(entry.rollout.rollout_id) is not None:
        end_backoff(state, step, entry)
        return
    timeout = entry.rollout.config.timeout_seconds
    timed_out = timeout is not None and active_now - entry.clocks[-1].start > timeout
    latest = entry.attempts[-1]
    event = TIMEOUT if timed_out else SILENCE
    state.notify(entry, latest.attempt_id, OUTCOME_OF_EVENT[event])
    settle(state, step, entry, event)


def forget_session(state: State, session_id: str) -> None:
    """Drop the record of a session that has ended."""
    if state.sessions.pop(session_id, None) is not None:
        state.ended_sessions.pop(session_id, None)
        state.session_deadlines.pop(session_id, None)


def surplus(state: State) -> Due:
    """The sessions that ended first, beyond those that are kept."""
    count = max(len(state.ended_sessions) - claims.ENDED_SESSIONS, 0)
    return Due([], [], [], list(islice(state.ended_sessions, count)), [])


def pause(state: State, step: Step, seconds: float) -> None:
    """The store stood still: deadlines, claims and sessions move by so much, since nobody could have met them."""
    state.paused += seconds
    for session in state.sessions.values():
        session.last_heard += seconds
        for key in session.claims:
            session.claims[key] += seconds
        for batch, since in session.batches.items():
            session.batches[batch] = None if since is None else since + seconds
        if session.reserved_since is not None:
            session.reserved_since += seconds
    for rollout_id in state.suspects:
        state.suspects[rollout_id] += seconds
    state.changes.append(step.now, "paused", seconds=seconds)


def resume(state: State, step: Step, away: float) -> None:
    """Another process goes on with the store: nobody could be heard meanwhile, so everybody gets a full period."""
    state.paused += away
    for session_id, session in list(state.sessions.items()):
        session.last_heard = step.age
        session.claims = dict.fromkeys(session.claims, step.age)
        session.batches = {batch: None if s is None else step.age for batch, s in session.batches.items()}
        session.reserved_since = None if session.reserved_since is None else step.age
        if session.eternal:  # the process that ran the store itself
            end_session(state, step, session, why="ended with its store")
            forget_session(state, session_id)
    for status in ACTIVE:
        for rollout_id in state.indexes.find(("status", status)):
            entry = state.entries[rollout_id]
            if entry.clocks:  # none, if its status was set by hand
                entry.clocks[-1].beat = step.now - state.paused
            state.deadlines.guard(rollout_id)
    state.suspects = dict.fromkeys(state.suspects, step.age)
    state.guard_backoffs()
    state.guard_groups()
    state.guard_sessions()
    feeds.settle(state, step)
    state.changes.append(step.now, "resumed", seconds=away)


def next_deadline(state: State) -> float | None:
    """When `advance` will next have something to do for rollouts and groups, on the store's clock."""
    found = (deadlines.next() for deadlines in (state.deadlines, state.group_deadlines))
    deadline = min((deadline for deadline in found if deadline is not None), default=None)
    return None if deadline is None else deadline + state.paused


def next_age_deadline(state: State) -> float | None:
    """The same for claims and sessions, on the clock by which they age."""
    ages = [
        deadlines.next() for deadlines in (state.claim_deadlines, state.session_deadlines, state.patience_deadlines)
    ]
    return min((age for age in ages if age is not None), default=None)
