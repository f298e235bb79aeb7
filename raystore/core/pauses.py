"""Verbs with which people hold work back: pause queues, resume them, limit how much of a queue runs or starts.

What is handed out already goes on, and what is enqueued waits in its place. A pause belongs to the session that made it
and ends with it, since a script that paused and died would stop everybody's work; one that is to be *kept* belongs to
nobody, and ends by `resume` only.
Not here: how a queue is found to be held back (`gates`), rollouts whose resources are missing (`publishing`).
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Annotated, Any

from raystore.core.findings import Finding, found, lasting
from raystore.core.gates import EVERY, KEPT, Gates, Pause
from raystore.core.lifecycle import ACTIVE
from raystore.core.schema import Id, Rule
from raystore.core.state import Session, State, Step, require_room

PAUSES = 10_000  #: pauses at once
LIMITS = 10_000  #: queues with limits
MOST_RUNNING = 1_000_000_000
MOST_PER_MINUTE = 100_000  #: each claim of the last minute is remembered
NAMED = 10  #: queues that a change or a line of the log names, of those that were paused together

MaxRunning = Annotated[int, Rule(f"1 <= {{v}} <= {MOST_RUNNING}", f"a whole number from 1 to {MOST_RUNNING:,}")]
PerMinute = Annotated[int, Rule(f"1 <= {{v}} <= {MOST_PER_MINUTE}", f"a whole number from 1 to {MOST_PER_MINUTE:,}")]

#: Queue (None: all), session that made it, since when, whether it is kept.
PauseRow = tuple[str | None, str, float, bool]
#: Queue, its limits, how many run, which limit is reached.
LimitRow = tuple[str, int | None, int | None, int, str | None]


# -- pauses ------------------------------------------------------------------------------------------------------------


def pause(state: State, step: Step, *, queues: list[Id] | None, keep: bool) -> list[PauseRow]:
    """Hand out no work of some queues (None: of all, also of later ones); returns all pauses that there are now."""
    assert step.session is not None
    gates, session_id = state.gates, step.session.session_id
    whose = KEPT if keep else session_id
    names = [EVERY] if queues is None else queues
    new = [name for name in dict.fromkeys(names) if whose not in gates.pauses.get(name, ())]
    if new:
        require_room("pauses", sum(map(len, gates.pauses.values())) + len(new) - 1, PAUSES)  # for the last of them
    for name in new:
        own = gates.pauses.get(name, {}).get(session_id)  # which is kept from now on, and is not a second pause
        gates.pause(name, whose, own or Pause(session_id, step.now))
        if own is not None:
            gates.resume(name, session_id)
    if new:
        state.changes.append(step.now, "queues_paused", **_counted(new), session_id=session_id, keep=keep)
        end = "until it is resumed" if keep else "until that session resumes it or ends"
        state.effects.said.append(f"Paused {_names(new)}, by {who(state, session_id)}, {end}")
    return rows(gates)


def resume(state: State, step: Step, *, queues: list[Id] | None, others: bool) -> list[PauseRow]:
    """End the pauses of this session and those that are kept, and with `others` those of other sessions, too.

    Of the queues that are named, or (None) of all. Returns the pauses that are left.
    """
    assert step.session is not None
    gates, session_id = state.gates, step.session.session_id
    ended = [
        (name, whose)
        for name in (list(gates.pauses) if queues is None else dict.fromkeys(queues))
        for whose in list(gates.pauses.get(name, ()))
        if others or whose in (KEPT, session_id)
    ]
    if ended:
        _end(state, step, ended, f"by {who(state, session_id)}", session_id)
    return rows(gates)


def session_ended(state: State, step: Step, session: Session) -> None:
    """End the pauses of a session that has ended."""
    own = [(name, session.session_id) for name, made in state.gates.pauses.items() if session.session_id in made]
    if own:
        _end(state, step, own, f"since {who(state, session.session_id)} has ended", session.session_id)


def _end(state: State, step: Step, ended: list[tuple[str, str]], why: str, session_id: str) -> None:
    gates = state.gates
    for name, whose in ended:
        gates.resume(name, whose)
    names = list(dict.fromkeys(name for name, _ in ended))
    state.changes.append(step.now, "queues_resumed", **_counted(names), session_id=session_id)
    still = [name for name in names if name in gates.pauses]
    rest = f"; still paused by others: {_names(still)}" if still else ""
    state.effects.said.append(f"Resumed {_names(names)}, {why}{rest}")
    state.offer_all()


def is_pausing(state: State, session_id: str) -> bool:
    """Whether a pause ends with this session, so that it must not end by silence."""
    return any(session_id in made for made in state.gates.pauses.values())


def rows(gates: Gates) -> list[PauseRow]:
    """All pauses, the oldest first."""
    made = [(name or None, pause.session_id, pause.since, whose == KEPT) for name, whose, pause in gates.all_pauses()]
    return sorted(made, key=lambda row: row[2])


# -- limits ------------------------------------------------------------------------------------------------------------


def limit(
    state: State, step: Step, *, queue: Id, max_running: MaxRunning | None, per_minute: PerMinute | None
) -> LimitRow:
    """Let at most so many rollouts of a queue run at once, and be claimed in any minute; None: any number."""
    gates = state.gates
    known = gates.limits.get(queue)
    before = (None, None) if known is None else (known.max_running, known.per_minute)
    if known is None and before != (max_running, per_minute):
        require_room("queues with limits", len(gates.limits), LIMITS)
    running = known.running if known is not None else _running(state, queue)
    if before != (max_running, per_minute):
        gates.limit(queue, max_running, per_minute, running)
        state.changes.append(step.now, "queue_limited", queue=queue, max_running=max_running, per_minute=per_minute)
        by = f", by {who(state, step.session.session_id)}" if step.session is not None else ""
        state.effects.said.append(f"Queue {queue!r} has {_limits(max_running, per_minute)} now{by}")
        if state.queues.length(queue):
            state.effects.queues.add(queue)
    now = gates.limits.get(queue)
    return queue, max_running, per_minute, running, now.hindrance(step.now) if now is not None else None


def _running(state: State, queue: str) -> int:
    """How many rollouts of a queue run. Looks at all that run, once, when a queue is limited."""
    of_queue = state.indexes.find(("queue", queue))
    return sum(rollout_id in of_queue for status in ACTIVE for rollout_id in state.indexes.find(("status", status)))


def allow(state: State, step: Step, queues: Iterable[str]) -> None:
    """A minute has passed since the claims after which the rates of these queues allowed no more."""
    for queue in queues:
        state.gates.minute_passed(queue, step.now)
        if state.queues.length(queue):
            state.effects.queues.add(queue)


# -- what people are told ----------------------------------------------------------------------------------------------


def describe(state: State, now: float) -> dict[str, Any]:
    """What is paused and limited, for the statistics."""
    named = ("queue", "session_id", "since", "keep")
    return {
        "paused": [dict(zip(named, row, strict=True)) for row in rows(state.gates)],
        "queue_limits": {
            queue: {
                "max_running": limit.max_running, "per_minute": limit.per_minute, "running": limit.running,
                "reached": limit.hindrance(now),
            }
            for queue, limit in state.gates.limits.items()
        },
    }  # fmt: skip


def reasons(state: State, queue: str, now: float) -> list[Finding]:
    """Why this one queue hands out nothing now: a finding for each pause, and one for the limit that is reached."""
    return [*paused(state, queue, now), *_limit_reached(state, queue, now)]


def paused(state: State, name: str, now: float) -> list[Finding]:
    """The first pauses of a queue, or (`EVERY`) of all queues."""
    what = "All queues are" if name == EVERY else f"Queue {name!r} is"
    return [
        found(
            "paused",
            f"{what} paused by {who(state, pause.session_id)} for {lasting(now - pause.since)}, until "
            f"{'somebody resumes' if whose == KEPT else 'that session resumes or ends'}",
            queue=name or None, session_id=pause.session_id, since=pause.since, keep=whose == KEPT,
        )
        for whose, pause in islice(state.gates.pauses.get(name, {}).items(), NAMED)
    ]  # fmt: skip


def _limit_reached(state: State, queue: str, now: float) -> list[Finding]:
    limit = state.gates.limits.get(queue)
    reached = limit.hindrance(now) if limit is not None else None
    if limit is None or reached is None:
        return []
    if reached == "max_running":
        text = f"Queue {queue!r} has reached max_running={limit.max_running}: {limit.running} of its rollouts run"
        return [found("limit_reached", text, queue=queue, max_running=limit.max_running, running=limit.running)]
    left = (limit.opens_at() or now) - now
    text = f"Queue {queue!r} has reached per_minute={limit.per_minute}; it hands out again in {lasting(left)}"
    return [found("limit_reached", text, queue=queue, per_minute=limit.per_minute, seconds=left)]


def _counted(names: list[str]) -> dict[str, Any]:
    """Queues as a change names them: a few, and how many there are; None stands for all."""
    return {"queues": None} if EVERY in names else {"queues": names[:NAMED], "count": len(names)}


def _names(names: list[str]) -> str:
    if EVERY in names:
        return "all queues"
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"queue{'s' if len(names) > 1 else ''} {', '.join(map(repr, names[:NAMED]))}{more}"


def _limits(max_running: int | None, per_minute: int | None) -> str:
    given = {"max_running": max_running, "per_minute": per_minute}
    said = [f"{name}={value}" for name, value in given.items() if value is not None]
    return " and ".join(said) if said else "no limits"


def who(state: State, session_id: str) -> str:
    """A session, with the id of its process if that is known."""
    session = state.sessions.get(session_id)
    process = f" (process {session.process[2]})" if session is not None and session.process else ""
    return f"session {session_id!r}{process}"
