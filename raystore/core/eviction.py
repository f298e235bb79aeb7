"""Keeping spans within the memory threshold: whole rollouts lose their spans, the least needed first.

Above the eviction threshold a pass frees down to the safe threshold: released rollouts, then those finished and read,
then other finished ones, then running ones; the oldest start first within each class. The rollout being written goes
last. Rollouts and attempts stay, and reading what was evicted raises. With a journal only the bodies of spans leave the
memory, and are read from disk when asked for.
Not here: measuring the machine and resolving thresholds (`config`).
"""

from __future__ import annotations

from heapq import heappop, heappush

from raystore.core.lifecycle import FINISHED
from raystore.core.state import Pass, State, Step

SLICE_SPANS = 2_000  #: evicted at once, or the spans of one rollout if there are more


def run(state: State, step: Step, writing: str | None) -> Pass | None:
    """Evict a slice if the threshold is crossed, a pass is under way, or the store is full; the pass once it is over.

    A pass works in slices, so that nobody is held up; it is over at the safe threshold. None if there was nothing to do
    or there is more.
    """
    if not state.is_full:
        return None
    done = state.eviction_pass or Pass()
    state.eviction_pass = None
    if writing is not None:
        done.written.add(writing)
    until = done.spans + SLICE_SPANS
    pauses = state.settings.pause_when_full and not state.settings.on_disk
    classes = 1 if pauses else len(state.eviction_heaps)
    spared: list[tuple[int, tuple[float, int, str]]] = []
    kept: list[tuple[int, tuple[float, int, str]]] = []
    for number in range(classes):
        heap = state.eviction_heaps[number]
        while heap and state.total_bytes > state.settings.safe_bytes and done.spans < until:
            item = heappop(heap)
            entry = state.entries.get(item[2])
            if entry is None or not state.spans.has(item[2]) or state.eviction_class(entry) != number:
                continue  # deleted, evicted, or known to another class by now
            if item[2] in done.written:
                spared.append((number, item))
            else:
                evict(state, item[2], done)
                kept.append((number, item))
    for number, item in spared:
        if state.total_bytes > state.settings.safe_bytes and state.spans.has(item[2]) and done.spans < until:
            evict(state, item[2], done)
        kept.append((number, item))
    for number, item in kept:
        if state.spans.has(item[2]):  # spared, or not on disk yet
            heappush(state.eviction_heaps[number], item)
    if done.spans >= until and state.total_bytes > state.settings.safe_bytes:
        state.eviction_pass = done
        return None
    if done.rollout_ids:
        state.eviction_passes += 1
    if done.rollout_ids and not state.settings.on_disk:
        state.changes.append(step.now, "evicted", rollouts=len(done.rollout_ids), spans=done.spans, bytes=done.bytes)
    if state.memory_full and state.total_bytes <= state.settings.safe_bytes:
        state.memory_full = False
        state.queues_touched.update(state.queues.lengths())
    elif pauses and state.total_bytes > state.settings.eviction_bytes and not state.memory_full:
        state.memory_full = True
        state.changes.append(step.now, "memory_full", bytes=state.total_bytes)
    return done if done.rollout_ids else None


def evict(state: State, rollout_id: str, done: Pass) -> None:
    """Drop the spans of one rollout."""
    entry = state.entries[rollout_id]
    count, size = state.spans.evict(rollout_id)
    state.evicted_rollouts += not state.settings.on_disk
    done.rollout_ids.append(rollout_id)
    done.spans += count
    done.bytes += size
    is_lost = not state.settings.on_disk
    if is_lost and entry.rollout.status in FINISHED and not entry.read and not entry.released:
        done.unread.append(rollout_id)
