"""What can be asked of the state: one table from verb to function.

A verb takes the state, a step, and plain keyword arguments; it answers with records or plain values. `VERBS` says of
each whether it changes the state, which rollouts it names, what its caller may have to wait for, and whether its answer
hands something over that the caller must acknowledge. A verb whose caller must wait answers None, and is not blocked.
Not here: calls that wait (`service.parking`), the batches in which operations come (`replies`).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from raystore.core import (
    attempts,
    claims,
    expiry,
    held_back,
    queries,
    retention,
    rollouts,
    training,
    wanted,
    workers,
)
from raystore.core.lifecycle import FINISHED
from raystore.core.payload import Payload, bounded_error, size_of
from raystore.core.records import Attempt, Change, Resources, Rollout, Span, Worker
from raystore.core.requests import (
    AttemptChanges,
    Filters,
    FinalChanges,
    Mode,
    Must,
    Request,
    RolloutChanges,
    RolloutStatus,
    SpanRow,
    SpanTexts,
    Trainable,
    WorkerChanges,
    WorkerStatus,
)
from raystore.core.schema import (
    As,
    Encoded,
    Id,
    Logic,
    Part,
    Positive,
    Rule,
    Schema,
    Seconds,
    SortOrder,
    Tags,
    Text,
    Whole,
    checker,
)
from raystore.core.state import AttemptKey, BatchKey, Chain, Entry, HandedKey, Session, State, Step
from raystore.errors import InvalidValueError, SessionEndedError, SpansEvictedError, StoreError, again

WaitsFor = Literal["work", "batch", "rollouts", "completions", "changes"]


@dataclass(slots=True, frozen=True)
class Verb:
    """One entry of a table of verbs."""

    run: Callable[..., Any]
    changes: bool = True
    names: tuple[str, ...] = ()  #: the arguments that name rollouts
    #: The keys of what an answer hands over, by arguments and answer: its caller must acknowledge them.
    hands: Callable[[dict[str, Any], Any], list[HandedKey]] | None = None
    waits_for: WaitsFor | None = None  #: if the answer is None, the call is parked until there is some of this
    serves: str = ""  #: the argument that names the queues whose work the caller asks for
    fits: Callable[[Any], bool] = field(init=False)  #: whether arguments are what the function's annotations ask for
    schema: Schema = field(init=False)

    def __post_init__(self) -> None:
        schema = Schema(self.run)
        object.__setattr__(self, "schema", schema)
        object.__setattr__(self, "fits", schema.fits)

    def require(self, verb: str, arguments: dict[str, Any]) -> None:
        """Refuse what are no arguments of the verb; nobody's nonsense may fail inside the core."""
        if not self.fits(arguments):
            raise self.schema.refusal(verb, arguments)

    def rollouts_named(self, arguments: dict[str, Any]) -> list[str]:
        """The rollouts a call is about, which time must have caught up with before it runs; it may still be refused."""
        named: list[str] = []
        for name in self.names:
            value = arguments.get(name)
            if isinstance(value, str):
                named.append(value)
            elif isinstance(value, (list, tuple)):
                named.extend(item for item in value if isinstance(item, str))
        return named


@dataclass(slots=True)
class Many:
    """A page of records with the number of all matches; long ones are sent in parts."""

    items: list[Any]
    total: int


def _with_attempt(entry: Entry) -> tuple[Rollout, Attempt | None]:
    return entry.rollout, entry.latest


Pair = tuple[Rollout, Attempt | None]
#: Of an object in the journal, where it is the name of a file.
Address = Annotated[str, Rule("len({v}) == 40 and {v}.isascii() and {v}.isalnum()", "the digest of an object")]
InChain = Annotated[Chain, As(Part)]  #: given as its id, and whether this is its last part

# -- rollouts ----------------------------------------------------------------------------------------------------------


def _start_rollout(state: State, step: Step, *, request: Request, worker_id: Id | None) -> Pair:
    workers.admit(state, worker_id)
    return _with_attempt(attempts.start_rollout(state, step, request, worker_id))


def _enqueue(
    state: State, step: Step, *, requests: list[Request], admit: Whole | None = None, chain: InChain | None = None
) -> list[Pair] | tuple[list[Pair], int]:
    """All of them or none, also if they come in parts: those wait for the last one, which is answered for all.

    `admit` says how many there are in all, so that a part that is missing is noticed.
    """
    latest = state.resources.latest_id
    if chain is not None:
        latest = chain.notes.setdefault("latest", latest)  # what it was for the first part
        before: list[Request] = chain.notes.setdefault("requests", [])
        if not chain.is_last:
            before.extend(requests)
            return []
        requests = [*before, *requests]
        if admit and len(requests) != admit:
            assert step.session is not None
            raise SessionEndedError(step.session.session_id)  # the one that the parts before came in
    made = rollouts.enqueue_many(state, step, requests, latest=latest)
    pairs = [_with_attempt(state.entries[rollout.rollout_id]) for rollout in made]
    is_long = chain is not None and (
        len(pairs) > LONG_ITEMS or sum(size_of(r.input) + size_of(r.metadata) for r in made) > LONG_BYTES
    )
    return (pairs, len(pairs)) if is_long else pairs  # a long answer is sent in parts


def _dequeue(
    state: State,
    step: Step,
    *,
    queues: list[Id],
    limit: int,
    worker_id: Id | None,
    timeout: Seconds = 0.0,
    of: int | None = None,
) -> list[claims.Claimed] | None:
    """What is claimed; None if there is nothing and the caller waits. `of` asks for what a parked call was handed."""
    if of is not None and step.session is not None and (handed := claims.taken_over(state, step.session, of)):
        return handed
    workers.admit(state, worker_id)
    claimed = claims.claim(state, step, queues=queues, limit=limit, worker_id=worker_id)
    if not claimed and timeout > 0 and limit > 0:
        return None
    return [(entry.rollout, entry.attempts[-1], entry.is_watched) for entry in claimed]


def _query_rollouts(
    state: State,
    step: Step,
    *,
    status_in: list[RolloutStatus] | None,
    rollout_id_in: list[Id] | None,
    rollout_id_contains: str | None,
    filter_logic: Logic,
    must: Must,
    sort_by: str | None,
    sort_order: SortOrder,
    limit: int,
    offset: int,
) -> Many:
    entries, total = rollouts.find(
        state,
        status_in=status_in,
        rollout_id_in=rollout_id_in,
        rollout_id_contains=rollout_id_contains,
        filter_logic=filter_logic,
        must=must,
        sort_by=sort_by,
        sort_order=sort_order,
        limit=limit,
        offset=offset,
    )
    return Many([_with_attempt(entry) for entry in entries], total)


def _get_rollout(state: State, step: Step, *, rollout_id: Id) -> Pair | None:
    entry = state.entries.get(rollout_id)
    return _with_attempt(entry) if entry else None


def _update_rollout(state: State, step: Step, *, rollout_id: Id, changes: RolloutChanges) -> Pair:
    rollouts.update(state, step, rollout_id, changes)
    return _with_attempt(state.entries[rollout_id])


def _cancel_rollouts(
    state: State,
    step: Step,
    *,
    rollout_ids: list[Id] | None,
    group_id: Id | None,
    tags: Tags | None,
) -> list[Pair]:
    chosen = chosen_among(state, rollout_ids, group_id, tags)
    return [_with_attempt(state.entries[r.rollout_id]) for r in attempts.cancel(state, step, chosen)]


def chosen_among(
    state: State, rollout_ids: list[str] | None, group_id: str | None, tags: dict[str, Any] | None
) -> list[str]:
    """Ids of the rollouts that are named (None: any), in the group, and carry the tags, as far as these are given."""
    if group_id is None and not tags:
        return rollout_ids or []
    matching = rollouts.matching(state, group_id=group_id, tags=tags)
    wanted = None if rollout_ids is None else set(rollout_ids)
    return matching if wanted is None else [i for i in matching if i in wanted]


def finished_among(state: State, rollout_ids: Iterable[str]) -> list[Pair]:
    """The rollouts among these that are finished, in the order given; unknown ids are skipped."""
    found = (state.entries.get(rollout_id) for rollout_id in rollout_ids)
    return [_with_attempt(entry) for entry in found if entry is not None and entry.rollout.status in FINISHED]


def unfinished_among(state: State, rollout_ids: Iterable[str]) -> list[str]:
    """The rollouts among these that exist and are not finished."""
    completions, entries = state.completions, state.entries
    return [i for i in rollout_ids if i not in completions and i in entries]


def finished_by_now(state: State, rollout_ids: Iterable[str]) -> tuple[list[Pair], int]:
    """The answer of `wait`: those that are finished, and the newest cursor of the completion log."""
    return finished_among(state, rollout_ids), state.completions.last


def _wait(state: State, step: Step, *, rollout_ids: list[Id], timeout: float | None) -> tuple[list[Pair], int] | None:
    if (timeout is None or timeout > 0) and unfinished_among(state, rollout_ids):
        return None
    return finished_by_now(state, rollout_ids)


def _sort_out(
    state: State, step: Step, *, rollout_ids: list[Id], instead_of: Whole | None = None
) -> tuple[list[Pair], tuple[int, list[str], int | None]]:
    """The finished rollouts among these in the order of completion; then a cursor, the unfinished ones, and a token.

    All of one moment. By the token `completed` is asked for what finishes of the unfinished ones; it takes the place
    of an earlier token.
    """
    assert step.session is not None
    if instead_of is not None:
        state.watched.drop(instead_of)
    done = finished_among(state, rollout_ids)
    done.sort(key=lambda pair: state.completions.place(pair[0].rollout_id))
    rest = unfinished_among(state, rollout_ids)
    token = state.watched.keep(step.session.session_id, rest, step.seed) if rest else None
    return done, (state.completions.last, rest, token)


def _completed(
    state: State,
    step: Step,
    *,
    cursor: Whole | None,
    limit: Positive,
    timeout: Seconds,
    filters: Filters,
    among: Whole | None = None,
) -> tuple[list[Pair], int | None] | None:
    found, cursor = completed_after(state, cursor, limit, filters, state.watched.find(among))
    return (found, cursor) if found or timeout <= 0 else None


def completed_after(
    state: State, cursor: int | None, limit: int, filters: Mapping[str, Any], among: Container[str] | None = None
) -> tuple[list[Pair], int | None]:
    """Finished rollouts that follow a cursor in completion order (only those `among` some), and the next cursor."""
    found: list[Pair] = []
    tags, others = queries.has_tags(filters.get("tags") or {}), {k: v for k, v in filters.items() if k != "tags"}
    for sequence, rollout_id in state.completions.after(cursor):
        if len(found) == limit:
            break
        cursor = sequence
        if among is not None and rollout_id not in among:
            continue
        entry = state.entries[rollout_id]
        if tags(entry.rollout) and all(getattr(entry.rollout, k) == v for k, v in others.items() if v is not None):
            found.append(_with_attempt(entry))
    return found, cursor


def _changes(
    state: State, step: Step, *, cursor: Whole | None, kinds: list[str] | None, limit: Positive, timeout: Seconds
) -> tuple[list[Change], int | None] | None:
    found, cursor = changes_after(state, cursor, kinds, limit)
    return (found, cursor) if found or timeout <= 0 else None


def changes_after(
    state: State, cursor: int | None, kinds: list[str] | None, limit: int
) -> tuple[list[Change], int | None]:
    """Changes that follow a cursor, and the next cursor."""
    return state.changes.after(cursor, None if kinds is None else frozenset(kinds), limit)


def _release(state: State, step: Step, *, rollout_ids: list[Id]) -> int:
    return rollouts.release(state, rollout_ids)


def _delete_rollouts(state: State, step: Step, *, rollout_ids: list[Id]) -> int:
    return retention.delete(state, step, rollout_ids)


# -- attempts ----------------------------------------------------------------------------------------------------------


def _start_attempt(state: State, step: Step, *, rollout_id: Id, worker_id: Id | None) -> Pair:
    workers.admit(state, worker_id)
    return _with_attempt(attempts.start_attempt(state, step, rollout_id, worker_id))


def _query_attempts(
    state: State, step: Step, *, rollout_id: Id, sort_by: str | None, sort_order: SortOrder, limit: int, offset: int
) -> Many:
    entry = state.entries.get(rollout_id)
    found = queries.arrange(entry.attempts if entry else [], sort_by, sort_order, queries.ATTEMPT_SORT)
    return Many(queries.page(found, limit, offset), len(found))


def _get_latest_attempt(state: State, step: Step, *, rollout_id: Id) -> Attempt | None:
    entry = state.entries.get(rollout_id)
    return entry.latest if entry else None


def _update_attempt(state: State, step: Step, *, rollout_id: Id, attempt_id: Id, changes: AttemptChanges) -> Attempt:
    workers.admit(state, changes.get("worker_id"))
    return attempts.report(state, step, rollout_id, attempt_id, changes)


def _heartbeat(state: State, step: Step, *, attempts_alive: list[tuple[Id, Id]]) -> list[tuple[str, str]]:
    return attempts.heartbeat(state, step, attempts_alive)


def _decline(state: State, step: Step, *, rollout_id: Id, attempt_id: Id) -> bool:
    assert step.session is not None
    return claims.take_back(state, step, step.session, (rollout_id, attempt_id), why="declined")


def _acknowledge(state: State, step: Step, *, keys: list[tuple[Id, Id | Positive]]) -> list[HandedKey]:
    assert step.session is not None
    handed: list[Any] = [(key[0], key[1]) for key in keys]
    return claims.acknowledge(state, step, step.session, handed)


# -- spans -------------------------------------------------------------------------------------------------------------


def _spans(rollout_id: str, attempt_id: str, rows: list[list[Any]]) -> list[Span]:
    return [Span(rollout_id, attempt_id, *row) for row in rows]


def _add_spans(
    state: State,
    step: Step,
    *,
    rollout_id: Id,
    attempt_id: Id,
    spans: list[SpanRow],
    chain: InChain | None = None,
) -> list[tuple[bool, int]]:
    made = _spans(rollout_id, attempt_id, spans)
    written = attempts.add_spans(state, step, rollout_id, attempt_id, made)
    return [(stored, span.sequence_id) for stored, span in zip(written.stored, made, strict=True)]


def _finish(
    state: State, step: Step, *, rollout_id: Id, attempt_id: Id, spans: list[SpanRow], changes: FinalChanges
) -> tuple[Attempt, list[bool]]:
    made = _spans(rollout_id, attempt_id, spans)
    error = changes.get("error")
    more = {} if error is None else {"error": bounded_error(error)}
    attempt, written = attempts.finish(state, step, rollout_id, attempt_id, made, {**changes, **more})
    return attempt, written.stored


def _next_numbers(state: State, step: Step, *, rollout_ids: list[Id]) -> list[int]:
    return [state.spans.next_number(i, known=i in state.entries) for i in rollout_ids]


def _query_spans(
    state: State,
    step: Step,
    *,
    rollout_id: Id,
    attempt_id: Id | None,
    equal: SpanTexts,
    containing: SpanTexts,
    filter_logic: Logic,
    sort_by: str | None,
    sort_order: SortOrder,
    limit: int,
    offset: int,
    allow_partial: bool,
) -> Many:
    conditions = [queries.equals(name, value) for name, value in equal.items()]
    conditions += [queries.contains(name, str(part)) for name, part in containing.items()]
    found = queries.select(_spans_of(state, rollout_id, attempt_id, allow_partial), conditions, filter_logic)
    found = queries.arrange(found, sort_by, sort_order, queries.SPAN_SORT)
    return Many(queries.page(found, limit, offset), len(found))


def _query_many_spans(
    state: State, step: Step, *, rollout_ids: list[Id], attempt_id: Id | None, allow_partial: bool
) -> Many:
    spans = [
        span
        for rollout_id in dict.fromkeys(rollout_ids)
        for span in queries.arrange(
            _spans_of(state, rollout_id, attempt_id, allow_partial), "sequence_id", "asc", queries.SPAN_SORT
        )
    ]
    return Many(spans, len(spans))


def _spans_of(state: State, rollout_id: str, attempt_id: str | None, allow_partial: bool) -> list[Span]:
    if rollout_id in state.spans.evicted and not allow_partial:
        raise SpansEvictedError(rollout_id)
    entry = state.entries.get(rollout_id)
    if entry is None:
        return []
    rollouts.mark_read(state, entry)
    if attempt_id == "latest":
        if entry.latest is None:
            return []
        attempt_id = entry.latest.attempt_id
    return state.spans.of(rollout_id, attempt_id)


# -- consumers ---------------------------------------------------------------------------------------------------------


Batch = tuple[list[Pair], int]  #: rollouts, and its number


def _take(
    state: State,
    step: Step,
    *,
    consumer: Id,
    count: Positive,
    timeout: Seconds = 0.0,
    mode: Mode | None = None,
    tags: Tags | None = None,
    queue: Id | None = None,
    group_id: Id | None = None,
    status_in: list[Trainable] | None = None,
    max_open: Positive = 1,
    of: int | None = None,
) -> Batch | None:
    """A batch; None if waiting may bring a better one. `of` asks for what a parked call was handed."""
    asked = wanted.make_filter(mode=mode, tags=tags, queue=queue, group_id=group_id, status_in=status_in)
    if of is not None and step.session is not None:
        for key in step.session.replies.handed.pop(of, []):
            if claims.is_batch(key) and (found := batch_again(state, step.session, key)) is not None:
                return found
    known = training.prepare(state, step, consumer, asked, max_open)
    if timeout > 0 and not training.is_ready(state, known, count):
        return None
    return take(state, step, consumer, count)


def take(state: State, step: Step, consumer: str, count: int) -> Batch:
    """A batch of what there is now, up to so many."""
    number, rollout_ids = training.take(state, step, consumer, count)
    return [_with_attempt(state.entries[rollout_id]) for rollout_id in rollout_ids], number


def batch_again(state: State, session: Session, key: BatchKey) -> Batch | None:
    """A batch as it is now, for the session that holds it; None if it does no longer."""
    known = state.consumers.get(key[0])
    if known is None or known.holders.get(key[1]) != session.session_id:
        return None
    return [_with_attempt(state.entries[i]) for i in known.batches[key[1]] if i in state.entries], key[1]


def _get_batch(state: State, step: Step, *, consumer: Id, batch: int) -> Many:
    """What is in a batch that is open, for a caller that has lost a part of its answer."""
    found = [_with_attempt(state.entries[i]) for i in training.rollouts_of(state, consumer, batch)]
    return Many(found, batch)


def _ack(state: State, step: Step, *, consumer: Id, batch: int, at_step: Whole, note: Text | None) -> None:
    training.acknowledge(state, step, consumer, batch, at_step, note)


def _nack(state: State, step: Step, *, consumer: Id, batch: int) -> None:
    training.give_back(state, step, consumer, batch)


def _checkpoint(state: State, step: Step, *, consumer: Id, at_step: Whole) -> int:
    return training.checkpoint(state, step, consumer, at_step)


def _rewind(state: State, step: Step, *, consumer: Id, at_step: Whole) -> int:
    return training.rewind(state, step, consumer, at_step)


def _forget_consumer(state: State, step: Step, *, consumer: Id) -> int:
    return training.forget(state, step, consumer)


def _ledger(state: State, step: Step, *, consumer: Id) -> Many:
    rows = training.ledger(state, consumer)
    return Many(rows, len(rows))


# -- resources and workers ---------------------------------------------------------------------------------------------


def _put_resources(
    state: State,
    step: Step,
    *,
    resources_id: Id | None,
    resources: Encoded,
    policy_version: int | None,
    holds_objects: bool,
    objects: list[tuple[Address | None, Whole]] | None = None,
) -> Resources:
    """A new version, without what was published, which the caller has. `objects`: address and size of each."""
    before = state.resources.policy_version
    made = state.resources.publish(
        step.new_id("rs-", 12, state.resources) if resources_id is None else resources_id,
        resources,
        now=step.now,
        policy_version=policy_version,
        holds_objects=holds_objects,
        objects=objects,
        publisher=step.session.session_id if step.session is not None else None,
    )
    held_back.release(state, step, made.resources_id)
    detail: dict[str, Any] = {"resources_id": made.resources_id, "version": made.version}
    if policy_version is not None:
        detail["policy_version"] = policy_version
        if before is not None and policy_version < before:
            detail["lower_than"] = before  # a model may be rolled back; whoever debugs staleness wants to know
    state.changes.append(step.now, "resources", **detail)
    return made.evolve(resources=None)


def _get_resources(state: State, step: Step, *, resources_id: Id, version: int | None) -> Resources | None:
    return state.resources.get(resources_id, version)


def _get_latest_resources(state: State, step: Step) -> Resources | None:
    return state.resources.latest()


def _query_resources(
    state: State,
    step: Step,
    *,
    resources_id: Id | None,
    resources_id_contains: str | None,
    sort_by: str | None,
    sort_order: SortOrder,
    limit: int,
    offset: int,
) -> Many:
    conditions = [queries.equals("resources_id", resources_id)] if resources_id is not None else []
    if resources_id_contains is not None:
        conditions.append(queries.contains("resources_id", resources_id_contains))
    found = queries.select(state.resources.all_newest(), conditions, "and")
    found = queries.arrange(found, sort_by, sort_order, queries.RESOURCES_SORT)
    return Many(queries.page(found, limit, offset), len(found))


def _delete_resources(state: State, step: Step, *, resources_id: Id) -> None:
    state.resources.delete(resources_id)
    held_back.release(state, step, resources_id)
    state.changes.append(step.now, "resources_deleted", resources_id=resources_id)


def _hold_objects(state: State, step: Step, *, versions: list[tuple[Id, Positive, Encoded]]) -> list[tuple[str, int]]:
    """A process says anew which objects it has; those that it may let go of."""
    assert step.session is not None
    found = [(name, version, told.refs if isinstance(told, Payload) else ()) for name, version, told in versions]
    return held_back.hold_objects(state, step, step.session, found)


def _unread(
    state: State, step: Step, *, rollout_id: Id, attempt_id: Id, resources_id: Id, version: Positive, error: Text
) -> None:
    """An attempt could not read its resources."""
    held_back.unread(state, step, rollout_id, attempt_id, resources_id, version, error)


def _update_worker(state: State, step: Step, *, worker_id: Id, changes: WorkerChanges) -> Worker:
    workers.admit(state, worker_id)
    return workers.update(state, step, worker_id, changes)


def _query_workers(
    state: State,
    step: Step,
    *,
    status_in: list[WorkerStatus] | None,
    worker_id_contains: str | None,
    filter_logic: Logic,
    sort_by: str | None,
    sort_order: SortOrder,
    limit: int,
    offset: int,
) -> Many:
    found, total = workers.find(
        state,
        status_in=status_in,
        worker_id_contains=worker_id_contains,
        filter_logic=filter_logic,
        sort_by=sort_by,
        sort_order=sort_order,
        limit=limit,
        offset=offset,
    )
    return Many(found, total)


def _get_worker(state: State, step: Step, *, worker_id: Id) -> Worker | None:
    return state.workers.get(worker_id)


# -- sessions ----------------------------------------------------------------------------------------------------------


def _report_session(
    state: State, step: Step, *, session_id: Id | None, worker_id: Id | None = None, stopped: bool = False
) -> bool:
    """Somebody saw that a process has ended (a pool, its runner), or has `stopped` it: its session.

    If that is not known, those that hold work of its worker.
    """
    session = state.sessions.get(session_id or "")
    sessions = [session] if session is not None else _sessions_of_worker(state, worker_id)
    live = [session for session in sessions if session.ended_at is None and not session.eternal]
    for session in live:
        claims.end_session(state, step, session, why=claims.STOPPED if stopped else "reported")
    return bool(live)


def _sessions_of_worker(state: State, worker_id: str | None) -> list[Session]:
    """The sessions that hold an attempt of a worker; by what they hold, since a worker's past may be long."""

    def is_of_worker(key: AttemptKey) -> bool:
        latest = state.entries[key[0]].latest
        return latest is not None and latest.attempt_id == key[1] and latest.worker_id == worker_id

    if worker_id is None:
        return []
    return [
        session
        for session in state.sessions.values()
        if any(map(is_of_worker, session.held)) or any(map(is_of_worker, session.claims))
    ]


LONG_ITEMS = 512  #: an answer to a bulk call with more rollouts is a long one,
LONG_BYTES = 512 * 1024  #: and one with more bytes

CHAINS_KEPT = 64  #: bulk calls of a session of which the last part has not come

#: whether something says of an operation which part of a bulk call it is
is_part: Callable[[Any], bool] = checker(Part)


def run(state: State, step: Step, verb: str, arguments: dict[str, Any]) -> Any:
    """Run one verb, if these are arguments of it."""
    spec = VERBS.get(verb)
    if spec is None or not spec.fits(arguments):
        raise refusal(step, spec, verb, arguments)
    return perform(state, step, spec, arguments)


def refusal(step: Step, spec: Verb | None, verb: str, arguments: dict[str, Any]) -> InvalidValueError:
    """Why these are no arguments of a verb; the other parts of a bulk call are refused alike."""
    if spec is None:
        return InvalidValueError("operation", verb, "a verb of this store")
    error = spec.schema.refusal(verb, arguments)
    if is_chained(spec, arguments) and step.session is not None:
        _part(step.session, arguments["chain"], refuse=error)
    return error


def is_chained(spec: Verb, arguments: dict[str, Any]) -> bool:
    """Whether an operation is a part of a bulk call, whatever else it says."""
    return is_part(arguments.get("chain")) and "chain" in spec.schema.names


def perform(state: State, step: Step, spec: Verb, arguments: dict[str, Any]) -> Any:
    """Run a verb with arguments that fit.

    An argument `chain` (an id, and whether this is the last part) ties the parts of one bulk call together: once a
    part was refused, later parts are refused alike without being tried.
    """
    session = step.session
    if session is not None and session.ended_at is not None:  # by an operation before it in the same batch
        raise SessionEndedError(session.session_id)
    if arguments.get("chain") is None:
        return spec.run(state, step, **arguments)
    assert session is not None
    chain = _part(session, arguments["chain"])
    try:
        return spec.run(state, step, **(arguments | {"chain": chain}))
    except StoreError as error:
        chain.refusal = error
        chain.notes.clear()
        raise


def _end_chain(state: State, step: Step, *, chain_id: int) -> bool:
    """The caller of a bulk call has gone before its last part left; whether there was anything of it."""
    assert step.session is not None
    return step.session.chains.pop(chain_id, None) is not None


def _part(session: Session, given: tuple[int, bool], refuse: StoreError | None = None) -> Chain:
    """The chain that a part belongs to, which ends with its last part; raises what refused an earlier part."""
    chain_id, is_last = given
    chain = session.chains.setdefault(chain_id, Chain())
    chain.is_last = is_last
    if is_last:
        del session.chains[chain_id]
    elif len(session.chains) > CHAINS_KEPT:
        del session.chains[next(iter(session.chains))]
    if refuse is not None:
        chain.refusal = chain.refusal or refuse
        chain.notes.clear()
    elif chain.refusal is not None:
        raise again(chain.refusal)
    return chain


def _claims_of(arguments: dict[str, Any], claimed: Any) -> list[HandedKey]:
    """Keys of what a dequeue answered, as records or as rows."""
    keys: list[HandedKey] = []
    for rollout, attempt, _ in claimed or ():
        if isinstance(attempt, (list, tuple)):
            keys.append((attempt[0], attempt[1]))
        else:
            keys.append((rollout.rollout_id, attempt.attempt_id))
    return keys


def _batch_of(arguments: dict[str, Any], taken: Any) -> list[HandedKey]:
    """The key of the batch that a take answered, if it is one."""
    number = taken[1] if taken else 0
    return [(arguments["consumer"], number)] if number else []


def handed_again(state: State, session: Session, keys: list[HandedKey]) -> Any:
    """What an answer handed over, as it is now; None if the session holds nothing of it any more."""
    for key in keys:
        if claims.is_batch(key):
            return batch_again(state, session, key)
    return claims.claimed_again(state, session, [key for key in keys if claims.is_claim(key)]) or None


_ONE = ("rollout_id",)
_LIST = ("rollout_ids",)

VERBS: dict[str, Verb] = {
    "start_rollout": Verb(_start_rollout),
    "enqueue": Verb(_enqueue),
    "dequeue": Verb(_dequeue, hands=_claims_of, waits_for="work", serves="queues"),
    "query_rollouts": Verb(_query_rollouts, changes=False, names=("rollout_id_in",)),
    "get_rollout": Verb(_get_rollout, changes=False, names=_ONE),
    "update_rollout": Verb(_update_rollout, names=_ONE),
    "wait": Verb(_wait, changes=False, waits_for="rollouts"),
    "sort_out": Verb(_sort_out, changes=False),
    "completed": Verb(_completed, changes=False, waits_for="completions"),
    "changes": Verb(_changes, changes=False, waits_for="changes"),
    "cancel_rollouts": Verb(_cancel_rollouts, names=_LIST),
    "release": Verb(_release, names=_LIST),
    "delete_rollouts": Verb(_delete_rollouts, names=_LIST),
    "start_attempt": Verb(_start_attempt, names=_ONE),
    "query_attempts": Verb(_query_attempts, changes=False, names=_ONE),
    "get_latest_attempt": Verb(_get_latest_attempt, changes=False, names=_ONE),
    "update_attempt": Verb(_update_attempt, names=_ONE),
    "heartbeat": Verb(_heartbeat),
    "decline": Verb(_decline, names=_ONE),
    "acknowledge": Verb(_acknowledge),
    "add_spans": Verb(_add_spans, names=_ONE),
    "finish": Verb(_finish, names=_ONE),
    "next_numbers": Verb(_next_numbers),
    "query_spans": Verb(_query_spans, changes=False, names=_ONE),
    "query_many_spans": Verb(_query_many_spans, changes=False, names=_LIST),
    "take": Verb(_take, hands=_batch_of, waits_for="batch"),
    "get_batch": Verb(_get_batch, changes=False),
    "ack": Verb(_ack),
    "nack": Verb(_nack),
    "checkpoint": Verb(_checkpoint),
    "rewind": Verb(_rewind),
    "forget_consumer": Verb(_forget_consumer),
    "ledger": Verb(_ledger, changes=False),
    "put_resources": Verb(_put_resources),
    "get_resources": Verb(_get_resources, changes=False),
    "get_latest_resources": Verb(_get_latest_resources, changes=False),
    "query_resources": Verb(_query_resources, changes=False),
    "delete_resources": Verb(_delete_resources),
    "hold_objects": Verb(_hold_objects),
    "unread": Verb(_unread, names=_ONE),
    "update_worker": Verb(_update_worker),
    "query_workers": Verb(_query_workers, changes=False),
    "get_worker": Verb(_get_worker, changes=False),
    "report_session": Verb(_report_session),
    "end_chain": Verb(_end_chain),
}


def hands_over(verb: str) -> Callable[[dict[str, Any], Any], list[HandedKey]] | None:
    """How to find the keys of what the answer of a verb hands over; None if it hands over nothing."""
    spec = VERBS.get(verb)
    return spec.hands if spec is not None else None


HANDING = {name: verb.hands for name, verb in VERBS.items() if verb.hands}  #: whose answers are to be acknowledged
CHANGING = frozenset(name for name, verb in VERBS.items() if verb.changes)  #: what must not run twice


# -- changes that no caller asks for -----------------------------------------------------------------------------------


def _pause(state: State, step: Step, seconds: float) -> None:
    expiry.pause(state, step, seconds)


def _advance(state: State, step: Step, *due: list[Any]) -> None:
    expiry.advance(state, step, expiry.Due(*due))


def _hand_over(
    state: State, step: Step, session_id: str, ticket: int, queues: list[str], limit: int, worker_id: str | None
) -> list[Entry]:
    """Give work to a call that waits for it; it was told that it waits, so that it came away empty is no news."""
    session = state.sessions[session_id]
    step.session = session
    claimed = claims.claim(state, step, queues=queues, limit=limit, worker_id=worker_id, note_empty=False)
    if claimed:
        keys = [(entry.rollout.rollout_id, entry.attempts[-1].attempt_id) for entry in claimed]
        session.replies.hand(ticket, keys, session.claims, session.batches)
    return claimed


def _hand_batch(state: State, step: Step, session_id: str, ticket: int, consumer: str, count: int) -> Batch:
    """Give a call that waits for a batch what there is."""
    session = step.session = state.sessions[session_id]
    batch = take(state, step, consumer, count)
    if batch[1]:
        session.replies.hand(ticket, [(consumer, batch[1])], session.claims, session.batches)
    return batch


def _take_back(state: State, step: Step, session_id: str, keys: list[HandedKey]) -> None:
    """The caller of a parked call had gone when its answer came."""
    for key in keys:
        claims.take_back(state, step, state.sessions[session_id], key, why="declined")


def _acknowledge_for(state: State, step: Step, session_id: str, keys: list[HandedKey]) -> list[HandedKey]:
    return claims.acknowledge(state, step, state.sessions[session_id], keys)


def _open_session(state: State, step: Step, session_id: str, eternal: bool, process: list[Any] | None = None) -> None:
    claims.open_session(state, step, session_id, eternal=eternal, process=process)


def _end_session(state: State, step: Step, session_id: str, why: str) -> None:
    claims.end_session(state, step, state.sessions[session_id], why=why)


def _hold_back(state: State, step: Step, resources_id: str, version: int, why: str) -> bool:
    return held_back.hold_back(state, step, resources_id, version, why)


def _forget_workers(state: State, step: Step, worker_ids: list[str]) -> None:
    workers.forget(state, worker_ids)


#: Changes of the state that time, waiting, and the life of sessions bring, under the names by which a journal knows
#: them. Whoever has a clock decides that one is needed, and with which arguments; doing it is the same at a replay.
STEPS: dict[str, Callable[..., Any]] = {
    "pause": _pause,
    "advance": _advance,
    "hand_over": _hand_over,
    "hand_batch": _hand_batch,
    "take_back": _take_back,
    "acknowledge": _acknowledge_for,
    "open_session": _open_session,
    "end_session": _end_session,
    "hold_back": _hold_back,
    "forget_workers": _forget_workers,
}
