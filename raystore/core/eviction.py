"""Keeping spans within the memory threshold: whole rollouts lose their spans, the least needed first.

Above the eviction threshold a pass frees down to the safe threshold: released rollouts, then those that their consumers
are done with, then others that finished and were read, then other finished ones, then running ones; the oldest start
first within each class. The rollout being written goes last. Rollouts and attempts stay, and reading what was evicted
raises. What a consumer awaits or holds is not evicted: if nothing else is left the store *pauses*, hands out no work
and says for whom, until it is below the safe threshold or nobody awaits or holds anything. What runs and will be
awaited goes only if memory itself is in danger. With a journal only the bodies of spans leave the memory, and are read
from disk when asked for; so that everything may go, and nothing pauses.
"""

from __future__ import annotations

from typing import Any

from raystore.core.lifecycle import FINISHED
from raystore.core.state import Entry, EvictionPass, State, Step
from raystore.core.wanted import (
    COMING,
    CONSUMED,
    READ,
    RELEASED,
    RUNNING,
    UNREAD,
    WANTED,
    enter_eviction,
    eviction_class,
    in_the_way,
)

SLICE_SPANS = 2_000  #: evicted at once, or the spans of one rollout if there are more
DANGER_BYTES = 64 * 1024 * 1024  #: above the eviction threshold, as much as one call may bring


def run(state: State, step: Step, writing: str | None) -> EvictionPass | None:
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
            entry = state.entries[heap.pop()]
            if eviction_class(state, entry) != number:  # a consumer that wants it became known since
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
        return [(number, safe) for number in (RELEASED, CONSUMED, READ, UNREAD, WANTED, RUNNING, COMING)]
    if settings.pause_when_full:
        return [(RELEASED, safe), (CONSUMED, safe)]
    danger = settings.eviction_bytes + max(settings.eviction_bytes - safe, DANGER_BYTES)
    return [*((number, safe) for number in (RELEASED, CONSUMED, READ, UNREAD, RUNNING)), (COMING, danger)]


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
        whose = in_the_way(state) if is_wanted else []
        state.waits_for = whose[0][0] if whose else None
        detail: dict[str, Any] = dict(zip(("consumer", "awaited", "held"), whose[0], strict=True)) if whose else {}
        state.changes.append(step.now, "memory_full", bytes=state.total_bytes, **detail)


def _holds_wanted(state: State) -> bool:
    """Whether spans are in memory that a consumer awaits or holds."""
    heap = state.eviction_heaps[WANTED]
    while (first := heap.first()) is not None:
        entry = state.entries[first[2]]
        if eviction_class(state, entry) == WANTED:
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
