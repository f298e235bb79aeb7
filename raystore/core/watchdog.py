"""What time does: attempts that time out or fall silent, claims and sessions that age, retention.

`advance` opens every step, so that what a caller sees is never older than its call; it costs what has expired, not what
exists. Many at once are worked off in slices, and a verb first settles the rollouts it names.
Not here: reading a clock, being called when nobody calls (`service` arms one timer at `next_deadline`).
"""

from __future__ import annotations

from collections.abc import Iterable

from raystore.core import retention
from raystore.core.attempts import settle
from raystore.core.claims import advance_sessions
from raystore.core.lifecycle import SILENCE, TIMEOUT
from raystore.core.state import Entry, State, Step

SLICE = 1_000  #: deadlines worked off in one step


def may_be_due(state: State, step: Step) -> bool:
    """Whether `advance` may have something to do; answers quickly, since every operation asks."""
    return (
        state.deadlines.soonest < step.now - state.paused
        or state.claim_deadlines.soonest < step.age
        or state.session_deadlines.soonest < step.age
        or state.settings.retention_seconds is not None
        or state.settings.retention_count is not None
    )


def advance(state: State, step: Step, named: Iterable[str] = ()) -> bool:
    """Work off what is due; whether anything changed."""
    active_now = step.now - state.paused
    changed = False
    left = SLICE
    for rollout_id in state.deadlines.due(active_now, SLICE):
        _expire(state, step, state.entries[rollout_id], active_now)
        changed = True
        left -= 1
    if left == 0:
        for rollout_id in named:
            entry = state.entries.get(rollout_id)
            if entry is not None and _is_due(state, rollout_id, active_now):
                _expire(state, step, entry, active_now)
    if advance_sessions(state, step, SLICE):
        changed = True
    expired = retention.due(state, step.now, SLICE)
    if expired:
        retention.delete(state, step, expired)
        changed = True
    return changed


def _is_due(state: State, rollout_id: str, active_now: float) -> bool:
    deadline = state._attempt_deadline(rollout_id)
    return deadline is not None and active_now > deadline


def _expire(state: State, step: Step, entry: Entry, active_now: float) -> None:
    timeout = entry.rollout.config.timeout_seconds
    timed_out = timeout is not None and active_now - entry.clocks[-1].start > timeout
    latest = entry.attempts[-1]
    state.notify(entry, latest.attempt_id, "timeout" if timed_out else "unresponsive")
    settle(state, step, entry, TIMEOUT if timed_out else SILENCE)


def pause(state: State, step: Step, seconds: float) -> None:
    """The store stood still: deadlines, claims and sessions move by so much, since nobody could have met them."""
    state.paused += seconds
    for session in state.sessions.values():
        session.last_heard += seconds
        for key in session.claims:
            session.claims[key] += seconds
    state.changes.append(step.now, "paused", seconds=seconds)


def next_deadline(state: State) -> float | None:
    """When `advance` will next have something to do for attempts, on the store's clock."""
    deadline = state.deadlines.next()
    return None if deadline is None else deadline + state.paused


def next_age_deadline(state: State) -> float | None:
    """The same for claims and sessions, on the clock by which they age."""
    ages = [deadlines.next() for deadlines in (state.claim_deadlines, state.session_deadlines)]
    return min((age for age in ages if age is not None), default=None)
