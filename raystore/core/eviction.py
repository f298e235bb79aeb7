"""Keeping spans within the memory threshold: whole rollouts lose their spans, the least needed first.

Above the eviction threshold a pass frees down to the safe threshold: released rollouts, then those finished and read,
then other finished ones, then running ones; the oldest start first within each class. The rollout being written goes
last. Rollouts and attempts stay, and reading what was evicted raises.
Not here: measuring the machine and resolving thresholds (`config`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from heapq import heappop, heappush

from raystore.core.lifecycle import FINISHED
from raystore.core.state import State, Step


@dataclass(slots=True)
class Pass:
    """What one eviction pass did."""

    rollout_ids: list[str] = field(default_factory=list)
    spans: int = 0
    bytes: int = 0
    unread: list[str] = field(default_factory=list)  # finished and never read: somebody may miss them


def run(state: State, step: Step, writing: str | None) -> Pass | None:
    """Evict if the threshold is crossed, or until a full store is below the safe one; None if nothing was evicted."""
    if not state.is_full:
        return None
    done = Pass()
    classes = 1 if state.settings.pause_when_full else len(state.eviction_heaps)
    spared: list[tuple[int, tuple[float, int, str]]] = []
    for number in range(classes):
        heap = state.eviction_heaps[number]
        while heap and state.total_bytes > state.settings.safe_bytes:
            item = heappop(heap)
            entry = state.entries.get(item[2])
            if entry is None or not state.spans.has(item[2]) or state.eviction_class(entry) != number:
                continue  # deleted, evicted, or known to another class by now
            if item[2] == writing:
                spared.append((number, item))
            else:
                evict(state, item[2], done)
    for number, item in spared:
        if state.total_bytes > state.settings.safe_bytes and state.spans.has(item[2]):
            evict(state, item[2], done)
        elif state.spans.has(item[2]):
            heappush(state.eviction_heaps[number], item)
    if done.rollout_ids:
        state.eviction_passes += 1
        state.changes.append(step.now, "evicted", rollouts=len(done.rollout_ids), spans=done.spans, bytes=done.bytes)
    if state.memory_full and state.total_bytes <= state.settings.safe_bytes:
        state.memory_full = False
        state.queues_touched.update(state.queues.lengths())
    elif state.settings.pause_when_full and state.total_bytes > state.settings.eviction_bytes and not state.memory_full:
        state.memory_full = True
        state.changes.append(step.now, "memory_full", bytes=state.total_bytes)
    return done if done.rollout_ids else None


def evict(state: State, rollout_id: str, done: Pass) -> None:
    """Drop the spans of one rollout."""
    entry = state.entries[rollout_id]
    count, size = state.spans.evict(rollout_id)
    state.evicted_rollouts += 1
    done.rollout_ids.append(rollout_id)
    done.spans += count
    done.bytes += size
    if entry.rollout.status in FINISHED and not entry.read and not entry.released:
        done.unread.append(rollout_id)
