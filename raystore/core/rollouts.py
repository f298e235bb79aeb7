"""Verbs of rollouts: enqueue, update, release, query; and wait for some to finish, for completions, or for changes.

`create` makes a rollout, `begin` gives it an attempt, and `move` is the one way in which its status changes: it keeps
queue, completion log, change feed and end time in step.
Not here: starting, settling and cancelling attempts (`attempts`), handing work out (`claims`).
"""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from itertools import groupby, islice
from typing import Any

from raystore.core import queries, saved
from raystore.core.evaluation_table import LOST
from raystore.core.indexes import Key, keys_of
from raystore.core.lifecycle import ACTIVE, BUSY, FINISHED, QUEUED, RolloutStatus, is_live, notice_of
from raystore.core.payload import digest_of_bytes, is_digest, of_rollout, same_content, size_of
from raystore.core.queues import ASIDE, EVALUATED, PLAIN
from raystore.core.records import Attempt, Change, Config, Many, Rollout, Span
from raystore.core.schema import (
    Filters,
    Id,
    Logic,
    Must,
    Positive,
    Request,
    RolloutChanges,
    Seconds,
    SortOrder,
    SpanTexts,
    Whole,
)
from raystore.core.state import CLAIM_SECONDS, Entry, InChain, Pair, State, Step
from raystore.core.training import enter_eviction, enter_retention, fits, follow, reconsider, settle
from raystore.errors import (
    ConflictError,
    InvalidValueError,
    OverloadedError,
    SealedError,
    SessionEndedError,
    SpansEvictedError,
)

RETRY_AFTER_SECONDS = 1.0

#: The arguments that make a rollout, in the order in which they are compared for a caller-given id.
CONTENT = ("input", "mode", "resources_id", "config", "metadata", "group_id", "queue", "priority", "tags")

_VALUES = ("input", "metadata")  # a user's: of these the digests are compared, which the request brings

LONG_ITEMS = 512  #: an answer to a bulk call with more rollouts is a long one,
LONG_BYTES = 512 * 1024  #: and one with more bytes


def content_of(request: Mapping[str, Any]) -> tuple[Any, ...]:
    """The values that must be equal when a caller-given id is enqueued again, in the order of `CONTENT`."""
    values = [request.get(name) for name in _VALUES]
    digests = dict(zip(_VALUES, request.get("digests") or map(digest_of_bytes, values), strict=True))
    return tuple(digests[name] if name in digests else request.get(name) for name in CONTENT)


def create(state: State, step: Step, status: str, request: Mapping[str, Any], latest: str | None) -> Entry:
    """Make a rollout from a request (the arguments of `enqueue_rollout`)."""
    rollout_id = request.get("rollout_id")
    resources_id = request.get("resources_id")
    config = request.get("config")
    rollout = Rollout(
        rollout_id=step.mint("ro-", 12, state.entries) if rollout_id is None else rollout_id,
        input=request["input"],
        start_time=step.now,
        end_time=None,
        mode=request.get("mode"),
        resources_id=latest if resources_id is None else resources_id,
        status=status,
        config=state.settings.default_config if config is None else Config.of(config),
        metadata=request.get("metadata"),
        group_id=request.get("group_id"),
        queue=request.get("queue", "default"),
        priority=request.get("priority", 0),
        tags=request.get("tags") or {},
        reward=None,
        requeued_from=request.get("requeued_from"),
    )
    given = content_of(request) if rollout_id is not None else None
    size = of_rollout(rollout.input, rollout.metadata, rollout.tags)
    state.rollouts_made += 1
    state.meters.at(step.now).enqueued += 1
    entry = Entry(rollout, state.rollouts_made, given, size, former=status)
    state.entries[rollout.rollout_id] = entry
    state.touch(rollout.rollout_id)
    state.payload_bytes += size
    for kind, value in keys_of(rollout, None):
        state.indexes.move(rollout.rollout_id, kind, None, value)
    if (evaluation := request.get("evaluation")) is not None:  # which no request from outside has
        state.evaluations.join(rollout.rollout_id, evaluation, status)
    if state.consumers:
        follow(state, entry)
    if state.gates.limits and status in ACTIVE:
        count_running(state, rollout, 1)
    return entry


def existing_of(state: State, request: Mapping[str, Any]) -> Entry | None:
    """The rollout that a caller-given id names already, if its content is the same."""
    rollout_id = request.get("rollout_id")
    entry = state.entries.get(rollout_id) if rollout_id is not None else None
    if entry is None:
        return None
    differing = []
    for name, before, now in zip(CONTENT, entry.given or (), content_of(request), strict=entry.given is not None):
        if name in _VALUES and not is_digest(before):  # enqueued in a journal of format 1
            same = same_content(before, request.get(name))
        else:
            same = before == now
        if not same:
            differing.append(name)
    if entry.given is None or differing:
        raise ConflictError(entry.rollout.rollout_id, differing or ["origin"])
    return entry


def enqueue(
    state: State, step: Step, *, requests: list[Request], admit: Whole | None = None, chain: InChain | None = None
) -> list[Pair] | tuple[list[Pair], int]:
    """Enqueue all requests or none. Parts of one call are kept until its last part, whose answer is for all.

    `admit` is the number of requests in all parts, so that a missing part is noticed.
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
    made = enqueue_many(state, step, requests, latest=latest)
    pairs = [state.entries[rollout.rollout_id].pair for rollout in made]
    is_long = chain is not None and (
        len(pairs) > LONG_ITEMS or sum(size_of(r.input) + size_of(r.metadata) for r in made) > LONG_BYTES
    )
    return (pairs, len(pairs)) if is_long else pairs  # a long answer is sent in parts


def enqueue_many(
    state: State, step: Step, requests: Sequence[Mapping[str, Any]], *, latest: str | None
) -> list[Rollout]:
    """Put rollouts at the tail of their queues; all of them or none. Those that exist are not enqueued again.

    `latest` is the resources id for requests that name none.
    """
    existing = [existing_of(state, request) for request in requests]
    check_requests(state, requests, new=existing.count(None))
    made = []
    for request, entry in zip(requests, existing, strict=True):
        if entry is None:
            entry = create(state, step, "queuing", request, latest)
            state.spans.adopt_numbers(entry.rollout.rollout_id)
            enter_queue(state, step, entry, state.queues.tail(entry.rollout.priority))
            state.changes.append(step.now, "enqueued", entry.rollout.rollout_id)
        made.append(entry.rollout)
    return made


def check_requests(state: State, requests: Sequence[Mapping[str, Any]], *, new: int) -> None:
    """Refuse requests with the same id, and so many new rollouts that more would wait than may."""
    seen: dict[str, Mapping[str, Any]] = {}
    for request in requests:
        rollout_id = request.get("rollout_id")
        if rollout_id is not None and seen.setdefault(rollout_id, request) is not request:
            raise InvalidValueError("rollout_id", rollout_id, "each caller-given id once per call")
    limit = state.settings.max_queued
    if limit is not None and new and len(state.queues) + new > limit:
        raise OverloadedError(len(state.queues), limit, RETRY_AFTER_SECONDS, new)


def enter_queue(state: State, step: Step, entry: Entry, order: tuple[int, int], *, until: float | None = None) -> None:
    """Let a rollout wait at its place in its queue; a suspect waits aside, for a session of its own.

    With `until` it backs off, and is not handed out before that instant.
    """
    rollout = entry.rollout
    entry.order = order
    if rollout.group_id is not None:
        state.note_member(rollout)
    if until is not None:
        state.queues.back_off(rollout.queue, rollout.rollout_id, order, until)
        state.deadlines.guard(rollout.rollout_id, until)
        return
    line = PLAIN
    if state.evaluations.by_rollout and rollout.rollout_id in state.evaluations.by_rollout:
        evaluation = state.evaluations.of_rollout(rollout.rollout_id)
        if evaluation is not None and evaluation.lost is not None:
            state.queues.hold(rollout.queue, rollout.rollout_id, order, LOST)
            return
        line = EVALUATED
    if rollout.resources_id in state.resources.missing and not (
        line == EVALUATED and state.evaluations.pin_of(rollout) is not None
    ):
        state.queues.hold(rollout.queue, rollout.rollout_id, order, rollout.resources_id)
        return
    if state.feeds.by_group and (hindrance := state.feeds.hindrance(rollout)) is not None:
        state.queues.hold(rollout.queue, rollout.rollout_id, order, hindrance)
        return
    state.queues.put(rollout.queue, rollout.rollout_id, order, line=ASIDE if entry.suspect else line)
    if entry.suspect:
        state.suspects[rollout.rollout_id] = step.age
        state.patience_deadlines.guard((False, rollout.rollout_id))
    state.effects.queues.add(rollout.queue)


def put_anew(state: State, step: Step, rollout_ids: Iterable[str]) -> None:
    """Let rollouts that wait keep their places, and be held back or not as things are now."""
    for rollout_id in rollout_ids:
        entry = state.entries[rollout_id]
        assert entry.order is not None
        unqueue(state, entry)
        enter_queue(state, step, entry, entry.order)


def unqueue(state: State, entry: Entry) -> None:
    """Take a rollout out of line."""
    rollout_id = entry.rollout.rollout_id
    state.queues.discard(rollout_id)
    if state.suspects:
        stop_waiting(state, rollout_id)


def end_backoff(state: State, step: Step, entry: Entry) -> None:
    """Let a rollout that backs off wait like any other, at its place."""
    assert entry.order is not None
    unqueue(state, entry)
    enter_queue(state, step, entry, entry.order)
    state.changes.append(step.now, "backoff_over", entry.rollout.rollout_id)


def stop_waiting(state: State, rollout_id: str) -> None:
    """Let a suspect not wait for a session of its own any more."""
    if state.suspects.pop(rollout_id, None) is None or state.suspects:
        return
    drained = state.sessions.get(state.drained or "")
    if drained is not None:  # nobody needs to be alone any more
        drained.reserved_since = None
    state.drained = None
    state.offer_all()


def move(
    state: State,
    step: Step,
    entry: Entry,
    status: str,
    *,
    keep_place: bool = False,
    kind: str | None = None,
    until: float | None = None,
) -> None:
    """Give a rollout a status, and do all that follows from it; if it is to wait, it backs off `until` an instant."""
    before = entry.rollout
    rollout_id = before.rollout_id
    end_time = None
    if status in FINISHED:
        end_time = step.now
        if entry.saved is not None and status != "failed":  # which somebody may requeue
            saved.drop(state, entry)
        state.completions.append(rollout_id)
        state.effects.finished.append(rollout_id)
        if before.status not in FINISHED:
            _count(state, step, entry, status)
    elif before.status in FINISHED:
        state.completions.discard(rollout_id)
        entry.read = False
    entry.rollout = before.evolve(status=status, end_time=end_time)
    if state.settings.on_disk:
        state.touched[rollout_id] = None
    if status in FINISHED or before.status in FINISHED:
        if state.consumers:
            follow(state, entry, has_finished=end_time is not None)
        enter_retention(state, entry)
    if status in QUEUED:
        if rollout_id not in state.queues.line_of:
            place = entry.order if keep_place else None
            enter_queue(state, step, entry, state.queues.tail(before.priority) if place is None else place, until=until)
    elif state.queues.discard(rollout_id) and state.suspects:
        stop_waiting(state, rollout_id)
    if status != before.status:
        state.indexes.move(rollout_id, "status", before.status, status)
        if before.group_id is not None:
            state.note_member(before)
        if state.evaluations.by_rollout and rollout_id in state.evaluations.by_rollout:
            state.evaluations.move(rollout_id, status)
        if state.gates.limits and (more := (status in ACTIVE) - (before.status in ACTIVE)):
            count_running(state, before, more)
        attempt_id = entry.attempts[-1].attempt_id if entry.attempts else None
        state.changes.append(step.now, kind or status, rollout_id, attempt_id)
        if rollout_id in state.spans.by_rollout and state.spans.has(rollout_id):
            enter_eviction(state, entry)
    config = before.config
    if status in ACTIVE and (config.timeout_seconds is not None or config.unresponsive_seconds is not None):
        state.deadlines.guard(rollout_id)


def _count(state: State, step: Step, entry: Entry, status: str) -> None:
    """Let the meters know that a rollout finishes with this status."""
    rollout, latest = entry.rollout, entry.latest
    if latest is None:
        version = (rollout.resources_id, None)
        state.meters.finished(step.now, status, status, rollout.mode, version, None, rollout.reward)
        return
    number = latest.resources_version if latest.policy_version is None else latest.policy_version
    state.meters.finished(
        step.now,
        status,
        (latest.outcome or status) if status != "cancelled" else status,
        rollout.mode,
        (rollout.resources_id, number),
        step.now - latest.start_time,
        rollout.reward if latest.reward is None else latest.reward,
    )


def count_running(state: State, rollout: Rollout, more: int) -> None:
    """Count that one more rollout of a limited queue runs, or (-1) one less, which may make room for another."""
    limit = state.gates.limits.get(rollout.queue)
    if limit is not None:
        limit.running += more
        if more < 0 and state.queues.length(rollout.queue):
            state.effects.queues.add(rollout.queue)


def begin(state: State, step: Step, entry: Entry, *, worker_id: str | None, kind: str) -> Attempt:
    """Add an attempt to a rollout and set the rollout to preparing; an attempt that still ran is superseded.

    `kind` says whether it is "started" by its caller, or "claimed" by the session, which then is to acknowledge it.
    """
    rollout, session = entry.rollout, step.session
    before = entry.attempts[-1] if entry.attempts else None
    entry.former = rollout.status
    if before is not None and rollout.status not in FINISHED:
        state.notify(entry, before.attempt_id, "superseded")
    if before is not None and before.status in ACTIVE:
        state.put_attempt(entry, len(entry.attempts) - 1, before.evolve(outcome="superseded"))
    newest = None if rollout.resources_id is None else state.resources.newest(rollout.resources_id)
    if state.evaluations.by_rollout and (pin := state.evaluations.pin_of(rollout)) is not None:
        newest = state.resources.record_of(rollout.resources_id or "", pin)
    state.attempts_made += 1
    meters = state.meters
    bucket = meters.now if step.now < meters.ends else meters.at(step.now)
    bucket.started += 1
    if before is None:
        bucket.waited.append(step.now - rollout.start_time)
    taken: Container[str] = entry.holders
    if len(entry.holders) < len(entry.attempts):  # else each was made by a session, which holds it for ever
        taken = {attempt.attempt_id for attempt in entry.attempts}
    attempt = Attempt(
        rollout_id=rollout.rollout_id,
        attempt_id=step.mint("at-", 8, taken),
        sequence_id=before.sequence_id + 1 if before else 1,
        start_time=step.now,
        end_time=None,
        status="preparing",
        worker_id=worker_id,
        resources_version=newest.version if newest else None,
        policy_version=newest.policy_version if newest else state.resources.policy_version,
    )
    entry.refreshed = None
    if entry.saved is not None:
        saved.resume(entry, attempt)
    stamps = {"last_busy_time": step.now} | ({"last_dequeue_time": step.now} if kind == "claimed" else {})
    if session is not None:
        entry.holders[attempt.attempt_id] = session.session_id
        key = (rollout.rollout_id, attempt.attempt_id)
        if kind == "claimed":
            session.claims[key] = step.age
            state.claim_deadlines.guard((session.session_id, key), step.age + CLAIM_SECONDS)
        else:
            session.held[key] = None
    state.put_attempt(entry, len(entry.attempts), attempt)
    move(state, step, entry, "preparing", kind=kind)
    if attempt.resumed_from is not None:
        state.changes.append(
            step.now, "goes_on", rollout.rollout_id, attempt.attempt_id, resumed_from=attempt.resumed_from
        )
    if worker_id is not None:
        state.put_worker(
            worker_id, status=BUSY, current_rollout_id=rollout.rollout_id, current_attempt_id=attempt.attempt_id,
            **stamps,
        )  # fmt: skip
    return attempt


def update(state: State, step: Step, *, rollout_id: Id, changes: RolloutChanges) -> Pair:
    """Set fields of a rollout by hand; attempts and workers stay as they are."""
    entry = state.entry(rollout_id)
    fields: dict[str, Any] = {**changes}
    status = fields.pop("status", None)
    if status is not None and entry.is_sealed:
        raise SealedError(rollout_id, sorted(entry.taken))
    config = fields.pop("config", None)
    if config is not None:
        fields["config"] = Config.of(config)
    if fields:
        before = entry.rollout
        state.put_rollout(entry, before.evolve(**fields))
        more = of_rollout(entry.rollout.input, entry.rollout.metadata, entry.rollout.tags)
        more -= of_rollout(before.input, before.metadata, before.tags)
        state.payload_bytes += more
        entry.bytes += more
        if state.consumers and entry.rollout.mode != before.mode:
            reconsider(state, entry)
        if entry.rollout.resources_id != before.resources_id:
            _move_references(state, entry, before.resources_id)
            is_waiting = rollout_id in state.queues and state.queues.backs_off_until(rollout_id) is None
            if is_waiting and entry.order is not None:  # what it is held back for may be another
                unqueue(state, entry)
                enter_queue(state, step, entry, entry.order)
        if config is not None:
            state.deadlines.guard(rollout_id)
    if status is not None:
        latest = entry.latest
        if status in FINISHED and latest is not None and latest.status in ACTIVE:
            state.notify(entry, latest.attempt_id, notice_of(status))
        if status in QUEUED and state.queues.backs_off_until(rollout_id) is not None:  # it is wanted now
            end_backoff(state, step, entry)
        move(state, step, entry, status)
    return entry.pair


def _move_references(state: State, entry: Entry, before: str | None) -> None:
    """Move the references of running attempts from the old resources id `before` to the new id of their rollout."""
    if entry.refreshed is not None:
        if is_live(entry.attempts[-1]):
            state.resources.refer(before, entry.refreshed, -1)
        entry.refreshed = None
    for index, attempt in enumerate(entry.attempts):
        if is_live(attempt):
            state.resources.refer(before, attempt.resources_version, -1)
            newest = state.resources.newest(entry.rollout.resources_id)
            version = newest.version if newest else None
            entry.attempts[index] = attempt.evolve(resources_version=version)
            state.resources.refer(entry.rollout.resources_id, version, 1)


def release(state: State, step: Step, *, rollout_ids: list[Id]) -> int:
    """Mark rollouts as done with: first to be evicted or deleted. Unknown ids are skipped."""
    released = 0
    for rollout_id in rollout_ids:
        entry = state.entries.get(rollout_id)
        if entry is None or entry.released:
            continue
        entry.released = True
        state.touch(rollout_id)
        if entry.saved is not None:
            saved.drop(state, entry)
        released += 1
        settle(state, entry)
    return released


def mark_read(state: State, entry: Entry) -> None:
    """Note that somebody has read the spans of a finished rollout. It is no step: a journal does not keep it."""
    if entry.read or entry.rollout.status not in FINISHED:
        return
    entry.read = True
    settle(state, entry)


def get(state: State, step: Step, *, rollout_id: Id) -> Pair | None:
    """A rollout, if there is one of this id."""
    entry = state.entries.get(rollout_id)
    return entry.pair if entry else None


def query(
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
    """One page of rollouts, and how many match in all.

    `must` holds what applies under either logic: group_id, tags, queue, worker_id, mode.
    """
    conditions: list[queries.Condition] = []
    candidates: list[Collection[str]] = []  # each a superset of the matches under "and"
    if status_in is not None:
        conditions.append(queries.is_in("status", status_in))
        candidates.append([i for status in dict.fromkeys(status_in) for i in state.indexes.find(("status", status))])
    if rollout_id_in is not None:
        conditions.append(queries.is_in("rollout_id", rollout_id_in))
        candidates.append([i for i in dict.fromkeys(rollout_id_in) if i in state.entries])
    if rollout_id_contains is not None:
        conditions.append(queries.contains("rollout_id", rollout_id_contains))
    indexed: list[Collection[str]] = [state.indexes.find(key) for key in _index_keys(must)]
    if filter_logic == "and":
        indexed += candidates
    mode = must.get("mode")
    queries.check(filter_logic, sort_order)
    if not (indexed or conditions or mode) and sort_by in (None, "start_time"):
        newest_first = sort_by is not None and sort_order == "desc"
        return Many([e.pair for e in _by_age(state, newest_first, limit, offset)], len(state.entries))
    entries = _in_all(state, indexed) if indexed else list(state.entries.values())
    if mode is not None:
        entries = [entry for entry in entries if entry.rollout.mode == mode]
    matches = queries.select((entry.rollout for entry in entries), conditions, filter_logic)
    matches = queries.arrange(matches, sort_by, sort_order, queries.ROLLOUT_SORT)
    page = queries.page(matches, limit, offset)
    return Many([state.entries[rollout.rollout_id].pair for rollout in page], len(matches))


def _index_keys(must: Mapping[str, Any]) -> list[Key]:
    """The index keys under which a rollout with these fields is found; what is None may be anything."""
    named = (("group_id", "group"), ("queue", "queue"), ("worker_id", "worker"))
    keys = [(key, must[name]) for name, key in named if must.get(name) is not None]
    return keys + [("tag", tag) for tag in (must.get("tags") or {}).items()]


def _in_all(state: State, found: Iterable[Collection[str]]) -> list[Entry]:
    """The entries of the rollouts that are in all of these collections, in insertion order."""
    smallest, *others = sorted(found, key=len)
    sets = [other if isinstance(other, dict) else frozenset(other) for other in others]
    entries = [state.entries[i] for i in smallest if all(i in other for other in sets)]
    return sorted(entries, key=lambda entry: entry.number)


def _by_age(state: State, is_newest_first: bool, limit: int, offset: int) -> list[Entry]:
    """A page of all rollouts, which stand in the order of their start; those of one instant keep their order."""
    queries.page([], limit, offset)  # refuses what is no page
    entries: Iterable[Entry] = state.entries.values()
    if is_newest_first:
        newest = groupby(reversed(state.entries.values()), key=lambda entry: entry.rollout.start_time)
        entries = (entry for time, instant in newest for entry in _of_instant(state, time, instant))
    return list(islice(entries, offset, None if limit == -1 else offset + limit))


def _of_instant(state: State, time: float, backwards: Iterator[Entry]) -> Iterable[Entry]:
    """The rollouts of one instant in their order. A crowd is walked past once, and found from then on."""
    newest = next(backwards)
    crowd = state.crowds.find(time, newest.number)
    if crowd is None:
        there = [newest, *backwards][::-1]
        state.crowds.keep(time, newest.number, [entry.rollout.rollout_id for entry in there])
        return there
    # One that was deleted may have been made anew, at another time: then its number is a later one.
    found = map(state.entries.get, crowd)
    return (entry for entry in found if entry is not None and entry.number <= newest.number)


def chosen_among(
    state: State, rollout_ids: list[str] | None, group_id: str | None, tags: dict[str, Any] | None
) -> list[str]:
    """Ids of the rollouts that are named (None: any), in the group, and carry the tags, as far as these are given."""
    if group_id is None and not tags:
        return rollout_ids or []
    keys = _index_keys({"group_id": group_id, "tags": tags})
    found = [entry.rollout.rollout_id for entry in _in_all(state, map(state.indexes.find, keys))]
    named = None if rollout_ids is None else set(rollout_ids)
    return found if named is None else [i for i in found if i in named]


# -- their spans -------------------------------------------------------------------------------------------------------


def next_numbers(state: State, step: Step, *, rollout_ids: list[Id]) -> list[int]:
    return [state.spans.next_number(i, known=i in state.entries) for i in rollout_ids]


def query_spans(
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
    marks: bool = True,
) -> Many:
    conditions = [queries.equals(name, value) for name, value in equal.items()]
    conditions += [queries.contains(name, str(part)) for name, part in containing.items()]
    spans = _spans_of(state, rollout_id, attempt_id, allow_partial, marks=marks)
    found = queries.select(spans, conditions, filter_logic)
    found = queries.arrange(found, sort_by, sort_order, queries.SPAN_SORT)
    return Many(queries.page(found, limit, offset), len(found))


def query_many_spans(
    state: State,
    step: Step,
    *,
    rollout_ids: list[Id],
    attempt_id: Id | None,
    allow_partial: bool,
    marks: bool = True,
) -> Many:
    found: list[Span] = []
    for rollout_id in dict.fromkeys(rollout_ids):
        spans = _spans_of(state, rollout_id, attempt_id, allow_partial, marks=marks)
        found += queries.arrange(spans, "sequence_id", "asc", queries.SPAN_SORT)
    return Many(found, len(found))


def _spans_of(state: State, rollout_id: str, attempt_id: str | None, allow_partial: bool, *, marks: bool) -> list[Span]:
    """The spans of a rollout, which count as read unless somebody only looks at them (no `marks`).

    Those of one attempt begin with what it has gone on from.
    """
    if rollout_id in state.spans.evicted and not allow_partial:
        raise SpansEvictedError(rollout_id)
    entry = state.entries.get(rollout_id)
    if entry is None:
        return []
    if marks:
        mark_read(state, entry)
    if attempt_id == "latest":
        if entry.latest is None:
            return []
        attempt_id = entry.latest.attempt_id
    if attempt_id is not None and entry.marks is not None:
        return saved.spans_of(state, entry, attempt_id)
    return state.spans.of(rollout_id, attempt_id)


def set_reward(state: State, entry: Entry, reward: float) -> None:
    """Lift the reward of the latest attempt to its rollout."""
    state.put_rollout(entry, entry.rollout.evolve(reward=reward))
    if state.evaluations.by_rollout and entry.rollout.rollout_id in state.evaluations.by_rollout:
        state.note_member(entry.rollout)


# -- verbs that answer None if their callers have to wait --------------------------------------------------------------


def finished_among(state: State, rollout_ids: Iterable[str]) -> list[Pair]:
    """The rollouts among these that are finished, in the order given; unknown ids are skipped."""
    found = (state.entries.get(rollout_id) for rollout_id in rollout_ids)
    return [entry.pair for entry in found if entry is not None and entry.rollout.status in FINISHED]


def unfinished_among(state: State, rollout_ids: Iterable[str]) -> list[str]:
    """The rollouts among these that exist and are not finished."""
    completions, entries = state.completions, state.entries
    return [i for i in rollout_ids if i not in completions and i in entries]


def finished_by_now(state: State, rollout_ids: Iterable[str]) -> tuple[list[Pair], int]:
    """The answer of `wait`: those that are finished, and the newest cursor of the completion log."""
    return finished_among(state, rollout_ids), state.completions.last


def wait(state: State, step: Step, *, rollout_ids: list[Id], timeout: float | None) -> tuple[list[Pair], int] | None:
    if (timeout is None or timeout > 0) and unfinished_among(state, rollout_ids):
        return None
    return finished_by_now(state, rollout_ids)


def sort_out(
    state: State, step: Step, *, rollout_ids: list[Id], instead_of: Whole | None = None
) -> tuple[list[Pair], tuple[int, list[str], int | None]]:
    """The finished rollouts among these in the order of completion; then a cursor, the unfinished ones, and a token.

    All of it is from one step. Pass the token to `completed` to learn which of the unfinished ones finish. It replaces
    an earlier token.
    """
    assert step.session is not None
    if instead_of is not None:
        state.watched.drop(instead_of)
    done = finished_among(state, rollout_ids)
    done.sort(key=lambda pair: state.completions.place(pair[0].rollout_id))
    rest = unfinished_among(state, rollout_ids)
    token = state.watched.keep(step.session.session_id, rest, step.seed) if rest else None
    return done, (state.completions.last, rest, token)


def completed(
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
    asked = {name: value for name, value in filters.items() if value is not None}
    for sequence, rollout_id in state.completions.after(cursor):
        if len(found) == limit:
            break
        cursor = sequence
        if among is not None and rollout_id not in among:
            continue
        entry = state.entries[rollout_id]
        if fits(asked, entry.rollout):
            found.append(entry.pair)
    return found, cursor


def changes(
    state: State, step: Step, *, cursor: Whole | None, kinds: list[str] | None, limit: Positive, timeout: Seconds
) -> tuple[list[Change], int | None] | None:
    found, cursor = state.changes.after(cursor, kinds, limit)
    return (found, cursor) if found or timeout <= 0 else None
