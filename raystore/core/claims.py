"""Handing work out so that none is lost: claims, their acknowledgement, and sessions that end.

A dequeue makes a *claim*: an attempt that its caller must acknowledge. A claim that is declined or not acknowledged is
taken back as if it had never been. A session that ends gives back its claims, and its attempts are lost: they are
offered again at their old place. A rollout that was lost in company may have killed its process or may be an innocent
neighbour; it is a *suspect*, and is handed out alone, so that the next loss tells.
Not here: who waits for work (`waiters`), when acknowledgements are sent (`session`).
"""

from __future__ import annotations

from raystore.core import attempts, bounds, workers
from raystore.core.records import Attempt, Rollout
from raystore.core.rollouts import move, unqueue
from raystore.core.state import AttemptKey, Entry, Session, State, Step

Claimed = tuple[Rollout, Attempt, bool]  #: and whether it is a suspect

LOST_CLAIMS_KEPT = 1_000  #: of a session, so that a late acknowledgement can be told what became of its claim


def claim(
    state: State, step: Step, *, queues: list[str], limit: int, worker_id: str | None, note_empty: bool = True
) -> list[Entry]:
    """Up to `limit` rollouts from the heads of the queues, in the order given; each gets an attempt.

    `note_empty` records that the worker came away empty; not for a call that stays parked, which did so when it came.
    """
    claimed: list[Entry] = []
    while len(claimed) < limit and not state.memory_full:
        entry = _next(state, step.session, queues, claimed)
        if entry is None:
            break
        attempt = attempts.begin(state, step, entry, worker_id=worker_id, kind="claimed")
        claimed.append(entry)
        session = step.session
        if session is not None:
            key = (entry.rollout.rollout_id, attempt.attempt_id)
            session.held.pop(key, None)
            session.claims[key] = step.age
            state.claim_deadlines.guard((session.session_id, key))
            if entry.suspect and not session.eternal:
                state.drained = None if state.drained == session.session_id else state.drained
                break
    if not claimed and note_empty and worker_id is not None:
        workers.came_away_empty(state, step, worker_id)
    return claimed


def _next(state: State, session: Session | None, queues: list[str], claimed: list[Entry]) -> Entry | None:
    """What this session should do next, None if there is nothing for it."""
    if session is None or session.eternal:  # a suspect can only end the store itself here
        heads = (state.queues.first(queue) for queue in queues)
        return next((state.entries[head] for head in heads if head is not None), None)
    if state.suspects:
        waiting = [head for queue in queues if (head := state.queues.head(queue, aside=True)) is not None]
        if waiting:
            if session.is_idle:
                return state.entries[waiting[0]]
            drained = state.sessions.get(state.drained or "")
            if drained is None or drained.ended_at is not None:
                state.drained = session.session_id
            if state.drained == session.session_id:
                return None
    if _runs_suspect(state, session):
        return None
    heads = (state.queues.head(queue) for queue in queues)  # suspects wait aside, for a session of their own
    return next((state.entries[head] for head in heads if head is not None), None)


def _runs_suspect(state: State, session: Session) -> bool:
    return any(
        (entry := state.entries.get(rollout_id)) is not None and entry.suspect
        for keys in (session.claims, session.held)
        if len(keys) <= 1  # a suspect runs alone
        for rollout_id, _ in keys
    )


def acknowledge(state: State, step: Step, session: Session, keys: list[AttemptKey]) -> list[AttemptKey]:
    """The caller has these claims; returns those that came too late and are lost."""
    lost = []
    for key in keys:
        if session.claims.pop(key, None) is not None:
            session.held[key] = None
        elif key in session.lost and not _reinstate(state, step, session, key):
            lost.append(key)
    return lost


def _reinstate(state: State, step: Step, session: Session, key: AttemptKey) -> bool:
    """Give a withdrawn claim back to its session, if the rollout still waits untouched."""
    entry = state.entries.get(key[0])
    attempt = session.lost[key]
    if entry is None or key[0] not in state.queues or len(entry.attempts) != attempt.sequence_id - 1:
        return False
    del session.lost[key]
    unqueue(state, entry)
    entry.holders[attempt.attempt_id] = session.session_id
    state.put_attempt(entry, len(entry.attempts), attempt)
    entry.clocks[-1].start = step.now - state.paused  # its caller had it all the while, the store did not
    move(state, step, entry, "preparing", kind="reinstated")
    state.deadlines.guard(key[0])
    if attempt.worker_id is not None:
        workers.busy(state, step, attempt.worker_id, attempt, claimed=True)
    return True


def take_back(state: State, step: Step, session: Session, key: AttemptKey, *, why: str) -> bool:
    """Undo a claim: the attempt disappears and the rollout stands in its old place. Whether there was one to undo.

    `why` is "declined" (its caller had gone) or "withdrawn" (nobody acknowledged it: counted as a loss in company).
    """
    entry = state.entries.get(key[0])
    attempt = entry.latest if entry else None
    if (
        entry is None
        or attempt is None
        or attempt.attempt_id != key[1]
        or attempt.status != "preparing"
        or attempt.last_heartbeat_time is not None
        or entry.holders.get(key[1]) != session.session_id
    ):
        session.claims.pop(key, None)
        return False
    state.remove_latest(entry)
    session.claims.pop(key, None)
    session.held.pop(key, None)
    if why == "withdrawn":
        session.lost[key] = attempt
        if len(session.lost) > LOST_CLAIMS_KEPT:
            del session.lost[next(iter(session.lost))]
        entry.suspect = True
        state.withdrawals += 1
    if entry.rollout.status == "preparing":  # else somebody has decided otherwise meanwhile, by hand
        move(state, step, entry, entry.former, keep_place=True, kind=why)
    if attempt.worker_id is not None:
        worker = state.workers.get(attempt.worker_id)
        if worker is not None and worker.current_attempt_id == key[1]:
            workers.came_away_empty(state, step, attempt.worker_id)
    return True


def claimed_again(state: State, session: Session, keys: list[AttemptKey]) -> list[Claimed]:
    """What a dequeue answered, as it is now; without what the session holds no longer."""
    claimed = []
    for key in keys:
        if key in session.claims or key in session.held:
            entry = state.entries[key[0]]
            claimed.append((entry.rollout, entry.attempts[-1], entry.suspect))
    return claimed


def taken_over(state: State, session: Session, ticket: int) -> list[Claimed]:
    """The claims that a parked dequeue was handed whose caller asks again, in a new operation that names its ticket.

    Empty if it was handed nothing, or holds nothing of that any more: then this is a dequeue like any other.
    """
    keys = session.line.handed.pop(ticket, None)
    return claimed_again(state, session, keys) if keys else []


def open_session(state: State, step: Step, session_id: str, *, eternal: bool = False) -> Session:
    """A client process speaks for the first time."""
    session = Session(session_id, step.age, eternal)
    state.sessions[session_id] = session
    state.session_deadlines.guard(session_id)
    return session


def live_sessions(state: State) -> int:
    """How many sessions have not ended; an upper bound of it as long as there are few."""
    if len(state.sessions) < bounds.SESSIONS:
        return len(state.sessions)
    return sum(session.ended_at is None for session in state.sessions.values())


def end_session(state: State, step: Step, session: Session, *, why: str) -> None:
    """A client process has ended: claims are taken back, attempts are lost and offered again."""
    if session.ended_at is not None:
        return
    session.ended_at = step.age
    state.ended.append(session.session_id)
    company = len(session.held) + len(session.claims)
    held, claims = list(session.held), list(session.claims)
    if held or claims:
        state.changes.append(step.now, "session_ended", session_id=session.session_id, why=why, attempts=company)
    for key in claims:
        take_back(state, step, session, key, why="withdrawn")
    for key in held:
        entry = state.entries.get(key[0])
        if entry is not None:
            attempts.lose(state, step, entry, key[1], alone=company == 1)
    session.held.clear()
    session.claims.clear()
    session.notices.clear()
    if state.drained == session.session_id:
        state.drained = None
    state.session_deadlines.guard(session.session_id)
    state.queues_touched.update(state.queues.lengths())
