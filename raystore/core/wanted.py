"""Which finished rollouts consumers wait for: the filter of each, what it awaits, what may still come for it.

Kept with every change of a rollout (`follow`), so that a take costs what it takes, and whether a rollout may be
forgotten is a look into a few dictionaries. A consumer is known from its first word, or by an option of the store; as
long as it has not said what it takes, it awaits everything that can be trained on.
Not here: batches (`consumers`), what is deleted or evicted in which order (`retention`, `eviction`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from raystore.core import bounds
from raystore.core.lifecycle import ACTIVE, FINISHED, QUEUED, is_dropped
from raystore.core.lifecycle import TRAINABLE as TRAINABLE
from raystore.core.records import Rollout
from raystore.core.state import NOBODY, Consumer, Entry, Settings, State, Taken
from raystore.errors import ConsumerFilterError

USUAL = ["succeeded"]  #: what a consumer is given if it says nothing

Filter = dict[str, Any]  #: what is to be equal, by field of a rollout; and "status_in", always

# In which order spans are let go, from what nobody needs to what somebody holds.
RELEASED, CONSUMED, READ, UNREAD, RUNNING, WANTED, COMING = range(7)


def make_filter(
    *,
    mode: str | None = None,
    tags: Mapping[str, Any] | None = None,
    queue: str | None = None,
    group_id: str | None = None,
    status_in: Iterable[str] | None = None,
) -> Filter | None:
    """A filter as it is compared and kept; None if nothing is asked for. The values have been checked."""
    statuses = set(status_in or ())
    equal = {"mode": mode, "queue": queue, "group_id": group_id, "tags": dict(tags) if tags else None}
    made = {name: value for name, value in equal.items() if value is not None}
    if not made and not statuses:
        return None
    return made | {"status_in": sorted(statuses or USUAL)}


def fits(wanted: Filter | None, rollout: Rollout) -> bool:
    """Whether a rollout is what a filter asks for, however it may end."""
    if wanted is None or len(wanted) == 1:
        return True
    for name, value in wanted.items():
        if name == "tags":
            if any(rollout.tags.get(tag, _ABSENT) != item for tag, item in value.items()):
                return False
        elif name != "status_in" and getattr(rollout, name) != value:
            return False
    return True


_ABSENT = object()


def _statuses(wanted: Filter | None) -> Iterable[str]:
    return TRAINABLE if wanted is None else wanted["status_in"]


# -- with every change of a rollout ------------------------------------------------------------------------------------


def follow(state: State, entry: Entry, *, has_finished: bool = False) -> None:
    """Let consumers await a rollout, or not any more, after it has changed; anew, at the end, if it `has_finished`."""
    rollout = entry.rollout
    rollout_id = rollout.rollout_id
    is_finished = rollout.status in FINISHED
    is_trainable = is_finished and rollout.status in TRAINABLE and not is_dropped(entry.latest)
    for name, known in state.consumers.items():
        is_asked = fits(known.filter, rollout)
        if known.coming is not None:
            if is_asked and not is_finished:
                known.coming[rollout_id] = None
            else:
                known.coming.pop(rollout_id, None)
        if is_trainable and is_asked and name not in entry.taken and rollout.status in _statuses(known.filter):
            known.awaiting[rollout_id] = None
            if has_finished:
                known.awaiting.move_to_end(rollout_id)
        elif known.awaiting.pop(rollout_id, 0) is None:
            known.returned.pop(rollout_id, None)


def forget(state: State, rollout_id: str) -> None:
    """A rollout is deleted."""
    for known in state.consumers.values():
        known.awaiting.pop(rollout_id, None)
        known.returned.pop(rollout_id, None)
        if known.coming is not None:
            known.coming.pop(rollout_id, None)


# -- asking ------------------------------------------------------------------------------------------------------------


def is_wanted(state: State, entry: Entry) -> bool:
    """Whether a consumer awaits a rollout, or holds it and may have to train on it again."""
    if entry.is_held:
        return True
    rollout_id = entry.rollout.rollout_id
    return any(rollout_id in known.awaiting for known in state.consumers.values())


def may_still_come(state: State, known: Consumer) -> bool:
    """Whether anything that waits or runs could be given to a consumer once it has finished."""
    if known.filter is None or len(known.filter) == 1:
        return len(state.entries) > len(state.completions)
    if known.coming is None:
        known.coming = {}
        for status in (*ACTIVE, *QUEUED):
            for rollout_id in state.indexes.find(("status", status)):
                if fits(known.filter, state.entries[rollout_id].rollout):
                    known.coming[rollout_id] = None
    return bool(known.coming)


def eviction_class(state: State, entry: Entry) -> int:
    """How much the spans of a rollout are needed: the lower, the sooner they go."""
    is_finished = entry.rollout.status in FINISHED
    if state.consumers:
        if is_finished:
            if is_wanted(state, entry):
                return WANTED
        elif any(fits(known.filter, entry.rollout) for known in state.consumers.values()):
            return COMING
    if entry.released:
        return RELEASED
    if not is_finished:
        return RUNNING
    if entry.taken:
        return CONSUMED
    return READ if entry.read else UNREAD


def enter_eviction(state: State, entry: Entry) -> None:
    """Make a rollout with spans known to the eviction class it now belongs to."""
    rollout = entry.rollout
    heap = state.eviction_heaps[eviction_class(state, entry)]
    for other in state.eviction_heaps:
        if other is not heap:
            other.discard(rollout.rollout_id)
    heap.put(rollout.rollout_id, (rollout.start_time, entry.number))


def enter_retention(state: State, entry: Entry) -> None:
    """Make a rollout known to the retention rule if nobody needs it any more, and unknown if somebody does."""
    rollout = entry.rollout
    rollout_id, ended = rollout.rollout_id, rollout.end_time
    if ended is None or is_wanted(state, entry):
        state.disposable_released.discard(rollout_id)
        state.disposable_read.discard(rollout_id)
    elif entry.released or entry.taken:
        state.disposable_read.discard(rollout_id)
        state.disposable_released.put(rollout_id, ended)
    else:
        state.disposable_released.discard(rollout_id)
        if entry.read:
            state.disposable_read.put(rollout_id, ended)
        else:
            state.disposable_read.discard(rollout_id)


def settle(state: State, entry: Entry) -> None:
    """Somebody wants a rollout no longer, or does again: where it stands for retention and eviction."""
    enter_retention(state, entry)
    if state.spans.has(entry.rollout.rollout_id):
        enter_eviction(state, entry)


def reconsider(state: State, entry: Entry) -> None:
    """A rollout may be wanted by others now, though its status is what it was."""
    follow(state, entry)
    settle(state, entry)


# -- who is known ------------------------------------------------------------------------------------------------------


def check_filter(state: State, consumer: str, asked: Filter | None) -> None:
    """Refuse another filter than the one that a consumer has."""
    known = state.consumers.get(consumer)
    if known is not None and known.filter is not None and asked is not None and asked != known.filter:
        raise ConsumerFilterError(consumer, known.filter, asked)


def know(state: State, consumer: str, wanted: Filter | None = None) -> Consumer:
    """The consumer of this name, known from now on; a filter, if there is one, is its own from now on."""
    known = state.consumers.get(consumer)
    if known is None:
        bounds.admit("consumers", len(state.consumers), bounds.CONSUMERS)
        known = state.forgotten.pop(consumer, None)
        is_new = known is None
        known = known or Consumer()
        state.consumers[consumer] = known
        known.filter = wanted
        accepts = _accepts(state, consumer, wanted, is_new=is_new)
        known.awaiting = OrderedDict((i, None) for _, i in state.completions.after(None) if accepts(i))
    elif wanted is not None and known.filter != wanted:
        _change_filter(state, consumer, known, wanted)
    return known


def _change_filter(state: State, consumer: str, known: Consumer, wanted: Filter) -> None:
    before, is_wider = known.awaiting, known.filter is not None
    known.filter, known.coming = wanted, None
    accepts = _accepts(state, consumer, wanted)
    known.awaiting = OrderedDict((i, None) for i in before if accepts(i))
    if is_wider:  # another one than before; until there was one, everything was awaited
        known.awaiting.update((i, None) for _, i in state.completions.after(None) if i not in before and accepts(i))
    for rollout_id in before:
        if rollout_id not in known.awaiting:
            known.returned.pop(rollout_id, None)
            settle(state, state.entries[rollout_id])
    _sort_coming(state)


def _accepts(state: State, consumer: str, wanted: Filter | None, *, is_new: bool = False) -> Callable[[str], bool]:
    """Whether a consumer awaits a finished rollout, by its id: by the indexes as far as they tell."""
    statuses = {status: state.indexes.find(("status", status)) for status in _statuses(wanted)}
    succeeded, failed = statuses.get("succeeded", {}), statuses.get("failed", {})
    asked = dict(wanted or {})
    tags, mode = asked.get("tags") or {}, asked.get("mode")
    keys = [(key, asked[name]) for name, key in (("queue", "queue"), ("group_id", "group")) if name in asked]
    found = [state.indexes.find(key) for key in (*keys, *(("tag", tag) for tag in tags.items()))]

    def accepts(rollout_id: str) -> bool:
        if not (rollout_id in succeeded or rollout_id in failed) or not all(rollout_id in ids for ids in found):
            return False
        if is_new and mode is None and rollout_id in succeeded:
            return True
        entry = state.entries[rollout_id]
        return consumer not in entry.taken and not is_dropped(entry.latest) and mode in (None, entry.rollout.mode)

    return accepts


def let_go(state: State, consumer: str) -> list[str]:
    """Forget a consumer: the rollouts that it awaited or held, and keeps from nobody any more."""
    known = state.consumers.pop(consumer, None)
    if known is None:
        return []
    state.forgotten[consumer] = known
    rollout_ids = list(known.awaiting)
    for batch in known.batches.values():
        for rollout_id in batch:
            entry = state.entries.get(rollout_id)
            if entry is not None:
                entry.taken = others(entry, consumer)
                state.touch(rollout_id)
                rollout_ids.append(rollout_id)
    known.awaiting, known.coming = OrderedDict(), None
    for held in (known.returned, known.batches, known.steps, known.holders):
        held.clear()
    for rollout_id in rollout_ids:
        settle(state, state.entries[rollout_id])
    _sort_coming(state)
    return rollout_ids


def others(entry: Entry, consumer: str) -> Mapping[str, Taken]:
    """Who has taken a rollout, one consumer apart."""
    return {name: taken for name, taken in entry.taken.items() if name != consumer} or NOBODY


def _sort_coming(state: State) -> None:
    """What runs may be awaited by nobody now."""
    for rollout_id in list(state.eviction_heaps[COMING]):
        enter_eviction(state, state.entries[rollout_id])


def introduce(state: State, before: Settings) -> None:
    """Know the consumers that the settings name; not those that were named before, and forgotten since."""
    for consumer, wanted in state.settings.consumers.items():
        if consumer not in state.forgotten or consumer not in before.consumers:
            know(state, consumer, wanted)


def configure(state: State, settings: Settings) -> None:
    """Let a store begin, or go on, with these settings."""
    before = state.settings
    state.configure(settings)
    introduce(state, before)


def in_the_way(state: State) -> list[tuple[str, int, int]]:
    """Who keeps rollouts in memory, the one with most first: consumer, how many it awaits, how many it holds."""
    found = [(n, len(k.awaiting), sum(map(len, k.batches.values()))) for n, k in state.consumers.items()]
    return sorted((row for row in found if row[1] or row[2]), key=lambda row: (-row[1] - row[2], row[0]))
