"""Trying again by rules, after an attempt that ended badly.

A rule of a rollout's configuration speaks of one outcome: how often the rollout is tried again after attempts that
ended so, and after which delay. An outcome with a rule has an allowance of its own. `max_attempts`, `retry_condition`
and `max_deliveries` decide of all others, and do not count the attempts of which a rule decides. Until the delay is
over the rollout *backs off*: it waits at its place, and is not handed out.
Not here: what a status or outcome decides (`lifecycle`), where rollouts that back off wait (`queues`), when a backoff
is over (`expiry`).
"""

from __future__ import annotations

from typing import Any

from raystore.core.records import RetryRule
from raystore.core.rollouts import move
from raystore.core.schema import MAX_BACKOFF_SECONDS
from raystore.core.state import Entry, State, Step


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
    return sum(attempt.outcome == rule.outcome for attempt in entry.attempts)


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


def describe(state: State) -> dict[str, Any]:
    """How many rollouts back off, for the statistics."""
    by_queue: dict[str, int] = {}
    for rollout_id in state.queues.backing_off:
        queue = state.queues.line_of[rollout_id][0]
        by_queue[queue] = by_queue.get(queue, 0) + 1
    return {"backing_off": sum(by_queue.values()), "backing_off_by_queue": by_queue}


def reasons(state: State, queue: str, now: float) -> list[str]:
    """That rollouts of a queue are not handed out now, since they back off."""
    ends = state.queues.backoffs(queue)
    if not ends:
        return []
    left = max(min(ends) + state.paused - now, 0.0)
    return [
        f"{len(ends)} of {state.queues.length(queue)} rollouts in queue {queue!r} back off after an attempt that ended "
        f"badly, the first of them for another {left:.1f} s"
    ]
