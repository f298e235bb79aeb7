"""Trying again: by rules, after an attempt that ended badly, and by hand, once a rollout has finished.

A rule of a rollout's configuration speaks of one outcome: how often the rollout is tried again after attempts that
ended so, and after which delay. An outcome with a rule has an allowance of its own. `max_attempts`, `retry_condition`
and `max_deliveries` decide of all others, and do not count the attempts of which a rule decides. Until the delay is
over the rollout *backs off*: it waits at its place, and is not handed out.
`requeue` lets rollouts that have failed, or were cancelled, wait again with fresh allowances. What cannot change any
more stays as it is: for a rollout that a consumer has taken, or a member of a group that has ended, a new rollout is
made, which names it.
Not here: what a status or outcome decides (`lifecycle`), where rollouts that back off wait (`queues`), when a backoff
is over (`expiry`).
"""

from __future__ import annotations

from typing import Annotated

from raystore.core.findings import Finding, brief, found, lasting
from raystore.core.lifecycle import FINISHED, REQUEUABLE
from raystore.core.payload import size_of
from raystore.core.records import RetryRule
from raystore.core.rollouts import CONTENT, LONG_BYTES, LONG_ITEMS, check_requests, create, enter_queue, move
from raystore.core.schema import MAX_BACKOFF_SECONDS, Id, Rule
from raystore.core.state import Entry, Pair, State, Step
from raystore.errors import RolloutNotFoundError, RolloutSucceededError

REQUEUED = 10_000  #: rollouts in one call: all of them or none, in one step
LOOKED_AT = 1_000  #: rollouts that back off, of which the one is named whose delay is over first
Requeued = Annotated[list[Id], Rule(f"len({{v}}) <= {REQUEUED}", f"a list of at most {REQUEUED:,} ids")]


# -- by rules ----------------------------------------------------------------------------------------------------------


def deliveries_left(state: State, entry: Entry) -> bool:
    """Whether `max_deliveries` allows another delivery: what has a rule of its own does not count."""
    counted = entry.deliveries
    for rule in entry.rollout.config.retry_rules:
        if rule.outcome in ("infra", "runner_lost"):
            counted -= used(entry, rule)
    return counted < state.settings.max_deliveries


def used(entry: Entry, rule: RetryRule) -> int:
    """How many attempts a rule counts so far, the latest included; of losses those that the rollout is to blame for."""
    if rule.outcome == "runner_lost":
        return entry.blames
    return sum(attempt.outcome == rule.outcome for attempt in entry.attempts[entry.forgiven :])


def delay_before(rule: RetryRule, number: int, chance: float) -> float:
    """Seconds before the retry of this number, from 1; `chance`, from 0 to 1, says how much the jitter takes off.

    Multiplied step by step, since a power may come out another way on another machine, and a replay must find the same.
    """
    longest = MAX_BACKOFF_SECONDS if rule.max_backoff_seconds is None else rule.max_backoff_seconds
    delay = rule.backoff_seconds
    for _ in range(number - 1):
        if delay >= longest:
            break
        delay *= rule.factor
    return min(delay, longest) * (1.0 - rule.jitter * chance)


def back_off(state: State, step: Step, entry: Entry, rule: RetryRule, *, keep_place: bool) -> None:
    """Let a rollout wait for its next attempt, for as long as the rule says; not if it was queued by hand meanwhile."""
    latest = entry.attempts[-1]
    if latest.rollout_id in state.queues:
        move(state, step, entry, "requeuing")
        return
    number = max(used(entry, rule), 1)  # a loss for which it is not to blame may be the first
    seconds = delay_before(rule, number, step.chance(f"{latest.rollout_id}/{latest.attempt_id}"))
    until = step.now - state.paused + seconds if seconds else None
    move(state, step, entry, "requeuing", keep_place=keep_place, until=until)
    if until is not None:
        state.changes.append(
            step.now, "backs_off", latest.rollout_id, latest.attempt_id,
            outcome=rule.outcome, retry=number, max_retries=rule.max_retries, seconds=seconds,
        )  # fmt: skip


def reasons(state: State, queue: str, now: float) -> list[Finding]:
    """That rollouts of a queue are not handed out now, since they back off."""
    number = state.queues.backing_off_by_queue.get(queue, 0)
    if not number:
        return []
    ends = state.queues.backoffs(queue, LOOKED_AT)
    left = max(min(ends) + state.paused - now, 0.0) if ends else None
    first = "" if left is None else f", the first of them for another {lasting(left)}"
    text = (
        f"{number:,} of {state.queues.length(queue):,} rollouts in queue {queue!r} back off after an attempt that "
        f"ended badly{first}"
    )
    return [found("backing_off", text, queue=queue, rollouts=number, seconds=left)]


def why_it_backs_off(state: State, entry: Entry, now: float) -> list[Finding]:
    """That a rollout backs off, after what, and for how long."""
    rollout = entry.rollout
    until = state.queues.backs_off_until(rollout.rollout_id)
    if until is None:
        return []
    left, latest = max(until + state.paused - now, 0.0), entry.latest
    after = "" if latest is None else f" after attempt {latest.sequence_id} ended with outcome {latest.outcome}"
    error = f" ({brief(latest.error)})" if latest is not None and latest.error else ""
    text = f"Rollout {rollout.rollout_id} backs off for another {lasting(left)}{after}{error}"
    return [found("backing_off", text, rollout_id=rollout.rollout_id, seconds=left)]


# -- by hand -----------------------------------------------------------------------------------------------------------


def requeue(state: State, step: Step, *, rollout_ids: Requeued) -> list[Pair] | tuple[list[Pair], int]:
    """Let rollouts that have failed or were cancelled wait again, all of them or none, with fresh allowances.

    Answers with what now stands for each. One that has not finished is left as it is, and so is the rollout that was
    made for it, if it was requeued before. A long answer is sent in parts.
    """
    unknown = [rollout_id for rollout_id in rollout_ids if rollout_id not in state.entries]
    if unknown:
        raise RolloutNotFoundError(*dict.fromkeys(unknown))
    for rollout_id in rollout_ids:
        if state.entries[rollout_id].rollout.status in FINISHED - REQUEUABLE:
            raise RolloutSucceededError(rollout_id)
    now = {rollout_id: _newest(state, state.entries[rollout_id]) for rollout_id in rollout_ids}
    ended = {entry.rollout.rollout_id: entry for entry in now.values() if entry.rollout.status in REQUEUABLE}
    check_requests(state, (), new=len(ended))
    made = {rollout_id: _again(state, step, entry) for rollout_id, entry in ended.items()}
    pairs = [made.get(entry.rollout.rollout_id, entry).pair for entry in map(now.__getitem__, rollout_ids)]
    sizes = sum(size_of(rollout.input) + size_of(rollout.metadata) for rollout, _ in pairs)
    return (pairs, len(pairs)) if len(pairs) > LONG_ITEMS or sizes > LONG_BYTES else pairs


def _newest(state: State, entry: Entry) -> Entry:
    """The rollout that stands for one that has ended: the last that was made for it, or itself."""
    while entry.rollout.status in REQUEUABLE:
        successors = state.indexes.find(("requeued_from", entry.rollout.rollout_id))
        found = [state.entries[rollout_id] for rollout_id in successors]
        later = [one for one in found if one.number > entry.number]  # else of a deleted one, which had the same id
        if not later:
            break
        entry = later[-1]
    return entry


def _again(state: State, step: Step, entry: Entry) -> Entry:
    """Let a rollout wait at the tail of its queue again, or a new one that names it."""
    group = state.groups.of(entry.rollout)
    is_sampled = state.evaluations.of_rollout(entry.rollout.rollout_id) is not None  # it counts once it has ended again
    if entry.is_sealed or (group is not None and not group.is_open and not is_sampled):
        return _successor(state, step, entry, is_member=group is not None)
    entry.forgiven = len(entry.attempts)
    entry.deliveries = entry.blames = entry.losses = entry.withdrawals = 0
    entry.suspect = entry.released = False
    move(state, step, entry, "requeuing", kind="requeued")
    return entry


def _successor(state: State, step: Step, entry: Entry, *, is_member: bool) -> Entry:
    """A new rollout with the content of one that stays as it is; never a member of its group."""
    before = entry.rollout
    request = {name: getattr(before, name) for name in CONTENT}
    request |= {"config": before.config.row(), "requeued_from": before.rollout_id}
    request["evaluation"] = evaluation = state.evaluations.by_rollout.get(before.rollout_id)
    if is_member:
        request["group_id"] = None
    made = create(state, step, "queuing", request, before.resources_id)
    rollout = made.rollout
    if evaluation is not None:
        state.evaluations.strays[rollout.rollout_id] = None
    state.spans.adopt_numbers(rollout.rollout_id)
    enter_queue(state, step, made, state.queues.tail(rollout.priority))
    state.changes.append(step.now, "requeued", before.rollout_id, by=rollout.rollout_id)
    state.changes.append(step.now, "enqueued", rollout.rollout_id, requeued_from=before.rollout_id)
    return made
