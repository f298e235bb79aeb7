"""The rules of journal format 1 (written up to 2026-11-29), by which its records are read.

A replay must make the decisions that its writer made. This file has the old form of each rule that has changed since:
verbs in `VERBS`, steps in `STEPS` (most are those of today, given the old rules), the start of a process in `resume`,
batches in `Run`, snapshots in `section`. All other rules are unchanged. Only a replay uses this file; a store that goes
on after the replay uses the rules of today.
Not here: which records are of that format (`journal.reader`); digests, which are not compared across formats.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from itertools import islice
from typing import Any

from raystore.core import attempts, claims, expiry, training, verbs, workers
from raystore.core.batches import BatchRun, Item, cut, joined, named, to_keep
from raystore.core.claims import Claimed, taken_over
from raystore.core.lifecycle import TRAINABLE, is_dropped, is_live
from raystore.core.payload import of_attempt, of_rollout, size_of
from raystore.core.queues import ASIDE
from raystore.core.queues import PLAIN as PLAIN_LINE
from raystore.core.records import Attempt, Span
from raystore.core.rollouts import CONTENT, begin, check_requests, create, enter_queue, existing_of, release
from raystore.core.snapshot import column
from raystore.core.state import (
    ERROR,
    PARTLY,
    VALUE,
    AttemptKey,
    Chain,
    Consumer,
    Entry,
    Pair,
    Reply,
    Session,
    State,
    Step,
    Taken,
)
from raystore.core.training import settle, untake
from raystore.core.verbs import Verb
from raystore.errors import BatchConflictError, InvalidValueError

# -- handing out -------------------------------------------------------------------------------------------------------


def claim(
    state: State, step: Step, *, queues: list[str], limit: int, worker_id: str | None, note_empty: bool = True
) -> list[Claimed]:
    """Hand out rollouts, as `claims.claim` does, by the rules of `_next`."""
    claimed: list[Entry] = []
    while len(claimed) < limit and not state.memory_full:
        entry = _next(state, step.session, queues)
        if entry is None:
            break
        begin(state, step, entry, worker_id=worker_id, kind="claimed")
        claimed.append(entry)
        session = step.session
        if session is not None and entry.suspect and not session.eternal:
            state.drained = None if state.drained == session.session_id else state.drained
            break
    if not claimed and note_empty and worker_id is not None:
        workers.came_away_empty(state, step, worker_id)
    return [(entry.rollout, entry.attempts[-1], entry.suspect) for entry in claimed]


def _next(state: State, session: Session | None, queues: list[str]) -> Entry | None:
    """What this session should do next, None if there is nothing for it."""
    if session is None or session.eternal:  # a suspect can only end the store itself here
        head = state.queues.first(queues, (PLAIN_LINE, ASIDE))
        return None if head is None else state.entries[head]
    if state.suspects:
        head = state.queues.first(queues, (ASIDE,))
        if head is not None:
            if session.is_idle:
                return state.entries[head]
            drained = state.sessions.get(state.drained or "")
            if drained is None or drained.ended_at is not None:
                state.drained = session.session_id
            if state.drained == session.session_id:
                return None
    if _runs_suspect(state, session):
        return None
    head = state.queues.first(queues)  # suspects wait aside, for a session of their own
    return None if head is None else state.entries[head]


def _runs_suspect(state: State, session: Session) -> bool:
    return any(
        (entry := state.entries.get(rollout_id)) is not None and entry.suspect
        for keys in (session.claims, session.held)
        if len(keys) <= 1  # a suspect runs alone
        for rollout_id, _ in keys
    )


def take_back(state: State, step: Step, session: Session, key: AttemptKey, *, why: str) -> bool:
    """Undo a claim. In format 1 a rollout was a suspect after one claim that nobody acknowledged."""

    def blame(entry: Entry) -> None:
        entry.suspect = True

    return claims.undo(state, step, session, key, why, blame)


def end_session(state: State, step: Step, session: Session, *, why: str) -> None:
    """A client process has ended: claims are taken back, attempts are lost and offered again."""
    if session.ended_at is not None:
        return
    session.ended_at = step.age
    state.effects.ended.append(session.session_id)
    company = len(session.held) + len(session.claims)
    held, claims = list(session.held), list(session.claims)
    if held or claims:
        state.changes.append(step.now, "session_ended", session_id=session.session_id, why=why, attempts=company)
    for key in claims:
        take_back(state, step, session, key, why="withdrawn")
    for key in held:
        entry = state.entries.get(key[0])
        if entry is not None:
            attempts.lose(state, step, entry, key[1], is_charged=company == 1)
    session.held.clear()
    session.claims.clear()
    session.notices.clear()
    if state.drained == session.session_id:
        state.drained = None
    state.session_deadlines.guard(session.session_id)
    state.offer_all()


def _dequeue(
    state: State,
    step: Step,
    *,
    queues: list[str],
    limit: int,
    worker_id: str | None,
    timeout: float = 0.0,
    of: int | None = None,
) -> list[Claimed] | None:
    if of is not None and step.session is not None and (handed := taken_over(state, step.session, of)):
        return handed
    workers.admit(state, worker_id)
    claimed = claim(state, step, queues=queues, limit=limit, worker_id=worker_id)
    if not claimed and timeout > 0 and limit > 0:
        return None
    return claimed


def _report_session(state: State, step: Step, *, session_id: str | None, worker_id: str | None = None) -> bool:
    """Any session that held work of the worker ended too, that of another pool's worker of this name as well.

    Their order was that of a set, and is not known any more; it decided only the order of what is told of them.
    """
    ended = dict.fromkeys([session_id])
    for rollout_id in state.indexes.find(("worker", worker_id)):
        entry = state.entries[rollout_id]
        ended[entry.holders.get(entry.attempts[-1].attempt_id) if is_live(entry.attempts[-1]) else None] = None
    sessions = [state.sessions[found] for found in ended if found is not None and found in state.sessions]
    live = [session for session in sessions if session.ended_at is None and not session.eternal]
    for session in live:
        end_session(state, step, session, why="reported")
    return bool(live)


def resume(state: State, step: Step, away: float) -> None:
    """Another process went on with the store."""
    for session_id, session in list(state.sessions.items()):
        if session.eternal:
            end_session(state, step, session, why="ended with its store")
            expiry.forget_session(state, session_id)
    expiry.resume(state, step, away)


# -- attempts ----------------------------------------------------------------------------------------------------------


def _heartbeat(state: State, step: Step, *, attempts_alive: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """In format 1 a heartbeat did not change a status."""
    return attempts.note_alive(state, step, attempts_alive, None)


def _add_spans(
    state: State, step: Step, *, rollout_id: str, attempt_id: str, spans: list[list[Any]], chain: Chain | None = None
) -> list[tuple[bool, int]]:
    """In format 1 spans for the attempt "latest" were stored for the newest attempt."""
    attempt_id = _meant(state, rollout_id, attempt_id)
    return attempts.add_spans(state, step, rollout_id=rollout_id, attempt_id=attempt_id, spans=spans)


def _finish(
    state: State, step: Step, *, rollout_id: str, attempt_id: str, spans: list[list[Any]], changes: dict[str, Any]
) -> tuple[Attempt, list[bool]]:
    """In format 1 the attempt "latest" was the newest one, and the text of an error was not shortened."""
    attempt_id = _meant(state, rollout_id, attempt_id)
    made = [Span(rollout_id, attempt_id, *row) for row in spans]
    attempt, written = attempts.end(state, step, rollout_id, attempt_id, made, changes)
    return attempt, written.stored


def _meant(state: State, rollout_id: str, attempt_id: str) -> str:
    entry = state.entry(rollout_id)
    return entry.attempts[state.find_attempt(entry, attempt_id)].attempt_id if attempt_id == "latest" else attempt_id


# -- enqueuing ---------------------------------------------------------------------------------------------------------


def _enqueue(
    state: State, step: Step, *, requests: list[dict[str, Any]], admit: int | None = None, chain: Chain | None = None
) -> list[Pair]:
    """In format 1 `max_queued` also refused repeated requests, and two pickled contents always counted as equal."""
    latest = chain.notes.setdefault("latest", state.resources.latest_id) if chain else state.resources.latest_id
    existing = [existing_of(state, request) for request in requests]
    check_requests(state, requests, new=existing.count(None) if admit is None else admit)
    made = []
    for request, entry in zip(requests, existing, strict=True):
        if entry is None:
            entry = create(state, step, "queuing", request, latest)
            if entry.given is not None:  # the values themselves were kept, not digests
                entry.given = tuple(request.get(name) for name in CONTENT)
            enter_queue(state, step, entry, state.queues.tail(entry.rollout.priority))
            state.changes.append(step.now, "enqueued", entry.rollout.rollout_id)
        made.append(entry.pair)
    return made


# -- training ----------------------------------------------------------------------------------------------------------


def _take(
    state: State, step: Step, *, consumer: str, count: int, timeout: float = 0.0
) -> tuple[list[Pair], int] | None:
    return _take_now(state, step, consumer, count, timeout <= 0)


def _take_now(state: State, step: Step, consumer: str, count: int, must: bool) -> tuple[list[Pair], int] | None:
    """A consumer held one batch at most, and was given it again; failed rollouts were taken as well."""
    known = state.consumers.get(consumer)
    if known is not None and known.open is not None:
        chosen = [i for i in known.batches[known.open] if i in state.entries]
        return [state.entries[i].pair for i in chosen], known.open
    chosen = _available(state, known, count)
    if not must and len(chosen) < count:
        return None
    if not chosen:
        return [], 0
    if known is None:
        known = state.consumers[consumer] = Consumer(cursor=0)
    known.made += 1
    known.open = known.made
    known.batches[known.open] = chosen
    for rollout_id in chosen:
        entry = state.entries[rollout_id]
        entry.taken = {**entry.taken, consumer: Taken(known.made)}
        state.touch(rollout_id)
        settle(state, entry)
        if rollout_id in known.returned:
            del known.returned[rollout_id]
        else:
            known.cursor = state.completions.place(rollout_id)
    state.changes.append(step.now, "taken", consumer=consumer, batch=known.made, rollouts=len(chosen))
    return [state.entries[i].pair for i in chosen], known.made


def _available(state: State, known: Consumer | None, count: int) -> list[str]:
    returned = known.returned if known is not None else {}
    chosen = [i for i in returned if i in state.entries and _is_for_training(state.entries[i])][:count]
    if len(chosen) == count:
        return chosen
    for _, rollout_id in state.completions.after(known.cursor if known is not None else None):
        if rollout_id not in returned and _is_for_training(state.entries[rollout_id]):
            chosen.append(rollout_id)
            if len(chosen) == count:
                break
    return chosen


def _is_for_training(entry: Entry) -> bool:
    return entry.rollout.status in TRAINABLE and not is_dropped(entry.latest)


def _ack(state: State, step: Step, *, consumer: str, batch: int, at_step: int, note: str | None) -> None:
    known = training.known_consumer(state, consumer, batch)
    if known.open != batch:
        if known.steps.get(batch) == at_step:
            return  # said before
        training.refuse(known, consumer, batch)
    training.consume(state, step, known, consumer, batch, at_step, note)
    known.open = None


def _nack(state: State, step: Step, *, consumer: str, batch: int) -> None:
    known = training.known_consumer(state, consumer, batch)
    if known.open != batch:
        training.refuse(known, consumer, batch)
    _return(state, known, consumer, [batch])
    state.changes.append(step.now, "returned", consumer=consumer, batch=batch)


def _checkpoint(state: State, step: Step, *, consumer: str, at_step: int) -> int:
    """In format 1 what nobody may have to train on again was also released."""
    known = state.consumers.setdefault(consumer, Consumer(cursor=0))
    durable = [i for batch, consumed_by in known.steps.items() if consumed_by <= at_step for i in known.batches[batch]]
    count = training.checkpoint(state, step, consumer=consumer, at_step=at_step)
    there = [i for i in durable if i in state.entries]
    release(state, step, rollout_ids=[i for i in there if not state.entries[i].is_held])
    return count


def _rewind(state: State, step: Step, *, consumer: str, at_step: int) -> int:
    known = state.consumers.setdefault(consumer, Consumer(cursor=0))
    if known.checkpoint is not None and at_step < known.checkpoint:
        why = f"it cannot go back to step {at_step}: what was consumed up to step {known.checkpoint} is released"
        raise BatchConflictError(consumer, why)
    batches = [batch for batch in known.batches if batch == known.open or known.steps.get(batch, at_step) > at_step]
    count = _return(state, known, consumer, batches)
    state.changes.append(step.now, "rewound", consumer=consumer, step=at_step, rollouts=count)
    return count


def _return(state: State, known: Consumer, consumer: str, batches: list[int]) -> int:
    back: dict[str, None] = {}
    for batch in sorted(batches):
        for entry in untake(state, consumer, known.batches.pop(batch)):
            back[entry.rollout.rollout_id] = None
            settle(state, entry)
        known.steps.pop(batch, None)
        if known.open == batch:
            known.open = None
    if back:
        state.effects.has_batches = True
    known.returned = back | known.returned
    return len(back)


def go_on(state: State) -> None:
    """What consumers await, as it is kept today; the batch that one held was left behind. They have no filter yet."""
    for known in state.consumers.values():
        if known.cursor is None:
            continue  # of today
        awaited, found = known.awaiting, _available(state, known, len(state.completions) + 1)
        known.awaiting = OrderedDict.fromkeys(found)
        known.returned = {i: None for i in known.returned if i in known.awaiting}
        known.holders = {} if known.open is None else {known.open: None}
        known.cursor = known.open = None
        for rollout_id in awaited:
            if rollout_id not in known.awaiting:
                settle(state, state.entries[rollout_id])


# -- tables ------------------------------------------------------------------------------------------------------------

VERBS: dict[str, Verb] = verbs.VERBS | {
    "dequeue": Verb(_dequeue),
    "enqueue": Verb(_enqueue),
    "take": Verb(_take),
    "ack": Verb(_ack),
    "nack": Verb(_nack),
    "checkpoint": Verb(_checkpoint),
    "rewind": Verb(_rewind),
    "report_session": Verb(_report_session),
    "heartbeat": Verb(_heartbeat),
    "add_spans": Verb(_add_spans),
    "finish": Verb(_finish),
}

STEPS: dict[str, Callable[..., Any]] = verbs.STEPS | {
    "advance": partial(verbs.advance, take_back=take_back, end_session=end_session),
    "hand_over": partial(verbs.hand_over, claim=claim),
    "take": _take_now,
    "take_back": partial(verbs.take_back, undo=take_back),
    "end_session": partial(verbs.end_session, end=end_session),
}


def _require_names(spec: Verb, verb: str, arguments: dict[str, Any]) -> None:
    if not spec.schema.required <= arguments.keys() or not arguments.keys() <= spec.schema.names:
        raise InvalidValueError("operation", (verb, sorted(arguments)), "a verb of this store with its arguments")


def run(state: State, step: Step, verb: str, arguments: dict[str, Any]) -> Any:
    """Run one verb: only the names of its arguments were looked at.

    Bulk calls that were left unfinished were all kept. Today's rule keeps the newest, which are all that may go on.
    """
    spec = VERBS.get(verb)
    if spec is None:
        raise InvalidValueError("operation", verb, "a verb of this store")
    _require_names(spec, verb, arguments)
    return verbs.perform(state, step, spec, arguments)


# -- batches -----------------------------------------------------------------------------------------------------------


class Run(BatchRun):
    """A batch under way. In format 1 a refused piece of a long operation did not stop the pieces behind it.

    No client got the answer of such an operation: the store failed while it joined the answers of the pieces, and the
    client repeated the batch. A replay answers with the refusal.
    """

    __slots__ = ()

    def _pieces(self, verb: str, arguments: dict[str, Any]) -> list[dict[str, Any]]:
        """Nothing was looked at but the names of arguments, and nothing was reserved."""
        try:
            _require_names(VERBS[verb], verb, arguments)
            return cut(*named(self._state, verb, arguments))
        except (InvalidValueError, TypeError, AttributeError):
            return [arguments]

    def _answer_piece(self, item: Item, reply: Reply) -> None:
        replies = self._kept.replies
        if item.is_more:
            reply = joined(replies.pop()[1], reply)
        replies.append(to_keep(item.verb, item.arguments, reply) if item.is_last else [PARTLY, reply])


# -- snapshots ---------------------------------------------------------------------------------------------------------

# The columns as they stand in files, in their order: fields that today's records gain are not among them.
_ROLLOUT = (
    "input", "start_time", "end_time", "mode", "resources_id", "status", "config", "metadata", "group_id", "queue",
    "priority", "tags", "reward",
)  # fmt: skip
_ATTEMPT = (
    "attempt_id", "sequence_id", "start_time", "end_time", "status", "worker_id", "last_heartbeat_time", "metadata",
    "outcome", "error", "resources_version", "policy_version", "reward",
)  # fmt: skip
_FEW_VALUES = frozenset(
    {"mode", "resources_id", "status", "config", "group_id", "queue", "priority"}
    | {"sequence_id", "worker_id", "outcome", "error", "resources_version", "policy_version"}
)
PAYLOAD_BYTES = 4  #: where in the section "plain" the sum stands


def payload_bytes(name: str, value: Any) -> int:
    """What the rollouts or workers of a section count for; those of attempts and workers did not count."""
    if name == "workers":
        return sum(size_of(row[2]) for row in value)
    return sum(_sizes(value)) if name == "chunk" else 0


def _sizes(found: list[Any]) -> list[int]:
    """Bytes that each rollout of a chunk counts for."""
    _, rollouts, counts, attempts_, *_ = found
    columns = dict(zip(_ROLLOUT, rollouts, strict=True))
    sizes = list(map(of_rollout, columns["input"], columns["metadata"], columns["tags"]))
    if sum(counts):
        columns = dict(zip(_ATTEMPT, attempts_, strict=True))
        values = map(of_attempt, columns["metadata"], _expanded(columns["error"]))
        for row, count in enumerate(counts):
            sizes[row] += sum(islice(values, count))
    return sizes


def section(name: str, value: Any) -> Any:
    """A section of a snapshot as it stands today; a chunk unpacked."""
    if name == "chunk":
        return _chunk(value)
    if name == "consumers":
        return {consumer: _consumer(row) for consumer, row in value.items()}
    if name == "waiting":  # format 1 did not keep since when suspects wait: long enough
        orders, arrivals, suspects = value  # format 1 had two lines, told apart by a bool
        return orders, arrivals, [(rollout_id, 0.0) for rollout_id in suspects]
    if name == "disposable":  # when each of them ended is found when it is looked at
        return [[(rollout_id, 0.0) for rollout_id in ids] for ids in value]
    return _session(value) if name == "session" else value


def _expanded(packed: Any) -> list[Any]:
    values, rows = packed
    if len(values) == 1:
        return list(values) * (len(rows) or 1)
    return [values[row] for row in rows] if rows else list(values)


def _columns(found: list[Any], names: tuple[str, ...]) -> dict[str, Any]:
    named = zip(names, found, strict=True)
    return {name: column(_expanded(c) if name in _FEW_VALUES else list(c)) for name, c in named}


def _chunk(found: list[Any]) -> dict[str, Any]:
    (
        configs, rollouts, counts, attempts_, starts, beats, numbers, orders, _, formers, holders,
        others, given, released, suspects, deliveries, taken,
    ) = found  # fmt: skip
    length, tried = len(counts), sum(counts)

    def some(rows: list[Any], usual: Any) -> Any:
        values = [usual] * length
        for row, value in rows:
            values[row] = value
        return column(values, usual)

    return {
        "configs": configs,
        "rollouts": _columns(rollouts, _ROLLOUT),
        "counts": counts,
        "attempts": _columns(attempts_, _ATTEMPT) if tried else {},
        "clocks": {"start": column(list(starts)), "beat": column(list(beats))},
        "holders": column(_expanded(holders) if tried else []),
        "others": others,
        "entries": {
            "number": column(list(numbers)),
            "order": column(list(orders)),
            "bytes": column(_sizes(found), 0),
            "former": column(_expanded(formers), "queuing"),
            "given": some(given, None),
            "released": some([(row, True) for row in released], False),
            "suspect": some([(row, True) for row in suspects], False),
            "deliveries": some(deliveries, 0),
            "taken": some([(row, [_taken(one) for one in rows]) for row, rows in taken], []),
        },
    }


def _taken(row: list[Any]) -> list[Any]:
    consumer, batch, step, note, is_durable = row
    return [consumer, {"batch": batch, "step": step, "note": note, "is_durable": is_durable}]


def _consumer(row: list[Any]) -> dict[str, Any]:
    names = ("cursor", "returned", "made", "open", "batches", "steps", "checkpoint")
    return dict(zip(names, [row[0] or 0, *row[1:]], strict=True))


def _session(row: list[Any]) -> dict[str, Any]:
    names = ("session_id", "eternal", "last_heard", "ended_at", "claims", "held", "lost", "notices", "chains", "line")
    values = dict(zip(names, row, strict=True))
    values["line"] = dict(zip(("expected", "answered", "ahead", "kept", "handed"), values["line"], strict=True))
    for _, (_, replies) in values["line"]["kept"]:
        replies[:] = [_partly(reply) if reply[:1] == [PARTLY] else reply for reply in replies]
    return values


def _partly(reply: Reply) -> Reply:
    return [PARTLY, [VALUE, reply[1]] if len(reply) == 2 else [ERROR, *reply[1:]]]
