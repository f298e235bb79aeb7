"""Training on each finished rollout exactly once: what consumers await and take, and what a durable model has seen.

A consumer awaits the finished rollouts that its filter selects; as long as it has no filter, all that can be trained
on. Each change of a rollout updates what consumers await (`follow`), so that the cost of a take is that of its batch.
A consumer takes batches, in completion order, each rollout once. It says which step of its model consumed a batch
(`ack`), and up to which step the model is durable (`checkpoint`). When the model falls back to an earlier step
(`rewind`), what was consumed after that comes again, in the order in which it was taken.
A consumer of groups awaits complete ones instead (`follow_group`), takes whole ones, and each once: `Consumer.takes`
says which it is, from its first take on. What is said here of rollouts holds for the chosen members of its groups.
A batch belongs to the session that took it and is handed over like a claim. A batch that its caller never got is given
back, and the batches of an ended session come again before anything else. A rollout in a batch is sealed: later reports
are kept on its attempts, and decide nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from itertools import chain, islice
from types import MappingProxyType
from typing import Any, NoReturn

from raystore.core.feed_table import FeedEntry
from raystore.core.group_table import GroupEntry, in_order_of_completion
from raystore.core.lifecycle import (
    ACTIVE,
    CONSUMED,
    FINISHED,
    OPEN,
    QUEUED,
    READY,
    TRAINABLE,
    UNDONE,
    Trainable,
    group_after,
    is_dropped,
)
from raystore.core.records import Group, Many, Rollout
from raystore.core.schema import Id, Mode, Positive, Seconds, Tags, Text, Whole
from raystore.core.state import (
    NOBODY,
    BatchKey,
    Consumer,
    Entry,
    Pair,
    Session,
    Settings,
    State,
    Step,
    Taken,
    require_room,
)
from raystore.errors import (
    BatchConflictError,
    BatchHeldError,
    ConsumerFilterError,
    ConsumerUnitError,
    InvalidValueError,
    StoreError,
)

CONSUMERS = 1_000  #: that are known: each is asked with every rollout that finishes
USUAL = ["succeeded"]  #: what a consumer is given if it says nothing
ROLLOUTS, GROUPS = "rollouts", "groups"  #: what a consumer takes

Filter = dict[str, Any]  #: what is to be equal, by field of a rollout; and "status_in", always

# Classes of eviction, in the order in which their spans go: from what nobody needs to what will be awaited.
RELEASED, TRAINED_ON, READ, UNREAD, RUNNING, WANTED, COMING = range(7)


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


def fits(wanted: Filter | None, rollout: Rollout | GroupEntry) -> bool:
    """Whether a rollout, or a group, is what a filter asks for, however it may end."""
    for name, value in (wanted or {}).items():
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
    if rollout_id in state.evaluations.by_rollout:  # nobody is to train on it
        return
    is_finished = rollout.status in FINISHED
    is_trainable = rollout.status in TRAINABLE and not is_given_up(entry)
    for name, known in state.consumers.items():
        if known.takes == GROUPS:
            continue
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


def is_given_up(entry: Entry) -> bool:
    """Whether nobody trains on a rollout, since its agent gave the task up; but if it succeeded by hand, it counts."""
    return entry.rollout.status == "failed" and is_dropped(entry.latest)


def follow_group(state: State, group: GroupEntry) -> None:
    """Let consumers await a group, or not any more, after it has changed; anew, at the end, if it is complete anew."""
    for name, known in state.consumers.items():
        if known.takes != GROUPS:
            continue
        is_asked = asks_for(state, name, known, group)
        if known.coming is not None:
            if is_asked and group.is_open:
                known.coming[group.group_id] = None
            else:
                known.coming.pop(group.group_id, None)
        if is_asked and is_ready_for(state, name, group) and not _has_taken(state, name, group):
            known.groups[group.group_id] = None
        elif known.groups.pop(group.group_id, 0) is None:
            known.returned.pop(group.group_id, None)
    for rollout_id in group.members:
        if (entry := state.entries.get(rollout_id)) is not None:
            settle(state, entry)


def asks_for(state: State, consumer: str, known: Consumer, group: GroupEntry) -> bool:
    """Whether a consumer of groups is given a group, however it may end; that of a feed gets those of the feed."""
    if group.group_id in state.evaluations.by_group:
        return False
    feed = state.feeds.get(consumer)
    return fits(known.filter, group) if feed is None else state.feeds.by_group.get(group.group_id) is feed


def is_ready_for(state: State, consumer: str, group: GroupEntry) -> bool:
    """Whether a consumer that asks for a group may have it now; the pump of a feed may have to judge it first."""
    if not group.is_ready:
        return False
    feed = state.feeds.get(consumer)
    item = feed.items.get(group.group_id) if feed is not None else None
    return item is None or item.is_kept


def forget_group(state: State, group: GroupEntry) -> None:
    """A group is gone."""
    for known in state.consumers.values():
        if known.takes == GROUPS:
            known.groups.pop(group.group_id, None)
            known.returned.pop(group.group_id, None)
            if known.coming is not None:
                known.coming.pop(group.group_id, None)


def _has_taken(state: State, consumer: str, group: GroupEntry) -> bool:
    entries = (state.entries.get(rollout_id) for rollout_id in group.chosen)
    return any(entry is not None and consumer in entry.taken for entry in entries)


def forget(state: State, rollout_id: str) -> None:
    """A rollout is deleted; its group learns of it at the end of the step."""
    for known in state.consumers.values():
        if known.takes == GROUPS:
            continue
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
    if any(rollout_id in known.awaiting for known in state.consumers.values()):
        return True
    group = state.groups.of(entry.rollout)
    if group is None or rollout_id not in group.chosen:
        return False
    return any(group.group_id in known.groups for known in state.consumers.values())


def is_needed(state: State, entry: Entry) -> bool:
    """Whether a finished rollout must stay: it is wanted, or its group is still open or under way in a feed."""
    group = state.groups.of(entry.rollout)
    if group is not None and (group.is_open or state.feeds.item_of(group.group_id) is not None):
        return True
    return is_wanted(state, entry)


def _will_be_awaited(state: State, consumer: str, known: Consumer, entry: Entry) -> bool:
    """Whether a rollout that has not been decided may be one that a consumer awaits."""
    if entry.rollout.rollout_id in state.evaluations.by_rollout:
        return False
    if known.takes != GROUPS:
        return entry.rollout.status not in FINISHED and fits(known.filter, entry.rollout)
    group = state.groups.of(entry.rollout)
    if group is None or not asks_for(state, consumer, known, group):
        return False
    return group.is_open or (group.status in READY and not is_ready_for(state, consumer, group))


def may_still_come(state: State, known: Consumer) -> bool:
    """Whether anything that waits or runs could be given to a consumer, no feed, once it has finished."""
    takes_groups = known.takes == GROUPS
    if known.filter is None or len(known.filter) == 1:
        evaluations = state.evaluations
        if takes_groups:
            return state.groups.count(OPEN) > len(state.groups.having(OPEN).keys() & evaluations.by_group.keys())
        return len(state.entries) - len(state.completions) > len(evaluations.unfinished)
    if known.coming is None and takes_groups:
        found = map(state.groups.by_id.__getitem__, state.groups.having(OPEN))
        of_others = (group for group in found if group.group_id not in state.evaluations.by_group)
        known.coming = {group.group_id: None for group in of_others if fits(known.filter, group)}
    elif known.coming is None:
        known.coming = {}
        for status in (*ACTIVE, *QUEUED):
            for rollout_id in state.indexes.find(("status", status)):
                is_evaluated = rollout_id in state.evaluations.by_rollout
                if not is_evaluated and fits(known.filter, state.entries[rollout_id].rollout):
                    known.coming[rollout_id] = None
    return bool(known.coming)


def eviction_class(state: State, entry: Entry) -> int:
    """How much the spans of a rollout are needed: the lower, the sooner they go."""
    is_finished = entry.rollout.status in FINISHED
    if state.consumers:
        if any(_will_be_awaited(state, name, known, entry) for name, known in state.consumers.items()):
            return COMING  # also if it has finished: the store must not pause for what its group still needs
        if is_finished and is_wanted(state, entry):
            return WANTED
    if entry.released:
        return RELEASED
    if not is_finished:
        return RUNNING
    if entry.taken:
        return TRAINED_ON
    return READ if entry.read else UNREAD


def enter_eviction(state: State, entry: Entry) -> None:
    """Make a rollout with spans known to the eviction class it now belongs to."""
    rollout, number = entry.rollout, eviction_class(state, entry)
    if number != entry.evicts_as:
        state.eviction_heaps[entry.evicts_as].pop(rollout.rollout_id, None)
        entry.evicts_as = number
    state.eviction_heaps[number].put(rollout.rollout_id, (rollout.start_time, entry.number))


def enter_retention(state: State, entry: Entry) -> None:
    """Make a rollout known to the retention rule if nobody needs it any more, and unknown if somebody does."""
    rollout = entry.rollout
    rollout_id, ended = rollout.rollout_id, rollout.end_time
    if ended is None or is_needed(state, entry):
        state.disposable_released.pop(rollout_id, None)
        state.disposable_read.pop(rollout_id, None)
    elif entry.released or entry.taken:
        state.disposable_read.pop(rollout_id, None)
        state.disposable_released.put(rollout_id, ended)
    else:
        state.disposable_released.pop(rollout_id, None)
        if entry.read:
            state.disposable_read.put(rollout_id, ended)
        else:
            state.disposable_read.pop(rollout_id, None)


def settle(state: State, entry: Entry) -> None:
    """Update the place of a rollout for retention and eviction, after what consumers await or hold has changed."""
    enter_retention(state, entry)
    if state.spans.has(entry.rollout.rollout_id):
        enter_eviction(state, entry)


def reconsider(state: State, entry: Entry) -> None:
    """A rollout may be wanted by others now, though its status is what it was."""
    follow(state, entry)
    settle(state, entry)


# -- who is known ------------------------------------------------------------------------------------------------------


def know(state: State, consumer: str, wanted: Filter | None = None) -> Consumer:
    """The consumer of this name, made known if it is new; sets its filter if one is given."""
    known = state.consumers.get(consumer)
    if known is None:
        require_room("consumers", len(state.consumers), CONSUMERS)
        known = state.forgotten.pop(consumer, None)
        is_new = known is None
        known = known or Consumer()
        known.takes = None
        state.consumers[consumer] = known
        known.filter = wanted
        accepts = _accepts(state, consumer, wanted, is_new=is_new)
        known.awaiting = OrderedDict((i, None) for _, i in state.completions.after(None) if accepts(i))
    elif wanted is not None and known.filter != wanted:
        _change_filter(state, consumer, known, wanted)
    return known


def _fix_unit(state: State, known: Consumer, consumer: str, takes: str) -> None:
    """Let a consumer take rollouts, or groups, from now on."""
    if known.takes is not None:
        return
    known.takes = takes
    if takes != GROUPS:
        return
    before, known.awaiting, known.coming = known.awaiting, OrderedDict(), None
    ready = (state.groups.by_id[group_id] for status in READY for group_id in state.groups.having(status))
    for group in in_order_of_completion(ready):
        is_asked = asks_for(state, consumer, known, group) and is_ready_for(state, consumer, group)
        if is_asked and not _has_taken(state, consumer, group):
            known.groups[group.group_id] = None
    for rollout_id in before:
        known.returned.pop(rollout_id, None)
        settle(state, state.entries[rollout_id])
    _sort_coming(state)


def know_feed(state: State, feed: FeedEntry) -> None:
    """Make a new feed known, and the consumer of its name, which takes its groups."""
    consumer = feed.name
    known = state.consumers.get(consumer)
    if known is not None and (known.takes is not None or known.filter is not None):
        expected = f"a name of its own: a consumer of this name takes {known.takes or ROLLOUTS} (or forget_consumer)"
        raise InvalidValueError("feed", consumer, expected)
    if known is None:
        require_room("consumers", len(state.consumers), CONSUMERS)
    state.feeds.by_name[consumer] = feed
    known = know(state, consumer)
    _fix_unit(state, known, consumer, GROUPS)
    known.filter, known.coming = {"status_in": list(USUAL)}, None


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
        if rollout_id in state.evaluations.by_rollout:
            return False
        if is_new and mode is None and rollout_id in succeeded:
            return True
        entry = state.entries[rollout_id]
        return consumer not in entry.taken and not is_given_up(entry) and mode in (None, entry.rollout.mode)

    return accepts


def let_go(state: State, consumer: str) -> list[str]:
    """Forget a consumer; returns the rollouts that it awaited or held."""
    known = state.consumers.pop(consumer, None)
    if known is None:
        return []
    state.feeds.remove(consumer)
    state.forgotten[consumer] = known
    held = untake(state, consumer, chain.from_iterable(known.batches.values()))
    awaited = [i for group_id in known.groups for i in state.groups.by_id[group_id].chosen]
    rollout_ids = [*known.awaiting, *awaited, *(entry.rollout.rollout_id for entry in held)]
    groups = [group_id for batch in known.grouped.values() for group_id in batch]
    known.awaiting, known.groups, known.coming, known.takes = OrderedDict(), OrderedDict(), None, None
    for kept in (known.returned, known.batches, known.grouped, known.steps, known.holders, known.since):
        kept.clear()
    _undo(state, groups)
    for rollout_id in rollout_ids:
        settle(state, state.entries[rollout_id])
    _sort_coming(state)
    return rollout_ids


def _undo(state: State, group_ids: Iterable[str]) -> None:
    """Batches with these groups were undone: who has trained on a group no more may have been the only one."""
    for group_id in group_ids:
        group = state.groups.by_id[group_id]
        chosen = (state.entries[rollout_id] for rollout_id in group.chosen if rollout_id in state.entries)
        if not any(taken.step is not None for entry in chosen for taken in entry.taken.values()):
            state.groups.move(group, group_after(group.status, UNDONE))
            state.touch_group(group_id)
        follow_group(state, group)


def untake(state: State, consumer: str, rollout_ids: Iterable[str]) -> list[Entry]:
    """A consumer has not taken these rollouts any more; returns those that there are."""
    entries = [entry for i in rollout_ids if (entry := state.entries.get(i)) is not None]
    for entry in entries:
        entry.taken = {name: taken for name, taken in entry.taken.items() if name != consumer} or NOBODY
        state.touch(entry.rollout.rollout_id)
    return entries


def _sort_coming(state: State) -> None:
    """Classify again the rollouts that a consumer was going to await: perhaps none is any more."""
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
    groups = state.groups.by_id
    found = [
        (n, len(k.awaiting) + sum(len(groups[i].chosen) for i in k.groups), sum(map(len, k.batches.values())))
        for n, k in state.consumers.items()
    ]
    return sorted((row for row in found if row[1] or row[2]), key=lambda row: (-row[1] - row[2], row[0]))


# -- batches -----------------------------------------------------------------------------------------------------------

#: Rollouts, and its number; if it is one of groups, each group stands before its rollouts.
Batch = tuple[list[Any], int]


def prepare(
    state: State, step: Step, consumer: str, asked: Filter | None, max_open: int, takes: str = ROLLOUTS
) -> Consumer:
    """The consumer that asks for a batch; raises if it may have none, or asks for something else than before."""
    known = state.consumers.get(consumer)
    if known is not None and known.takes not in (None, takes):
        raise ConsumerUnitError(consumer, known.takes or "", takes)
    if known is not None and known.filter is not None and takes == GROUPS and known.filter["status_in"] != USUAL:
        raise ConsumerFilterError(consumer, known.filter, asked or {"status_in": list(USUAL)})
    if known is not None and known.filter is not None and asked is not None and asked != known.filter:
        raise ConsumerFilterError(consumer, known.filter, asked)
    if (refusal := why_not(state, step.session, consumer, max_open, step.age)) is not None:
        raise refusal
    if asked is None and (known is None or known.filter is None):
        asked = {"status_in": list(USUAL)}  # it has said now what it takes
    known = know(state, consumer, asked)
    _fix_unit(state, known, consumer, takes)
    return known


def why_not(state: State, session: Session | None, consumer: str, max_open: int, age: float) -> StoreError | None:
    """Why a consumer cannot have another batch at this age: it holds as many as it may, or is a feed that is paused."""
    known = state.consumers.get(consumer)
    if known is None or _left_behind(known) is not None:
        return None
    if len(known.holders) < max_open:
        feed = state.feeds.get(consumer)
        return feed.refusal() if feed is not None else None
    mine = session.session_id if session is not None else None
    held = [
        [number, len(known.batches[number]), "taken by this process" if whose == mine else f"taken by session {whose}"]
        for number, whose in sorted(known.holders.items())
    ]
    others = [state.sessions[whose] for whose in known.holders.values() if whose is not None and whose != mine]
    return BatchHeldError(consumer, held, max_open, max((state.ask_for_sign(one, age) for one in others), default=None))


def _left_behind(known: Consumer) -> int | None:
    """The first batch whose session has ended; it comes again before anything else."""
    return min((number for number, whose in known.holders.items() if whose is None), default=None)


def is_ready(state: State, consumer: str, known: Consumer, count: int) -> bool:
    """Whether a take should be answered now, because waiting would not make its batch larger."""
    if _left_behind(known) is not None:
        return True
    if (feed := state.feeds.get(consumer)) is not None:
        return feed.is_over or bool(_next(state, consumer, known, count))
    there = len(_next(state, consumer, known, count)) if state.deleting else min(len(_awaited_by(known)), count)
    return there >= count or (there > 0 and (state.memory_full or not may_still_come(state, known)))


def _awaited_by(known: Consumer) -> Mapping[str, None]:
    """The rollouts, or groups, that a consumer is to be given, in this order."""
    return known.groups if known.takes == GROUPS else known.awaiting


def _next(state: State, consumer: str, known: Consumer, count: int) -> list[str]:
    """What a consumer is given next, up to so many; what is about to be deleted is passed over."""
    awaited = _awaited_by(known)
    if (feed := state.feeds.get(consumer)) is not None:
        if state.deleting:
            chosen = ((i, state.groups.by_id[i].chosen) for i in awaited)
            awaited = {i: None for i, members in chosen if not any(map(state.is_reserved, members))}
        return feed.next_batch(awaited, count, len(known.holders), is_full=state.memory_full)
    if not state.deleting:
        return list(islice(awaited, count))
    if known.takes != GROUPS:
        return list(islice((i for i in awaited if not state.is_reserved(i)), count))
    groups = state.groups.by_id
    return list(islice((i for i in awaited if not any(map(state.is_reserved, groups[i].chosen))), count))


def has_something(state: State, consumer: str, known: Consumer, count: int) -> bool:
    """Whether there is anything to take at all; of a feed, whether there is a whole batch."""
    return _left_behind(known) is not None or bool(_next(state, consumer, known, count))


def take(
    state: State,
    step: Step,
    *,
    consumer: Id,
    count: Positive,
    timeout: Seconds = 0.0,
    mode: Mode | None = None,
    tags: Tags | None = None,
    queue: Id | None = None,
    group_id: Id | None = None,
    status_in: list[Trainable] | None = None,
    max_open: Positive = 1,
    of: int | None = None,
) -> Batch | None:
    """A batch; None if waiting may bring a better one. `of` asks for what a parked call was handed."""
    asked = make_filter(mode=mode, tags=tags, queue=queue, group_id=group_id, status_in=status_in)
    return _take(state, step, consumer, count, timeout, asked, max_open, of, ROLLOUTS)


def take_groups(
    state: State,
    step: Step,
    *,
    consumer: Id,
    count: Positive,
    timeout: Seconds = 0.0,
    mode: Mode | None = None,
    tags: Tags | None = None,
    queue: Id | None = None,
    group_id: Id | None = None,
    max_open: Positive = 1,
    of: int | None = None,
) -> Batch | None:
    """A batch of up to `count` whole groups; else as `take`."""
    asked = make_filter(mode=mode, tags=tags, queue=queue, group_id=group_id)
    return _take(state, step, consumer, count, timeout, asked, max_open, of, GROUPS)


def _take(
    state: State,
    step: Step,
    consumer: str,
    count: int,
    timeout: float,
    asked: Filter | None,
    max_open: int,
    of: int | None,
    takes: str,
) -> Batch | None:
    if of is not None and step.session is not None:
        for key in step.session.replies.handed.pop(of, []):
            if isinstance(key[1], int) and (found := batch_again(state, step.session, key)) is not None:
                return found
    known = prepare(state, step, consumer, asked, max_open, takes)
    if timeout > 0 and not is_ready(state, consumer, known, count):
        return None
    return take_now(state, step, consumer, count)


def take_now(state: State, step: Step, consumer: str, count: int) -> Batch:
    """The batch that a consumer holds from now on: one that was left behind, if there is one.

    No rollouts and number 0 if there is nothing to take.
    """
    known = know(state, consumer)
    number = _left_behind(known)
    if number is not None:
        known.inherited[number] = None
        there = sum(i in state.entries for i in known.batches[number])
        _hand(state, step, known, consumer, number)
        state.changes.append(step.now, "taken", consumer=consumer, batch=number, rollouts=there, again=True)
        return _content(state, known, number), number
    found = _next(state, consumer, known, count)
    if not found:
        return [], 0
    if (feed := state.feeds.get(consumer)) is not None:
        state.feeds.take(feed, found)
    known.made += 1
    number = known.made
    awaited = known.groups if known.takes == GROUPS else known.awaiting
    for name in found:
        del awaited[name]
        known.returned.pop(name, None)
    chosen = found
    if known.takes == GROUPS:
        known.grouped[number] = found
        chosen = [i for group_id in found for i in state.groups.by_id[group_id].chosen]
    known.batches[number] = chosen
    for rollout_id in chosen:
        entry = state.entries[rollout_id]
        entry.taken = {**entry.taken, consumer: Taken(number)}
        state.touch(rollout_id)
    _hand(state, step, known, consumer, number)
    state.changes.append(step.now, "taken", consumer=consumer, batch=number, rollouts=len(chosen))
    return _content(state, known, number), number


def _content(state: State, known: Consumer, number: int) -> list[Any]:
    """What is in a batch: its rollouts; of a consumer of groups, each group before its rollouts."""
    if number not in known.grouped:
        return [state.entries[i].pair for i in known.batches[number] if i in state.entries]
    found: list[Group | Pair] = []
    for group_id in known.grouped[number]:
        group = state.groups.by_id[group_id]
        found.append(as_shown(state, group))
        found += [state.entries[i].pair for i in group.chosen]
    return found


def as_shown(state: State, group: GroupEntry) -> Group:
    """A group as others see it; its input is that of its members."""
    entries = (state.entries.get(rollout_id) for rollout_id in group.members)
    deadline = None if group.deadline is None else group.deadline + state.paused
    return Group(
        group_id=group.group_id,
        input=next((entry.rollout.input for entry in entries if entry is not None), None),
        n=group.n,
        min_size=group.min_size,
        spare=group.spare,
        replace=group.replace,
        start_time=group.start_time,
        end_time=group.end_time,
        deadline_time=deadline,
        status=group.status,
        why=group.why,
        mode=group.mode,
        queue=group.queue,
        priority=group.priority,
        tags=group.tags,
        members=list(group.members),
    )


def batch_again(state: State, session: Session, key: BatchKey) -> Batch | None:
    """A batch as it is now, for the session that holds it; None if it does no longer."""
    known = state.consumers.get(key[0])
    if known is None or known.holders.get(key[1]) != session.session_id:
        return None
    return _content(state, known, key[1]), key[1]


def get_batch(state: State, step: Step, *, consumer: Id, batch: int) -> Many:
    """What is in a batch that is open, for a caller that has lost a part of its answer."""
    known = known_consumer(state, consumer, batch)
    if batch not in known.holders:
        refuse(known, consumer, batch)
    return Many(_content(state, known, batch), batch)


# -- whose a batch is --------------------------------------------------------------------------------------------------


def _hand(state: State, step: Step, known: Consumer, consumer: str, number: int) -> None:
    """A batch goes to the session that asks, which is to acknowledge it."""
    session = step.session
    if session is None:
        known.holders[number] = None
        return
    known.holders[number] = session.session_id
    known.since[number] = step.now
    session.batches[consumer, number] = step.age
    state.claim_deadlines.guard((session.session_id, (consumer, number)))


def _free(state: State, known: Consumer, consumer: str, number: int) -> None:
    """Close a batch: nobody holds it any more."""
    whose = known.holders.pop(number, None)
    known.since.pop(number, None)
    known.inherited.pop(number, None)
    if whose is not None and (session := state.sessions.get(whose)) is not None:
        session.batches.pop((consumer, number), None)


def received(state: State, session: Session, key: BatchKey) -> bool:
    """A session acknowledges a batch; whether it holds it (again, if nobody took it meanwhile)."""
    known = state.consumers.get(key[0])
    if known is None or key[1] not in known.holders or known.holders[key[1]] not in (None, session.session_id):
        return False
    known.holders[key[1]] = session.session_id
    session.batches[key] = None
    return True


def leave(state: State, session: Session, key: BatchKey) -> None:
    """Leave a batch to the session that asks next: its own has ended, or never acknowledged it."""
    session.batches.pop(key, None)
    known = state.consumers.get(key[0])
    if known is not None and known.holders.get(key[1]) == session.session_id:
        known.holders[key[1]] = None
        state.effects.has_batches = True


def decline(state: State, step: Step, session: Session, key: BatchKey) -> bool:
    """Give a batch back whose caller had gone when the answer came; whether there was one to give back."""
    known = state.consumers.get(key[0])
    if known is None or known.holders.get(key[1]) != session.session_id:
        return False
    nack(state, step, consumer=key[0], batch=key[1])
    return True


def _mine(state: State, step: Step, known: Consumer, consumer: str, batch: int) -> None:
    """Refuse a session whose batch another session has taken over. A call of the holder also acknowledges the batch."""
    whose = known.holders.get(batch)
    session = step.session
    if session is None or whose is None:
        return
    if whose == session.session_id:
        session.batches[consumer, batch] = None
    elif batch in known.inherited:
        why = f"batch {batch} was left behind by its session and taken over by session {whose}, which has it now"
        raise BatchConflictError(consumer, why)


# -- what became of it -------------------------------------------------------------------------------------------------


def unreserve(state: State, session: Session) -> None:
    """A long deletion has ended. What it did not reach may be taken again."""
    if state.deleting.pop(session.session_id, None) is not None:
        session.deleting = {}
        state.effects.has_batches = True


def ack(
    state: State,
    step: Step,
    *,
    consumer: Id,
    batch: int,
    at_step: Whole,
    note: Text | None,
    notes: dict[Id, Text] | None = None,
) -> None:
    """A step of the model has consumed a batch; it is kept until the model is durable.

    The note is of each rollout that `notes` has none for.
    """
    known = known_consumer(state, consumer, batch)
    if batch not in known.holders:
        if known.steps.get(batch) == at_step:
            return  # said before
        refuse(known, consumer, batch)
    _mine(state, step, known, consumer, batch)
    consume(state, step, known, consumer, batch, at_step, note, notes or {})
    _free(state, known, consumer, batch)


def consume(
    state: State,
    step: Step,
    known: Consumer,
    consumer: str,
    batch: int,
    at_step: int,
    note: str | None,
    notes: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Note which step consumed a batch that is open; steps only grow."""
    if known.checkpoint is not None and at_step <= known.checkpoint:
        raise BatchConflictError(
            consumer, f"step {at_step} cannot consume batch {batch}: the model is durable at step {known.checkpoint}"
        )
    latest = max(known.steps.values(), default=at_step)
    if at_step < latest:
        raise BatchConflictError(consumer, f"step {at_step} cannot consume batch {batch}: {latest} consumed one before")
    known.steps[batch] = at_step
    for rollout_id in known.batches[batch]:
        if (entry := state.entries.get(rollout_id)) is not None:
            entry.taken = {**entry.taken, consumer: Taken(batch, at_step, note=notes.get(rollout_id, note))}
            state.touch(rollout_id)
    for group_id in known.grouped.get(batch, ()):
        group = state.groups.by_id[group_id]
        state.groups.move(group, group_after(group.status, CONSUMED))
        state.touch_group(group_id)
    if (feed := state.feeds.get(consumer)) is not None:
        state.feeds.train(feed, known.grouped.get(batch, ()))
    state.changes.append(step.now, "consumed", consumer=consumer, batch=batch, step=at_step, note=note)


def nack(state: State, step: Step, *, consumer: Id, batch: int) -> None:
    """A batch is not consumed: its rollouts come again, before all others."""
    known = known_consumer(state, consumer, batch)
    if batch not in known.holders:
        refuse(known, consumer, batch)
    _mine(state, step, known, consumer, batch)
    _return(state, known, consumer, [batch])
    state.changes.append(step.now, "returned", consumer=consumer, batch=batch)


def checkpoint(state: State, step: Step, *, consumer: Id, at_step: Whole) -> int:
    """The model is durable at a step: what it consumed up to there is needed for it no longer; how many rollouts."""
    known = state.consumers.get(consumer)
    if known is not None and known.checkpoint is not None and at_step < known.checkpoint:
        raise BatchConflictError(consumer, f"checkpoint {at_step} is before its last one, {known.checkpoint}")
    known = know(state, consumer)
    known.checkpoint = at_step
    count = 0
    for batch in [batch for batch, consumed_by in known.steps.items() if consumed_by <= at_step]:
        del known.steps[batch]
        released = known.grouped.pop(batch, [])
        if (feed := state.feeds.get(consumer)) is not None:
            state.feeds.release(feed, released)
        for rollout_id in known.batches.pop(batch):
            entry = state.entries.get(rollout_id)
            if entry is None:
                continue
            count += 1
            before = entry.taken[consumer]
            entry.taken = {**entry.taken, consumer: Taken(before.batch, before.step, before.note, is_durable=True)}
            state.touch(rollout_id)
            settle(state, entry)
    state.changes.append(step.now, "checkpoint", consumer=consumer, step=at_step, rollouts=count)
    return count


def rewind(state: State, step: Step, *, consumer: Id, at_step: Whole) -> int:
    """The model is at an earlier step again: what was consumed later, or taken and not consumed, comes again."""
    known = state.consumers.get(consumer)
    if known is not None and known.checkpoint is not None and at_step < known.checkpoint:
        why = f"it cannot go back to step {at_step}: what was consumed up to step {known.checkpoint} is released"
        raise BatchConflictError(consumer, why)
    known = know(state, consumer)
    batches = [batch for batch in known.batches if batch in known.holders or known.steps.get(batch, at_step) > at_step]
    count = _return(state, known, consumer, batches)
    state.changes.append(step.now, "rewound", consumer=consumer, step=at_step, rollouts=count)
    return count


def forget_consumer(state: State, step: Step, *, consumer: Id) -> int:
    """Nothing is kept for a consumer any more; how many rollouts it awaited or held."""
    known = state.consumers.get(consumer)
    if known is None:
        return 0
    for number in list(known.holders):
        _free(state, known, consumer, number)
    count = len(let_go(state, consumer))
    state.effects.has_batches = True  # whoever waits for its next batch
    state.changes.append(step.now, "consumer_forgotten", consumer=consumer, rollouts=count)
    return count


def _return(state: State, known: Consumer, consumer: str, batches: list[int]) -> int:
    back: dict[str, None] = {}
    groups: dict[str, None] = {}
    acknowledged = sum(batch in known.steps for batch in batches)
    for batch in sorted(batches):
        for entry in untake(state, consumer, known.batches.pop(batch)):
            rollout_id = entry.rollout.rollout_id
            back[rollout_id] = None
            follow(state, entry)
            if rollout_id not in known.awaiting:  # it asks for something else by now
                settle(state, entry)
        groups |= dict.fromkeys(known.grouped.pop(batch, ()))
        known.steps.pop(batch, None)
        _free(state, known, consumer, batch)
    if (feed := state.feeds.get(consumer)) is not None:
        state.feeds.give_back(feed, groups, acknowledged)
    _undo(state, groups)
    if back:
        state.effects.has_batches = True
    awaited = known.groups if known.takes == GROUPS else known.awaiting
    for name in reversed(groups or back):  # these were taken before what came back earlier and was not taken again
        if name in awaited:
            awaited.move_to_end(name, last=False)
            known.returned[name] = None
    return len(back)


def known_consumer(state: State, consumer: str, batch: int) -> Consumer:
    """The consumer that is said to hold a batch."""
    known = state.consumers.get(consumer)
    if known is None:
        raise BatchConflictError(consumer, f"it has taken nothing, so that it does not hold batch {batch}")
    return known


def refuse(known: Consumer, consumer: str, batch: int) -> NoReturn:
    """Say why a consumer does not hold a batch."""
    if batch in known.steps:
        why = f"step {known.steps[batch]} has consumed batch {batch} already"
    elif batch == 0:
        why = "a take that gives nothing gives batch 0, which holds nothing: ask `if batch.rollouts` first"
    elif batch > known.made or batch < 1:
        why = f"there never was a batch {batch}"
    else:
        why = f"it does not hold batch {batch} any more: it was given back, rewound, or released by a checkpoint"
    raise BatchConflictError(consumer, why)


def ledger(state: State, step: Step, *, consumer: Id) -> Many:
    """What a consumer took of what is still here: rollout, batch, step, whether the model is durable, note."""
    rows = []
    for rollout_id, entry in state.entries.items():
        taken = entry.taken.get(consumer)
        if taken is not None:
            rows.append((rollout_id, taken.batch, taken.step, taken.is_durable, taken.note))
    return Many(sorted(rows, key=lambda row: row[1]), len(rows))


def describe(state: State) -> dict[str, dict[str, Any]]:
    """Where each consumer stands."""
    return {
        name: {
            "filter": known.filter,
            "takes": known.takes,
            "awaited": len(_awaited_by(known)),
            "open": [
                {"batch": number, "rollouts": len(known.batches[number]), "session": whose}
                for number, whose in sorted(known.holders.items())
            ],
            "open_batch": min(known.holders, default=None),
            "batches": known.made,
            "checkpoint": known.checkpoint,
            "unreleased": sum(len(known.batches[batch]) for batch in known.steps),
            "returned": len(known.returned),
        }
        for name, known in state.consumers.items()
    }
