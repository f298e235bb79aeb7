"""Forgetting: rollouts are deleted by hand and by rule, and spans are evicted when memory is full.

The rule `retention` deletes finished rollouts by age or number: first those that were released or whose consumers are
done with them, then those that were read. No other rollout is deleted, and none that a consumer awaits or holds:
`training.enter_retention` decides which rollouts may go.
Deletion frees everything: rollout, attempts, spans, counters, marks, log entries.

Above the eviction threshold a pass evicts the spans of whole rollouts until memory is below the safe threshold. The
order is that of the classes in `training`, and within a class that of the starts; the rollout being written goes last.
Reading evicted spans raises. What a consumer awaits or holds is not evicted: if nothing else is left, the store
*pauses*. It hands out no work, and says for whom, until memory is below the safe threshold or nobody awaits or holds
anything. Spans of running rollouts that will be awaited go only if memory itself is in danger.
With a journal only the bodies of spans leave the memory. They are read from disk when asked for, so any of them may go,
and nothing pauses.
"""

from __future__ import annotations

from typing import Any

from raystore.core import training
from raystore.core.indexes import keys_of
from raystore.core.lifecycle import ACTIVE, FINISHED, is_live
from raystore.core.rollouts import count_running, unqueue
from raystore.core.schema import Id
from raystore.core.state import Entry, EvictionPass, State, Step
from raystore.core.training import COMING, READ, RELEASED, RUNNING, TRAINED_ON, UNREAD, WANTED, enter_eviction
from raystore.errors import SealedError

FEW = 200  #: rollouts that are looked at one by one
SLICE_SPANS = 2_000  #: evicted at once, or the spans of one rollout if there are more
DANGER_BYTES = 64 * 1024 * 1024  #: above the eviction threshold, as much as one call may bring


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
        state.disposable_released.pop(rollout_id, None)
        state.disposable_read.pop(rollout_id, None)
        state.eviction_heaps[entry.evicts_as].pop(rollout_id, None)
        training.forget(state, rollout_id)
        state.note_member(entry.rollout)
        for index, attempt in enumerate(entry.attempts):
            if is_live(attempt):
                state.notify(entry, attempt.attempt_id, "cancelled")
                state.put_attempt(entry, index, attempt.evolve(outcome="superseded"))
        for kind, value in keys_of(entry.rollout, entry.latest):
            state.indexes.move(rollout_id, kind, value, None)
        if state.gates.limits and entry.rollout.status in ACTIVE:
            count_running(state, entry.rollout, -1)
        if state.evaluations.by_rollout:
            state.evaluations.forget(rollout_id)
        state.spans.forget(rollout_id)
        state.deadlines.pop(rollout_id, None)
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
    """The first of these rollouts that a consumer holds. Of many, no entries are read: old ones are on disk."""
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
            disposable.take()
            if training.is_needed(state, entry):  # a consumer has become known since
                continue
            if ended != (actual := entry.rollout.end_time or ended):  # from a snapshot without end times
                disposable.put(rollout_id, actual)
                continue
            met.append((rollout_id, ended))
            chosen.append(rollout_id)
        for rollout_id, ended in met:
            disposable.put(rollout_id, ended)  # until it is deleted
    return chosen


# -- spans, when memory is full ---------------------------------------------------------------------------------------


def relieve_memory(state: State, step: Step, writing: str | None) -> EvictionPass | None:
    """Evict a slice if the threshold is crossed, a pass is under way, or the store is full; the pass once it is over.

    `writing` is the rollout that is being written to. A pass works in slices, so that nobody is held up; it is over at
    the safe threshold. None if there was nothing to do or there is more.
    """
    if not state.is_full:
        return None
    done = state.eviction_pass or EvictionPass()
    state.eviction_pass = None
    if writing is not None:
        done.written.add(writing)
    until = done.spans + SLICE_SPANS
    _evict_slice(state, done, until)
    if done.spans >= until and state.total_bytes > state.settings.safe_bytes:
        state.eviction_pass = done
        return None
    evicted = len(done.rollout_ids)
    state.eviction_passes += evicted > 0
    if evicted and not state.settings.on_disk:
        state.changes.append(step.now, "evicted", rollouts=evicted, spans=done.spans, bytes=done.bytes)
    _pause_or_go_on(state, step)
    return done if evicted else None


def _evict_slice(state: State, done: EvictionPass, until: int) -> None:
    """Evict class by class, until `done` has so many spans; what was written to meanwhile goes last."""
    spared: list[Entry] = []
    evicted: list[Entry] = []
    for number, down_to in _classes(state):
        heap = state.eviction_heaps[number]
        while state.total_bytes > down_to and done.spans < until and (first := heap.first()) is not None:
            entry = state.entries[heap.take()]
            if training.eviction_class(state, entry) != number:  # a consumer that wants it became known since
                enter_eviction(state, entry)
            elif first[2] in done.written:
                spared.append(entry)
            else:
                evict(state, entry, done)
                evicted.append(entry)
    for entry in spared:
        if state.total_bytes > state.settings.safe_bytes and done.spans < until:
            evict(state, entry, done)
    for entry in (*spared, *evicted):
        if state.spans.has(entry.rollout.rollout_id):  # spared, or not on disk yet
            enter_eviction(state, entry)


def _classes(state: State) -> list[tuple[int, int]]:
    """The classes that may go, in their order, each with how many bytes it may go down to."""
    settings = state.settings
    safe = settings.safe_bytes
    if settings.on_disk:
        return [(number, safe) for number in (RELEASED, TRAINED_ON, READ, UNREAD, WANTED, RUNNING, COMING)]
    if settings.pause_when_full:
        return [(RELEASED, safe), (TRAINED_ON, safe)]
    danger = settings.eviction_bytes + max(settings.eviction_bytes - safe, DANGER_BYTES)
    return [*((number, safe) for number in (RELEASED, TRAINED_ON, READ, UNREAD, RUNNING)), (COMING, danger)]


def _pause_or_go_on(state: State, step: Step) -> None:
    """Hand out no work as long as memory is full of what must stay."""
    settings = state.settings
    if settings.on_disk:
        return
    is_wanted = _holds_wanted(state)
    if state.memory_full:
        if state.total_bytes <= settings.safe_bytes or not (settings.pause_when_full or is_wanted):
            state.memory_full, state.waits_for = False, None
            state.offer_all()
        return
    if state.total_bytes > settings.eviction_bytes and (settings.pause_when_full or is_wanted):
        state.memory_full = True
        state.effects.has_batches = True  # whoever waits for a batch gets what there is
        whose = training.in_the_way(state) if is_wanted else []
        state.waits_for = whose[0][0] if whose else None
        detail: dict[str, Any] = dict(zip(("consumer", "awaited", "held"), whose[0], strict=True)) if whose else {}
        state.changes.append(step.now, "memory_full", bytes=state.total_bytes, **detail)


def _holds_wanted(state: State) -> bool:
    """Whether spans are in memory that a consumer awaits or holds."""
    heap = state.eviction_heaps[WANTED]
    while (first := heap.first()) is not None:
        entry = state.entries[first[2]]
        if training.eviction_class(state, entry) == WANTED:
            return True
        enter_eviction(state, entry)
    return False


def evict(state: State, entry: Entry, done: EvictionPass) -> None:
    """Drop the spans of one rollout."""
    rollout_id = entry.rollout.rollout_id
    count, size = state.spans.evict(rollout_id)
    state.evicted_rollouts += not state.settings.on_disk
    done.rollout_ids.append(rollout_id)
    done.spans += count
    done.bytes += size
    is_lost = not state.settings.on_disk
    is_known = entry.read or entry.released or entry.taken
    if is_lost and entry.rollout.status in FINISHED and not is_known:
        done.unread.append(rollout_id)
