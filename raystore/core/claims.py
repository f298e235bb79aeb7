"""Handing work out so that none is lost: claims, their acknowledgement, and sessions that end.

A dequeue makes a *claim*: an attempt that its caller must acknowledge. `take_back` undoes a claim that its caller
declined, or that nobody acknowledged in time: the attempt disappears, and the rollout returns to its place in line.
`end_session` takes back the claims of a session that ended. The attempts that it had acknowledged are withdrawn without
a charge if its process was stopped, and lost if it died. Withdrawn rollouts are offered again, and lost ones as long as
`max_deliveries` allows.

A lost rollout may have killed its process, or may only have run beside the one that did. It becomes a *suspect*: it
waits for a session that runs nothing else, so that another loss shows whether it is to blame. After a bounded time any
session may take it. If several rollouts are lost together, the one with the most earlier losses is charged.
Not here: a client that gives a claim back (`remote.session_state`, `client.local`), attempts that are withdrawn
(`attempts.withdraw`), calls that wait for work (`service.parking`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

from raystore.core import attempts, pauses, publishing, training, workers
from raystore.core.lifecycle import ACTIVE, BUSY, is_untouched
from raystore.core.queues import ASIDE, EVALUATED, OVERDUE, PLAIN
from raystore.core.records import Attempt, Rollout
from raystore.core.rollouts import begin, move, stop_waiting, unqueue
from raystore.core.schema import Id, Positive, Seconds
from raystore.core.state import SURPLUS, AttemptKey, BatchKey, Entry, HandedKey, Session, State, Step

#: ... and whether it may be dangerous: then a call of its own acknowledges it, so that whoever dies of it is found.
Claimed = tuple[Rollout, Attempt, bool]

USUAL_LINES: tuple[int, ...] = (PLAIN, OVERDUE)  #: from which a session is served
USUAL_SHARE = 0.25  #: of a rollout of an evaluation that has ended, which was requeued
SUSPICIOUS_WITHDRAWALS = 2  #: a rollout with so many claims that nobody acknowledged is a suspect
# Why a session ended: its driver is gone; its pool has stopped it; it said so itself.
JOB_ENDED, STOPPED, CLOSED = STOPS = ("job ended", "stopped", "closed")  #: no losses: nothing is charged or suspected
SESSIONS = 10_000  #: client processes
ENDED_SESSIONS = 10_000  #: which answer late batches: of these the newest are kept (`SURPLUS` more go at once)
LOST_CLAIMS_KEPT = 1_000  #: of a session, so that a late acknowledgement can be told what became of its claim


def dequeue(
    state: State,
    step: Step,
    *,
    queues: list[Id],
    limit: int,
    worker_id: Id | None,
    timeout: Seconds = 0.0,
    of: int | None = None,
) -> list[Claimed] | None:
    """Claim work; None if there is none and the caller waits. `of`: a parked dequeue whose claims to return first."""
    if of is not None and step.session is not None and (handed := taken_over(state, step.session, of)):
        return handed
    if worker_id not in state.workers:
        workers.admit(state, worker_id)
    claimed = claim(state, step, queues=queues, limit=limit, worker_id=worker_id)
    if not claimed and timeout > 0 and limit > 0:
        return None
    return claimed


def keys_of(arguments: dict[str, Any], claimed: Any) -> list[HandedKey]:
    """Keys of what a dequeue answered, as records or as rows."""
    keys: list[HandedKey] = []
    for rollout, attempt, _ in claimed or ():
        if isinstance(attempt, (list, tuple)):
            keys.append((attempt[0], attempt[1]))
        else:
            keys.append((rollout.rollout_id, attempt.attempt_id))
    return keys


def claim(
    state: State, step: Step, *, queues: list[str], limit: int, worker_id: str | None, note_empty: bool = True
) -> list[Claimed]:
    """Up to `limit` rollouts from the heads of the queues, in the order given; each gets an attempt.

    `note_empty` records that the worker came away empty; not for a call that stays parked, which did so when it came.
    """
    claimed: list[Claimed] = []
    session, gates, offering = step.session, state.gates, queues
    while len(claimed) < limit and not state.memory_full:
        lines = USUAL_LINES
        if gates.pauses or gates.limits:
            offering = gates.open_among(queues, step.now)
        if state.suspects or session is None or session.eternal or session.reserved_since is not None:
            lines = _lines_for(state, step, offering)
        rollout_id = state.queues.first(offering, lines)
        if state.queues.evaluated and PLAIN in lines:
            rollout_id = _shared(state, offering, rollout_id)
        if rollout_id is None:
            break
        entry = state.entries[rollout_id]
        is_alone = entry.suspect and session is not None and not session.eternal and session.is_idle
        begin(state, step, entry, worker_id=worker_id, kind="claimed")
        if gates.limits:
            gates.claimed(entry.rollout.queue, step.now)
        claimed.append((entry.rollout, entry.attempts[-1], entry.suspect or entry.withdrawals > 0))
        if session is not None and is_alone:
            _reserve(state, step, session)
            break
    if not claimed and note_empty and worker_id is not None:
        workers.came_away_empty(state, step, worker_id)
    return claimed


def _shared(state: State, queues: list[str], other: str | None) -> str | None:
    """What is handed out, if rollouts of evaluations wait: the first of them, or the `other` work that waits.

    If both wait, evaluations have their share of what runs then, and one rollout at least. If only one kind waits, it
    has everything. So neither starves, and no runner is idle.
    """
    first = state.queues.first(queues, (EVALUATED,))
    if first is None or other is None:
        return first or other
    share, mine, running = share_of(state, first)
    return first if mine < max(share * (running + 1), 1) else other


def share_of(state: State, rollout_id: str) -> tuple[float, int, int]:
    """The share of a rollout's evaluation; how many rollouts of evaluations run, and how many of all."""
    evaluation = state.evaluations.of_rollout(rollout_id)
    share = USUAL_SHARE if evaluation is None else float(evaluation.rule["share"])
    running = sum(state.indexes.count(("status", status)) for status in ACTIVE)
    return share, len(state.evaluations.active), running


def _lines_for(state: State, step: Step, queues: list[str]) -> tuple[int, ...]:
    """The queue lines that the session of a step may take from, if suspects wait or it is reserved or eternal."""
    session = step.session
    if session is None or session.eternal:  # a suspect can only end the store itself here
        return (PLAIN, ASIDE, OVERDUE)
    if state.suspects and state.queues.first(queues, (ASIDE,)) is not None:
        if session.is_idle:
            return (ASIDE,)
        if session.reserved_since is None and not _is_drained(state, step):
            state.drained = session.session_id
            _reserve(state, step, session)
    return (OVERDUE,) if _is_reserved(state, step, session) else USUAL_LINES


def _reserve(state: State, step: Step, session: Session) -> None:
    """Let a session take nothing more for a while: it runs a suspect, or is to fall idle for one."""
    session.reserved_since = step.age
    state.reservations += 1
    state.patience_deadlines.guard((True, session.session_id))


def _is_reserved(state: State, step: Step, session: Session) -> bool:
    """Whether a session takes nothing at the moment, for a suspect."""
    since = session.reserved_since
    return since is not None and not session.is_idle and step.age <= since + state.settings.suspect_patience_seconds


def _is_drained(state: State, step: Step) -> bool:
    """Whether some session is about to fall idle for a suspect."""
    session = state.sessions.get(state.drained or "")
    return session is not None and session.ended_at is None and _is_reserved(state, step, session)


def offer_to_anybody(state: State, rollout_id: str) -> None:
    """Let any session have a suspect, at its old place: it has waited long enough for a session of its own."""
    if rollout_id in state.suspects:
        stop_waiting(state, rollout_id)
        state.effects.queues.add(state.queues.make_overdue(rollout_id))


def decline(state: State, step: Step, *, rollout_id: Id, attempt_id: Id) -> bool:
    """Take back a claim whose caller was gone when the answer came. Returns whether there was such a claim."""
    assert step.session is not None
    return take_back(state, step, step.session, (rollout_id, attempt_id), why="declined")


def confirm(state: State, step: Step, *, keys: list[tuple[Id, Id | Positive]]) -> list[HandedKey]:
    """The callers of this session have these claims and batches; returns those that came too late and are lost."""
    assert step.session is not None
    handed: list[Any] = [(key[0], key[1]) for key in keys]
    return acknowledge(state, step, step.session, handed)


def acknowledge(state: State, step: Step, session: Session, keys: Sequence[HandedKey]) -> list[HandedKey]:
    """The callers have these claims and batches; returns those that came too late and are lost."""
    lost: list[HandedKey] = []
    for key in keys:
        if is_batch(key):
            if not training.received(state, session, key):
                lost.append(key)
        elif not is_claim(key):
            continue
        elif session.claims.pop(key, None) is not None:
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
    session.held[key] = None
    state.put_attempt(entry, len(entry.attempts), attempt)
    entry.clocks[-1].start = step.now - state.paused  # its caller had it all the while, the store did not
    move(state, step, entry, attempt.status, kind="reinstated")
    state.deadlines.guard(key[0])
    if attempt.worker_id is not None:
        state.put_worker(
            attempt.worker_id, status=BUSY, current_rollout_id=key[0], current_attempt_id=key[1],
            last_busy_time=step.now, last_dequeue_time=step.now,
        )  # fmt: skip
    return True


def is_batch(key: HandedKey) -> TypeGuard[BatchKey]:
    """Whether what an answer handed over is a batch of a consumer, and no claim."""
    return isinstance(key[1], int)


def is_claim(key: HandedKey) -> TypeGuard[AttemptKey]:
    """Whether it is a claim."""
    return isinstance(key[1], str)


def take_back(state: State, step: Step, session: Session, key: HandedKey, *, why: str, is_stop: bool = False) -> bool:
    """Undo a claim: the attempt disappears and the rollout stands in its old place. Whether there was one to undo.

    `why` is "declined" (its caller had gone) or "withdrawn" (nobody acknowledged it; if that came of a stop, it says
    nothing about the rollout). A batch is given back, or left to the session that asks next.
    """
    if is_batch(key):
        if why == "declined":
            return training.decline(state, step, session, key)
        training.leave(state, session, key)
        return True
    return is_claim(key) and undo(state, step, session, key, why, _spare if is_stop else _note_withdrawal)


def _note_withdrawal(entry: Entry) -> None:
    entry.withdrawals += 1
    entry.suspect = entry.suspect or entry.withdrawals >= SUSPICIOUS_WITHDRAWALS


def _spare(entry: Entry) -> None:
    """A stop says nothing about the rollout."""


def undo(state: State, step: Step, session: Session, key: AttemptKey, why: str, blame: Callable[[Entry], None]) -> bool:
    """Take an attempt back that nobody has worked on; `blame` draws the conclusions if it was withdrawn."""
    entry = state.entries.get(key[0])
    attempt = entry.latest if entry else None
    if (
        entry is None
        or attempt is None
        or attempt.attempt_id != key[1]
        or not is_untouched(attempt)
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
        blame(entry)
        state.withdrawals += 1
        state.effects.has_withdrawn = True
    if entry.rollout.status == attempt.status:  # else somebody has decided otherwise meanwhile, by hand
        move(state, step, entry, entry.former, keep_place=True, kind=why)
    if attempt.worker_id is not None:
        worker = state.workers.get(attempt.worker_id)
        if worker is not None and worker.current_attempt_id == key[1]:
            workers.came_away_empty(state, step, attempt.worker_id)
    return True


def claimed_again(state: State, session: Session, keys: Sequence[AttemptKey]) -> list[Claimed]:
    """What a dequeue answered, as it is now, without the claims that the session holds no longer."""
    claimed = []
    for key in keys:
        if key in session.claims or key in session.held:
            entry = state.entries[key[0]]
            claimed.append((entry.rollout, entry.attempts[-1], entry.suspect or entry.withdrawals > 0))
    return claimed


def taken_over(state: State, session: Session, ticket: int) -> list[Claimed]:
    """The claims that a parked dequeue was handed, for a new dequeue that names its ticket.

    Empty if the parked one was handed nothing, or its session holds none of that any more: then the new one claims.
    """
    keys = session.replies.handed.pop(ticket, None)
    return claimed_again(state, session, [key for key in keys if is_claim(key)]) if keys else []


def open_session(
    state: State, step: Step, session_id: str, eternal: bool = False, process: list[Any] | None = None
) -> Session:
    """A client process speaks for the first time; it may say which process it is."""
    session = Session(session_id, step.age, eternal=eternal, process=process)
    state.sessions[session_id] = session
    state.session_deadlines.guard(session_id)
    return session


def live_sessions(state: State) -> int:
    """How many sessions have not ended."""
    return len(state.sessions) - len(state.ended_sessions)


def end_session(state: State, step: Step, session: Session, *, why: str) -> None:
    """A client process has ended: claims are taken back, attempts are lost and offered again."""
    if session.ended_at is not None:
        return
    session.ended_at = step.age
    state.effects.ended.append(session.session_id)
    state.ended_sessions[session.session_id] = None
    if len(state.ended_sessions) >= ENDED_SESSIONS + SURPLUS:
        state.effects.has_surplus = True
    state.feeds.let_go(session.session_id)
    for batch in list(session.batches):
        training.leave(state, session, batch)
    held, claims = list(session.held), list(session.claims)
    if held or claims:
        company = len(held) + len(claims)
        state.changes.append(step.now, "session_ended", session_id=session.session_id, why=why, attempts=company)
    is_stop = why in STOPS
    to_blame = _lost_most_often(state, [*held, *claims])
    for key in claims:
        take_back(state, step, session, key, why="withdrawn", is_stop=is_stop)
    for key in held:
        entry = state.entries.get(key[0])
        if entry is not None and is_stop:
            attempts.withdraw(state, step, entry, key[1])
        elif entry is not None:
            attempts.lose(state, step, entry, key[1], is_charged=key == to_blame)
    _separate(state, [key[0] for key in held])
    if why != CLOSED:  # a process that only stops using the store still has what it published
        publishing.publisher_gone(state, step, session)
    session.held.clear()
    session.claims.clear()
    session.notices.clear()
    session.chains.clear()
    training.unreserve(state, session)
    if state.gates.pauses:
        pauses.session_ended(state, step, session)
    if state.drained == session.session_id:
        state.drained = None
    state.session_deadlines.guard(session.session_id)
    state.offer_all()


def _separate(state: State, rollout_ids: list[str]) -> None:
    """Let suspects that were lost together stop waiting for an idle session one after the other.

    The order is another one each time. Else, where no session falls idle, the next session would get all of them at
    once again, and its loss would not tell which one is to blame.
    """
    waiting = [i for i in rollout_ids if i in state.suspects]
    apart = state.settings.suspect_patience_seconds / max(len(waiting), 1)
    turn = max((state.entries[i].losses for i in waiting), default=0)
    for number, rollout_id in enumerate(waiting):
        state.suspects[rollout_id] -= apart * ((number + turn) % len(waiting))
        state.patience_deadlines.guard((False, rollout_id))


def _lost_most_often(state: State, keys: list[AttemptKey]) -> AttemptKey | None:
    """The attempt whose rollout has the most earlier losses; None if several rollouts have equally many."""
    losses = {key: entry.losses for key in keys if (entry := state.entries.get(key[0])) is not None}
    most = max(losses.values(), default=0)
    often = [key for key, count in losses.items() if count == most]
    return often[0] if len(often) == 1 else None


def report_session(
    state: State, step: Step, *, session_id: Id | None, worker_id: Id | None = None, stopped: bool = False
) -> bool:
    """End the session of a process that has ended, or was `stopped`. Returns whether the session was live.

    If the session is not known, end those that hold work of its worker.
    """
    session = state.sessions.get(session_id or "")
    sessions = [session] if session is not None else _sessions_of_worker(state, worker_id)
    live = [session for session in sessions if session.ended_at is None and not session.eternal]
    for session in live:
        end_session(state, step, session, why=STOPPED if stopped else "reported")
    return bool(live)


def _sessions_of_worker(state: State, worker_id: str | None) -> list[Session]:
    """The sessions that hold an attempt of a worker. Looks at held attempts only: a worker may have had many others."""

    def is_of_worker(key: AttemptKey) -> bool:
        latest = state.entries[key[0]].latest
        return latest is not None and latest.attempt_id == key[1] and latest.worker_id == worker_id

    if worker_id is None:
        return []
    return [session for session in state.sessions.values() if any(map(is_of_worker, (*session.held, *session.claims)))]
