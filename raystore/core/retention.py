"""Forgetting: deletion by hand and by rule, so that a run of months stays flat.

A rule (`retention`) deletes finished rollouts by age or count: those first that were released or that their consumers
are done with, then those that were read. What is neither is never deleted, nor what a consumer awaits or holds.
Deletion frees everything: rollout, attempts, spans, counters, marks, log entries.
Not here: freeing spans only (`eviction`), resources (`resources`).
"""

from __future__ import annotations

from raystore.core.lifecycle import is_live
from raystore.core.rollouts import unqueue
from raystore.core.schema import Id
from raystore.core.state import State, Step
from raystore.core.wanted import forget, is_wanted
from raystore.errors import SealedError

FEW = 200  #: rollouts that are looked at one by one


def delete(state: State, step: Step, *, rollout_ids: list[Id]) -> int:
    """Delete rollouts with all that belongs to them; holders of running attempts are told. Unknown ids are skipped."""
    deleted = 0
    if (held := held_among(state, rollout_ids)) is not None:
        raise SealedError(held, sorted(state.entries[held].taken))
    for rollout_id in rollout_ids:
        entry = state.entries.get(rollout_id)
        if entry is None:
            continue
        unqueue(state, entry)
        state.completions.discard(rollout_id)
        state.disposable_released.discard(rollout_id)
        state.disposable_read.discard(rollout_id)
        for heap in state.eviction_heaps:
            heap.discard(rollout_id)
        forget(state, rollout_id)
        for index, attempt in enumerate(entry.attempts):
            if is_live(attempt):
                state.notify(entry, attempt.attempt_id, "cancelled")
                state.put_attempt(entry, index, attempt.evolve(outcome="superseded"))
        for key in state.index_keys(entry):
            state.indexes.remove(rollout_id, key)
        state.spans.forget(rollout_id)
        state.deadlines.discard(rollout_id)
        state.payload_bytes -= entry.bytes
        state.attempt_count -= len(entry.attempts)
        del state.entries[rollout_id]
        for session in state.deleting.values():
            session.deleting.pop(rollout_id, None)
        state.touch(rollout_id)
        state.effects.finished.append(rollout_id)  # nobody should wait for it any longer
        state.changes.append(step.now, "deleted", rollout_id)
        deleted += 1
    return deleted


def held_among(state: State, rollout_ids: list[str]) -> str | None:
    """The first of these that a consumer holds; of many without a look at each, since old ones are on disk."""
    if len(rollout_ids) < FEW:
        held = (i for i in rollout_ids if (entry := state.entries.get(i)) is not None and entry.is_held)
        return next(held, None)
    by_batch = (batch for known in state.consumers.values() for batch in known.batches.values())
    all_held = {rollout_id for batch in by_batch for rollout_id in batch}
    return next((i for i in rollout_ids if i in all_held and i in state.entries), None)


def due(state: State, now: float, limit: int) -> list[str]:
    """Rollouts that the retention rule lets go now, at most `limit`: of each kind those that ended first."""
    settings = state.settings
    over = len(state.completions) - settings.retention_count if settings.retention_count is not None else 0
    before = now - settings.retention_seconds if settings.retention_seconds is not None else None
    chosen: list[str] = []
    if over <= 0 and before is None:
        return chosen
    for disposable in (state.disposable_released, state.disposable_read):
        met: list[tuple[str, float]] = []
        for _ in range(limit):
            oldest = disposable.first()
            if oldest is None or len(chosen) == limit:
                break
            ended, _, rollout_id = oldest
            if not (over > len(chosen) or (before is not None and ended < before)):
                break
            entry = state.entries[rollout_id]
            disposable.pop()
            if is_wanted(state, entry):  # a consumer has become known since
                continue
            if ended != (actual := entry.rollout.end_time or ended):  # of a snapshot that does not say
                disposable.put(rollout_id, actual)
                continue
            met.append((rollout_id, ended))
            chosen.append(rollout_id)
        for rollout_id, ended in met:
            disposable.put(rollout_id, ended)  # until it is deleted
    return chosen
