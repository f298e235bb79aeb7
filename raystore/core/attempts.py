"""Verbs of attempts: start, report, spans, heartbeat, settle, cancel.

An attempt changes, then its rollout follows (`_follow`) if it is the latest, then its worker.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raystore.core import fates, lifecycle, queries, retries, saved, workers
from raystore.core.lifecycle import ACTIVE, AT_WORK, FINISHED, SPAN, attempt_after
from raystore.core.payload import OnDisk, Opaque, bounded_error
from raystore.core.records import Attempt, Many, Resources, Span
from raystore.core.rollouts import begin, chosen_among, create, move, set_reward
from raystore.core.schema import AttemptChanges, Calls, FinalChanges, Id, Request, SortOrder, SpanRow, Tags, Value
from raystore.core.spans import SpansWritten
from raystore.core.state import Entry, InChain, Pair, State, Step
from raystore.core.training import enter_eviction, reconsider
from raystore.errors import AttemptNotFoundError, AttemptOverError, SealedError


def start_rollout(state: State, step: Step, *, request: Request, worker_id: Id | None) -> Pair:
    """Make a rollout with its first attempt; it was never in a queue."""
    workers.admit(state, worker_id)
    entry = create(state, step, "preparing", request, state.resources.latest_id)
    begin(state, step, entry, worker_id=worker_id, kind="started")
    return entry.pair


def start_attempt(state: State, step: Step, *, rollout_id: Id, worker_id: Id | None) -> Pair:
    """Start another attempt by hand, from whatever status."""
    workers.admit(state, worker_id)
    entry = state.entry(rollout_id)
    if entry.is_sealed:
        raise SealedError(rollout_id, sorted(entry.taken))
    begin(state, step, entry, worker_id=worker_id, kind="started")
    return entry.pair


def update(state: State, step: Step, *, rollout_id: Id, attempt_id: Id, changes: AttemptChanges) -> Attempt:
    """Set fields of an attempt by hand, and let rollout and worker follow."""
    workers.admit(state, changes.get("worker_id"))
    return _report(state, step, rollout_id, attempt_id, changes)


def _report(state: State, step: Step, rollout_id: str, attempt_id: str, given: Mapping[str, Any]) -> Attempt:
    entry = state.entry(rollout_id)
    try:
        index = state.find_attempt(entry, attempt_id, step.session)
    except AttemptNotFoundError:
        raise AttemptNotFoundError(rollout_id, attempt_id if entry.attempts else None) from None
    before = entry.attempts[index]
    is_latest = index == len(entry.attempts) - 1
    changes = dict(given)
    status = changes.get("status")
    if status is not None:
        unsettled = None if is_latest else "superseded"
        changes.setdefault("outcome", lifecycle.OUTCOME_OF_STATUS[status] if status in lifecycle.SETTLED else unsettled)
        if status in lifecycle.COMPLETED:
            changes["end_time"] = step.now
    after = before.evolve(**changes)
    if "worker_id" in changes:
        state.take_hold(entry, before.attempt_id, step.session)
    confirm_holder(state, step, entry, before.attempt_id)
    state.put_attempt(entry, index, after)
    if is_latest:
        beat = changes.get("last_heartbeat_time")
        if beat is not None:
            entry.clocks[-1].beat = min(beat, step.now) - state.paused
            state.deadlines.guard(rollout_id)
        if status is not None:
            _follow(state, step, entry)
        if state.consumers and "outcome" in changes:
            reconsider(state, entry)  # what was dropped may be an ordinary failure now, or the other way round
        if after.reward is not None and after.reward != entry.rollout.reward and not entry.is_sealed:
            set_reward(state, entry, after.reward)
    if after.worker_id is not None and (status is not None or changes.get("worker_id") is not None):
        workers.follow(state, step, after)
    return entry.attempts[index]


def confirm_holder(state: State, step: Step, entry: Entry, attempt_id: str) -> None:
    """Acknowledge the claim of an attempt that was written to. If its holder has ended, this session holds it now."""
    holder = entry.holders.get(attempt_id)
    if holder is None:
        return
    session = state.sessions.get(holder)
    if session is None or session.ended_at is not None:  # it was only silent, and is back in a new session
        state.take_hold(entry, attempt_id, step.session)
        session = step.session
    if session is not None and session.claims:
        key = (entry.rollout.rollout_id, attempt_id)
        if session.claims.pop(key, None) is not None:
            session.held[key] = None


def _follow(state: State, step: Step, entry: Entry) -> None:
    """Let the rollout follow from its latest attempt; what is cancelled or sealed stays as it is."""
    attempt = entry.attempts[-1]
    rollout = entry.rollout
    if entry.is_sealed or not lifecycle.follows_attempts(rollout.status):
        return
    rule = lifecycle.rule_for(attempt.outcome, rollout.config)
    status = lifecycle.rollout_after(
        attempt.status,
        attempt.outcome,
        rollout.config,
        charged=entry.charged,
        deliveries_left=retries.deliveries_left(state, entry),
        retries_left=None if rule is None else retries.used(entry, rule) <= rule.max_retries,
    )
    if status == "failed" and rollout.status in lifecycle.QUEUED and len(entry.attempts) <= entry.forgiven:
        return  # a late word of an attempt that ended before the rollout was requeued by hand
    if status != rollout.status:
        # Work that was lost or aborted gets its old place back: its agent did not fail.
        keep_place = attempt.outcome in lifecycle.UNCHARGED
        if status in lifecycle.QUEUED:
            retried, outcome = state.meters.at(step.now).retried, attempt.outcome or attempt.status
            retried[outcome] = retried.get(outcome, 0) + 1
        if rule is not None and status in lifecycle.QUEUED:
            retries.back_off(state, step, entry, rule, keep_place=keep_place)
        else:
            move(state, step, entry, status, keep_place=keep_place)
    elif attempt.status in ACTIVE:
        state.deadlines.guard(rollout.rollout_id)


def settle(
    state: State,
    step: Step,
    entry: Entry,
    event: str,
    *,
    is_charged: bool = False,
    orderly: bool = False,
    error: str | None = None,
) -> None:
    """Move the latest attempt by an event that ends it, with its rollout and worker.

    `is_charged` says of a loss that this rollout is to blame for it.
    An `orderly` loss was reported by a runner that still lives, so that the rollout does not become a suspect.
    """
    index = len(entry.attempts) - 1
    before = entry.attempts[index]
    outcome = lifecycle.OUTCOME_OF_EVENT[event]
    after = before.evolve(status=attempt_after(before.status, event), outcome=outcome, error=error or before.error)
    if after.status in lifecycle.COMPLETED:
        after.end_time = step.now
    entry.deliveries += lifecycle.uses_delivery(event, is_charged=is_charged)
    if event == lifecycle.LOSS:
        entry.blames += is_charged and lifecycle.rule_for("runner_lost", entry.rollout.config) is not None
        if not orderly:
            entry.suspect = True
            entry.losses += 1
        worker = state.workers.get(before.worker_id or "")
        state.changes.append(
            step.now, "lost", before.rollout_id, before.attempt_id,
            charged=is_charged, worker_id=worker and worker.worker_id,
        )  # fmt: skip
    state.put_attempt(entry, index, after)
    _follow(state, step, entry)
    if after.worker_id is not None:
        workers.follow(state, step, after)


def lose(state: State, step: Step, entry: Entry, attempt_id: str, *, is_charged: bool) -> None:
    """The process that ran an attempt has ended."""
    _end(state, step, entry, attempt_id, lifecycle.LOSS, is_charged=is_charged)


def withdraw(state: State, step: Step, entry: Entry, attempt_id: str, *, error: str | None = None) -> None:
    """End an attempt whose runner was stopped or could not read its resources.

    The rollout is not to blame, and waits again at its old place.
    """
    _end(state, step, entry, attempt_id, lifecycle.WITHDRAWAL, error=error)


def _end(
    state: State,
    step: Step,
    entry: Entry,
    attempt_id: str,
    event: str,
    *,
    is_charged: bool = False,
    orderly: bool = False,
    error: str | None = None,
) -> None:
    """End an attempt by an event. Its rollout follows if it waits for this attempt; a finished one stays so."""
    index = state.find_attempt(entry, attempt_id)
    attempt = entry.attempts[index]
    if attempt.status not in ACTIVE:
        return
    if index == len(entry.attempts) - 1 and entry.rollout.status not in FINISHED:
        settle(state, step, entry, event, is_charged=is_charged, orderly=orderly, error=error)
    else:
        ended = attempt.evolve(
            status=attempt_after(attempt.status, event),
            outcome=attempt.outcome or lifecycle.OUTCOME_OF_EVENT[event],
            error=error or attempt.error,
        )
        state.put_attempt(entry, index, ended)
        if state.consumers:
            reconsider(state, entry)


def cancel(
    state: State, step: Step, *, rollout_ids: list[Id] | None, group_id: Id | None, tags: Tags | None
) -> list[Pair]:
    """Cancel rollouts that have not finished; running attempts fail with outcome "cancelled", holders are told."""
    cancelled = []
    for rollout_id in chosen_among(state, rollout_ids, group_id, tags):
        entry = state.entries.get(rollout_id)
        if entry is None or entry.rollout.status in FINISHED:
            continue
        latest = entry.latest
        if latest is not None and latest.status in ACTIVE and entry.rollout.status in ACTIVE:
            state.notify(entry, latest.attempt_id, "cancelled")
            settle(state, step, entry, lifecycle.CANCEL)
        else:
            move(state, step, entry, "cancelled")
        cancelled.append(entry.pair)
    return cancelled


def add_spans(
    state: State, step: Step, *, rollout_id: Id, attempt_id: Id, spans: list[SpanRow], chain: InChain | None = None
) -> list[tuple[bool, int]]:
    """Store spans of one attempt; of each whether it is stored, or was before, and its number."""
    made = [Span(rollout_id, attempt_id, *row) for row in spans]
    written = put_spans(state, step, rollout_id, attempt_id, made)
    return list(zip(written.stored, [span.sequence_id for span in made], strict=True))


def put_spans(state: State, step: Step, rollout_id: str, attempt_id: str, spans: list[Span]) -> SpansWritten:
    """Store spans of one attempt; they are its heartbeat. A call of only duplicates changes nothing."""
    entry = state.entry(rollout_id)
    if attempt_id == "latest":  # a span says whose it is: the newest attempt may be another's by now
        raise AttemptNotFoundError(rollout_id, attempt_id)
    index = state.find_attempt(entry, attempt_id, step.session)
    for span in spans:
        if span.sequence_id < 0:  # "the next one", asked for in the same call
            span.sequence_id = state.spans.next_number(rollout_id, known=True)
    places = None
    if step.record:
        places = [OnDisk.place_of(step.record, step.operation, number) for number in range(len(spans))]
    written = state.spans.add(rollout_id, spans, places)
    if True not in written.stored:
        return written
    meters = state.meters
    bucket = meters.now if step.now < meters.ends else meters.at(step.now)
    bucket.spans += written.stored.count(True)
    bucket.span_bytes += written.bytes
    if state.settings.on_disk:
        state.touched[rollout_id] = None
    if written.are_first:
        enter_eviction(state, entry)
    _beat(state, step, entry, index, written.reward)
    return written


def save(state: State, step: Step, *, rollout_id: Id, attempt_id: Id, saved_state: Value, spans: list[SpanRow]) -> int:
    """Keep the state of an attempt that runs, with its spans until now, for the attempt that comes after it.

    None means that the next one is to begin anew. It is a sign of life. Answers with the mark.
    """
    entry = _running(state, step, rollout_id, attempt_id)
    written = None
    if spans:
        made = [Span(rollout_id, attempt_id, *row) for row in spans]
        written = put_spans(state, step, rollout_id, attempt_id, made)
    if written is None or True not in written.stored:
        _beat(state, step, entry, len(entry.attempts) - 1, None)
    if saved_state is None:
        saved.begin_anew(state, step, entry)
    else:
        saved.keep(state, entry, entry.attempts[-1], saved_state)
    return state.spans.newest_number(rollout_id)


def get_saved(state: State, step: Step, *, rollout_id: Id, attempt_id: Id) -> Opaque:
    """The state that an attempt that runs goes on from, or has saved itself; None if there is none."""
    kept = _running(state, step, rollout_id, attempt_id).saved
    return kept.payload if kept is not None else None


def refresh(state: State, step: Step, *, rollout_id: Id, attempt_id: Id) -> tuple[str, int, int | None] | None:
    """Let an attempt that runs switch to the newest version of its resources, which stays as long as it lives.

    Answers with id, version and policy version; None if the attempt has the newest. It is a sign of life.
    """
    entry = _running(state, step, rollout_id, attempt_id)
    _beat(state, step, entry, len(entry.attempts) - 1, None)
    latest, resources_id = entry.attempts[-1], entry.rollout.resources_id
    newest = _may_switch_to(state, entry)
    now = latest.resources_version if entry.refreshed is None else entry.refreshed
    if newest is None or resources_id is None or newest.version == now:
        return None
    state.resources.refer(resources_id, newest.version, 1)
    if entry.refreshed is not None:
        state.resources.refer(resources_id, entry.refreshed, -1)
    entry.refreshed = newest.version
    state.touch(rollout_id)
    state.changes.append(
        step.now, "refreshed", rollout_id, attempt_id, version=newest.version, policy_version=newest.policy_version
    )
    return resources_id, newest.version, newest.policy_version


def _may_switch_to(state: State, entry: Entry) -> Resources | None:
    """The version that an attempt of a rollout may switch to; None for one that is to stay with its own."""
    if state.evaluations.pin_of(entry.rollout) is not None:
        return None
    return state.resources.newest(entry.rollout.resources_id)


def _running(state: State, step: Step, rollout_id: str, attempt_id: str) -> Entry:
    """The rollout of an attempt that decides what becomes of it; of any other attempt nothing is saved."""
    entry = state.entry(rollout_id)
    if attempt_id == "latest":  # whoever saves says whose it is: the newest attempt may be another's by now
        raise AttemptNotFoundError(rollout_id, attempt_id)
    index = state.find_attempt(entry, attempt_id, step.session)
    attempt = entry.attempts[index]
    if index < len(entry.attempts) - 1:
        raise AttemptOverError(rollout_id, attempt.attempt_id, "superseded")
    if lifecycle.is_over(attempt) or entry.rollout.status in FINISHED:
        raise AttemptOverError(rollout_id, attempt.attempt_id, attempt.outcome or entry.rollout.status)
    return entry


def _beat(state: State, step: Step, entry: Entry, index: int, reward: float | None) -> None:
    """A sign of life from an attempt."""
    before = entry.attempts[index]
    is_latest = index == len(entry.attempts) - 1
    confirm_holder(state, step, entry, before.attempt_id)
    if reward is None and is_latest and before.status == entry.rollout.status == AT_WORK:  # nothing moves
        entry.attempts[index] = after = before.evolve()
        after.last_heartbeat_time = step.now
        entry.clocks[-1].beat = step.now - state.paused
        return
    after = before.evolve(status=attempt_after(before.status, SPAN, before.outcome), last_heartbeat_time=step.now)
    if reward is not None:
        after.reward = reward
    if after.status != before.status:
        after.outcome = None if is_latest else "superseded"
    state.put_attempt(entry, index, after)
    if not is_latest:
        return
    entry.clocks[-1].beat = step.now - state.paused
    rollout = entry.rollout
    if after.status != before.status:
        state.deadlines.guard(rollout.rollout_id)
    if after.status == AT_WORK and rollout.status in lifecycle.ROLLOUT_ON_SPAN:
        if rollout.status in lifecycle.QUEUED:  # an attempt that goes on gets its time back from here
            state.changes.append(step.now, "retry_withdrawn", rollout.rollout_id, after.attempt_id)
        move(state, step, entry, lifecycle.ROLLOUT_ON_SPAN[rollout.status])
    if reward is not None and not entry.is_sealed:
        set_reward(state, entry, reward)


def heartbeat(state: State, step: Step, *, attempts_alive: list[tuple[Id, Id]]) -> list[tuple[str, str]]:
    """Note heartbeats of attempts; returns those that nobody needs any more, so that their runners can stop.

    An unresponsive attempt whose rollout still waits for its retry is needed: the next span brings it back.
    """
    return note_alive(state, step, attempts_alive, lifecycle.HEARTBEAT)


def note_alive(
    state: State, step: Step, attempts_alive: list[tuple[Id, Id]], event: str | None
) -> list[tuple[str, str]]:
    """Note signs of life, by an event that may change statuses; returns the attempts that nobody needs."""
    unneeded = []
    for rollout_id, attempt_id in attempts_alive:
        entry = state.entries.get(rollout_id)
        index = state.index_of(entry, attempt_id) if entry else None
        if entry is None or index is None:
            unneeded.append((rollout_id, attempt_id))
            continue
        attempt = entry.attempts[index]
        if index < len(entry.attempts) - 1 or entry.rollout.status in FINISHED or lifecycle.is_over(attempt):
            unneeded.append((rollout_id, attempt_id))
        if attempt.status not in ACTIVE:
            continue
        confirm_holder(state, step, entry, attempt_id)
        status = attempt.status if event is None else attempt_after(attempt.status, event)
        state.put_attempt(entry, index, attempt.evolve(status=status, last_heartbeat_time=step.now))
        if index == len(entry.attempts) - 1:
            entry.clocks[-1].beat = step.now - state.paused
            if event is not None and entry.rollout.status in lifecycle.ROLLOUT_ON_HEARTBEAT:
                move(state, step, entry, lifecycle.ROLLOUT_ON_HEARTBEAT[entry.rollout.status])
    return unneeded


def finish(
    state: State, step: Step, *, rollout_id: Id, attempt_id: Id, spans: list[SpanRow], changes: FinalChanges
) -> tuple[Attempt, list[bool]]:
    """The last spans of an attempt and its final status as one step; of each span whether it is stored."""
    made = [Span(rollout_id, attempt_id, *row) for row in spans]
    error = changes.get("error")
    given = changes if error is None else {**changes, "error": bounded_error(error)}
    attempt, written = end(state, step, rollout_id, attempt_id, made, given)
    return attempt, written.stored


def end(
    state: State, step: Step, rollout_id: str, attempt_id: str, spans: list[Span], given: Mapping[str, Any]
) -> tuple[Attempt, SpansWritten]:
    """The last spans of an attempt and its final status as one step; a refused span refuses both."""
    entry = state.entry(rollout_id)
    state.find_attempt(entry, attempt_id, step.session)
    changes = dict(given)
    died = changes.pop("died", False)  # the process that ran this attempt, and nothing else
    calls = changes.pop("calls", None)
    written = put_spans(state, step, rollout_id, attempt_id, spans) if spans else SpansWritten([], 0, None)
    event = lifecycle.EVENT_OF_OUTCOME.get(changes.get("outcome") or "")
    if event is None:
        attempt = _report(state, step, rollout_id, attempt_id, changes)
        if calls is not None:
            _count_calls(state, step, entry, calls)
        return attempt, written
    if calls is not None:
        _count_calls(state, step, entry, calls)
    _end(state, step, entry, attempt_id, event, is_charged=died, orderly=True, error=changes.get("error"))
    return entry.attempts[state.find_attempt(entry, attempt_id)], written


def _count_calls(state: State, step: Step, entry: Entry, calls: Calls) -> None:
    """A runner has said how often an attempt called models."""
    state.meters.called(step.now, calls)
    if state.feeds.by_group:
        fates.note_calls(state, entry, calls)


def latest(state: State, step: Step, *, rollout_id: Id) -> Attempt | None:
    """The latest attempt of a rollout; None if it has none, or does not exist."""
    entry = state.entries.get(rollout_id)
    return entry.latest if entry else None


def query(
    state: State, step: Step, *, rollout_id: Id, sort_by: str | None, sort_order: SortOrder, limit: int, offset: int
) -> Many:
    """One page of the attempts of a rollout; none of one that does not exist."""
    entry = state.entries.get(rollout_id)
    found = queries.arrange(entry.attempts if entry else [], sort_by, sort_order, queries.ATTEMPT_SORT)
    return Many(queries.page(found, limit, offset), len(found))
