"""Groups: samples of one input that are trained on together, and the rule by which each comes to its end.

A group has `n` places, each held by a member, and is complete when a member has succeeded in each. It never ends with
what happened to be quick: a spare only takes over a place whose holder failed. What becomes of the place of a member
that has ended without success:

- It failed by the infrastructure (`lifecycle.INFRASTRUCTURE`): the first spare takes over, else a new rollout does, up
  to `max_deliveries` times in a group, as a rollout is delivered again so often.
- It failed by what its agent did (an error, a timeout), or once more than that: the same, up to `replace` times.
- It was dropped, cancelled or deleted, or no more may be replaced: the place is lost, and with it all `n`. The group
  ends at once: complete with those who hold a place and have succeeded if there are `min_size` of them, else failed.

The deadline ends an open group likewise. A group that has ended needs no other member, so that those that have not
finished are cancelled. But a group of which its caller has said nothing but `n` is only watched: no rollout of it is
replaced or cancelled.
Verbs change rollouts as if there were no groups; `settle` lets the groups follow at the end of each step. A member that
succeeds late, after it was replaced or its group has ended, is a spare.
Not here: the table (`group_table`), batches of groups (`training`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from math import inf
from typing import Any, Literal

from raystore.core import attempts, lifecycle, queries
from raystore.core.feed_table import FeedEntry
from raystore.core.group_table import (
    CANCELLED,
    FAILED,
    FILLING,
    LIVE,
    MASKED,
    SCORED,
    SUCCEEDED,
    TRAINED_ON,
    GroupEntry,
)
from raystore.core.lifecycle import (
    ACTIVE,
    CANCEL,
    FILLED,
    FINISHED,
    INFRASTRUCTURE,
    MISSED,
    READY,
    REOPENED,
    SHORT,
    GroupStatus,
    group_after,
)
from raystore.core.payload import size_of
from raystore.core.records import Group, Many
from raystore.core.rollouts import (
    CONTENT,
    LONG_BYTES,
    LONG_ITEMS,
    check_requests,
    content_of,
    create,
    enter_queue,
)
from raystore.core.schema import GroupRequest, Id, SortOrder, Tags, Whole
from raystore.core.state import Entry, InChain, Pair, State, Step
from raystore.core.training import as_shown, follow_group, forget_group
from raystore.errors import GroupConflictError, InvalidValueError, SessionEndedError

ERROR_LENGTH = 200  #: characters of an error that failures are told apart by
MEMBERS = 10_000  #: of a group with a rule, at first: what its end cancels is cancelled in one step
ITEMS = 1_000_000  #: rollouts that one call makes, at most

#: What makes a group beside its members, in the order in which it is compared for a caller-given id.
RULE = ("n", "min_size", "spare", "replace", "deadline_seconds")

Gives = Literal["rollouts", "groups"]

# In which way the place of a member is taken over: by a spare, at no charge; by a new rollout, since the infrastructure
# failed; by either, out of `replace`; not at all.
FREE, RENEWED, REPLACED, LOST = "free", "renewed", "replaced", "lost"


# -- enqueuing ---------------------------------------------------------------------------------------------------------


def enqueue(
    state: State,
    step: Step,
    *,
    groups: list[GroupRequest],
    gives: Gives,
    admit: Whole | None = None,
    chain: InChain | None = None,
) -> list[Any] | tuple[list[Any], int]:
    """Enqueue the rollouts of all groups, or none; a group that exists already is given as it is.

    Answers with the groups, or with their rollouts. Parts of one call are kept until its last part, whose answer is for
    all; `admit` is the number of groups in all parts, so that a missing part is noticed.
    """
    latest = state.resources.latest_id
    if chain is not None:
        latest = chain.notes.setdefault("latest", latest)
        before: list[GroupRequest] = chain.notes.setdefault("groups", [])
        if not chain.is_last:
            before.extend(groups)
            return []
        groups = [*before, *groups]
        if admit and len(groups) != admit:
            assert step.session is not None
            raise SessionEndedError(step.session.session_id)  # the one that the parts before came in
    found = _enqueue_all(state, step, groups, latest)
    items: list[Group | Pair] = []
    if gives == "groups":
        items.extend(as_shown(state, group) for group in found)
        sizes = sum(size_of(item.input) for item in items if isinstance(item, Group))
    else:
        entries = [state.entries[i] for group in found for i in group.members if i in state.entries]
        items.extend(entry.pair for entry in entries)
        sizes = sum(size_of(entry.rollout.input) + size_of(entry.rollout.metadata) for entry in entries)
    return (items, len(items)) if len(items) > LONG_ITEMS or sizes > LONG_BYTES else items


def _enqueue_all(state: State, step: Step, requests: list[GroupRequest], latest: str | None) -> list[GroupEntry]:
    existing = check_all(state, requests)
    return [
        make(state, step, request, latest) if group is None else group
        for request, group in zip(requests, existing, strict=True)
    ]


def check_all(state: State, requests: list[GroupRequest]) -> list[GroupEntry | None]:
    """Refuse requests of which one cannot be a group; the groups that exist already, None for each new one."""
    for request in requests:
        check_rule(**_rule_of(request))
    existing = [_existing_of(state, request) for request in requests]
    named = [request["group_id"] for request in requests if request.get("group_id") is not None]
    if len(named) != len(set(named)):
        twice = next(name for name in named if named.count(name) > 1)
        raise InvalidValueError("group_id", twice, "each caller-given id once per call")
    new = [request for request, group in zip(requests, existing, strict=True) if group is None]
    more = sum(request["n"] + request.get("spare", 0) for request in new)
    if more > ITEMS:
        raise InvalidValueError("groups", more, f"at most {ITEMS:,} rollouts in one call")
    check_requests(state, (), new=more)
    return existing


def _rule_of(request: Mapping[str, Any]) -> dict[str, Any]:
    usual = {"min_size": None, "spare": 0, "replace": 0, "deadline_seconds": None}
    return {name: request.get(name, usual.get(name)) for name in RULE}


def check_rule(*, n: int, min_size: int | None, spare: int, replace: int, deadline_seconds: float | None) -> None:
    """Refuse a rule by which no group can end well."""
    if min_size is not None and not 2 <= min_size <= n:
        raise InvalidValueError("min_size", min_size, f"a whole number from 2 to n, which is {n}; or None")
    if deadline_seconds is not None and deadline_seconds <= 0:
        raise InvalidValueError("deadline_seconds", deadline_seconds, "a number of seconds above 0, or None")
    has_rule = min_size is not None or deadline_seconds is not None or spare > 0 or replace > 0
    if has_rule and n + spare > MEMBERS:
        expected = f"at most {MEMBERS:,} rollouts, spare ones included, in a group with a deadline or another rule"
        raise InvalidValueError("n", n, expected)
    if n > ITEMS:
        raise InvalidValueError("n", n, f"at most {ITEMS:,} rollouts in one call")


def _content(request: Mapping[str, Any]) -> tuple[Any, ...]:
    return (*_rule_of(request).values(), *content_of(request["member"]))


def _existing_of(state: State, request: Mapping[str, Any]) -> GroupEntry | None:
    """The group that a caller-given id names already, if its content is the same."""
    group = state.groups.get(request.get("group_id"))
    if group is None:
        return None
    names = (*RULE, *CONTENT)
    now, before = _content(request), group.given
    differing = [] if before is None else [n for n, a, b in zip(names, before, now, strict=True) if a != b]
    if before is None or differing:
        raise GroupConflictError(group.group_id, differing or ["origin"])
    return group


def free_id(state: State, group_id: str) -> str:
    """An id that no group has: this one, or one that begins with it."""
    found, turn = group_id, 1
    while found in state.groups.by_id:
        turn += 1
        found = f"{group_id}+{turn}"
    return found


def make(state: State, step: Step, request: Mapping[str, Any], latest: str | None) -> GroupEntry:
    """Make a group of a request that was checked, and enqueue its members."""
    member, rule, table = request["member"], _rule_of(request), state.groups
    group_id = request.get("group_id")
    given = _content(request) if group_id is not None else None
    if group_id is None:
        group_id = step.mint("group-", 12, table.by_id)
    seconds = rule["deadline_seconds"]
    table.made += 1
    group = GroupEntry(
        group_id=group_id,
        number=table.made,
        n=rule["n"],
        min_size=rule["min_size"],
        spare=rule["spare"],
        replace=rule["replace"],
        start_time=step.now,
        deadline=None if seconds in (None, inf) else step.now - state.paused + seconds,
        mode=member.get("mode"),
        queue=member.get("queue", "default"),
        priority=member.get("priority", 0),
        tags=member.get("tags") or {},
        given=given,
        missing=rule["n"],
    )
    table.add(group)
    _touch(state, group)
    made = {**member, "group_id": group_id, "rollout_id": None}
    if (evaluation := state.evaluations.by_group.get(group_id)) is not None:
        made["evaluation"] = evaluation
    for number in range(group.n + group.spare):
        _join(state, step, group, made, latest, number if number < group.n else None)
    state.group_deadlines.guard(group_id)
    state.changes.append(step.now, "group_opened", group_id=group_id, n=group.n)
    follow_group(state, group)
    return group


def _join(
    state: State,
    step: Step,
    group: GroupEntry,
    request: Mapping[str, Any],
    latest: str | None,
    place: int | None,
    order: tuple[int, int] | None = None,
) -> Entry:
    """Enqueue a rollout as a member; at the tail of its queue unless an `order` is given."""
    entry = create(state, step, "queuing", request, latest)
    rollout = entry.rollout
    state.groups.join(group, rollout.rollout_id, place)
    state.spans.adopt_numbers(rollout.rollout_id)
    enter_queue(state, step, entry, state.queues.tail(rollout.priority) if order is None else order)
    state.changes.append(step.now, "enqueued", rollout.rollout_id)
    return entry


# -- what becomes of members -------------------------------------------------------------------------------------------


def settle(state: State, step: Step) -> None:
    """Let groups follow what has become of their members in this step, and members what becomes of their groups."""
    while state.moved_members:
        moved, state.moved_members = state.moved_members, {}
        fallen: dict[str, list[str]] = {}
        for rollout_id, group_id in moved.items():
            group = state.groups.get(group_id)
            if group is not None and rollout_id in group.members:
                fallen.setdefault(group_id, []).extend(_look_at(state, step, group, rollout_id))
        for group_id, ended in fallen.items():
            _follow(state, step, state.groups.by_id[group_id], ended)


def _look_at(state: State, step: Step, group: GroupEntry, rollout_id: str) -> list[str]:
    """Note how a member stands now; itself if it holds a place and has just ended without success."""
    entry = state.entries.get(rollout_id)
    before = group.members[rollout_id]
    feed = state.feeds.by_group.get(group.group_id)
    now = CANCELLED if entry is None else stand_of(entry, before, feed)
    _touch(state, group)
    if feed is not None and (item := feed.items.get(group.group_id)) is not None:
        if item.claimed is None and entry is not None and entry.rollout.status in ACTIVE:
            item.claimed = feed.acks
    if state.evaluations.running:
        rollout, latest = (None, None) if entry is None else (entry.rollout, entry.latest)
        state.evaluations.note(group.group_id, rollout_id, rollout, latest)
    if state.queues.is_held(rollout_id):
        group.held[rollout_id] = None
    else:
        group.held.pop(rollout_id, None)
    _rest(state, step, group)
    if now == before and entry is not None:
        return []
    group.members[rollout_id] = now
    place = group.places.get(rollout_id)
    if place is None:
        if now in (LIVE, *FILLING):
            group.spares[rollout_id] = None
        else:
            group.spares.pop(rollout_id, None)
        if feed is not None and feed.rule["race"] and now == SUCCEEDED and group.is_open:
            _overtake(group, rollout_id)
    else:
        group.missing += (before in FILLING) - (now in FILLING)
        if rollout_id in group.chosen and now not in TRAINED_ON:
            _reopen(state, step, group, rollout_id)
    is_over = entry is not None and before == LIVE and now not in (LIVE, CANCELLED)
    if feed is not None and entry is not None and is_over and not lifecycle.is_dropped(entry.latest):
        feed.note_outcome(rollout_id, None if now == SUCCEEDED else _error_of(entry))
    if feed is not None and now != LIVE and (feed.slots or feed.spent is not None):
        state.moved_feeds[feed.name] = None
    if entry is None:
        state.groups.leave(group, rollout_id)
    has_ended = place is not None and now in (FAILED, CANCELLED) and before not in (FAILED, CANCELLED)
    return [rollout_id] if has_ended else []


def stand_of(entry: Entry, before: str, feed: FeedEntry | None) -> str:
    """How a rollout stands in its group, which may be a feed's; `before` is how it stood."""
    status = entry.rollout.status
    if status not in FINISHED:
        return LIVE
    if status == "succeeded":  # also if its attempt was dropped: it succeeded by hand, or is sealed
        return SUCCEEDED
    if status != "failed":
        return CANCELLED
    latest = entry.latest
    if before in (FAILED, SCORED, MASKED):  # decided once, by the rule of then
        return before
    if feed is None or latest is None or latest.outcome in INFRASTRUCTURE or lifecycle.is_dropped(latest):
        return FAILED
    return _STAND_OF_FAILED[feed.rule["on_failure"]]


_STAND_OF_FAILED = {"reward": SCORED, "mask": MASKED, "replace": FAILED}


def _error_of(entry: Entry) -> str:
    """Why a rollout failed, in one line that is the same for those that failed alike."""
    latest = entry.latest
    if latest is None:
        return entry.rollout.status
    last = (latest.error or "").strip().rsplit("\n", 1)[-1][:ERROR_LENGTH]
    return f"{latest.outcome or latest.status}: {last}" if last else str(latest.outcome or latest.status)


def _overtake(group: GroupEntry, rollout_id: str) -> None:
    """In a race, give a spare that has succeeded the place of a member that still runs."""
    slower = next((i for i in reversed(group.in_place) if group.members[i] == LIVE), None)
    if slower is not None:
        del group.spares[rollout_id]
        group.places[rollout_id] = group.places.pop(slower)
        group.spares[slower] = None
        group.missing -= 1


def _rest(state: State, step: Step, group: GroupEntry) -> None:
    """Let the deadline rest as long as a member is held back."""
    now = step.now - state.paused
    if group.held and group.rests_since is None:
        group.rests_since = now
    elif not group.held and group.rests_since is not None:
        if group.deadline is not None:
            group.deadline += now - group.rests_since
        group.rests_since = None
        state.group_deadlines.guard(group.group_id)


def _reopen(state: State, step: Step, group: GroupEntry, rollout_id: str) -> None:
    """A member that was to be trained on has not succeeded any more."""
    status = group_after(group.status, REOPENED)
    if status == group.status:  # somebody has trained on it: it stays as it was then, without this member
        _lack(state, group, rollout_id)
        return
    is_over = group.deadline is not None and step.now - state.paused > group.deadline
    if is_over or len(group.chosen) < group.n:  # nothing more may come: also places that were lost before stay empty
        _lack(state, group, rollout_id)
        return
    state.groups.move(group, status)
    group.chosen, group.end_time, group.why = {}, None, None
    state.group_deadlines.guard(group.group_id)
    state.changes.append(step.now, "group_reopened", rollout_id, group_id=group.group_id)
    _tell_feed(state, group)
    follow_group(state, group)


def _lack(state: State, group: GroupEntry, rollout_id: str) -> None:
    """A group that has ended is without one of the members that it was complete with."""
    was_ready = group.is_ready
    del group.chosen[rollout_id]
    if was_ready and not group.is_ready:
        status = group_after(group.status, MISSED)
        if status != group.status:
            state.groups.move(group, status)
            group.why = f"{len(group.chosen)} of {group.n} succeeded: {rollout_id} {_ending_of(state, rollout_id)}"
        _tell_feed(state, group)
        follow_group(state, group)


def _follow(state: State, step: Step, group: GroupEntry, fallen: list[str]) -> None:
    """Fill the places of members that have ended without success, and end the group if it is time."""
    if not group.members:
        _forget(state, step, group)
        return
    if not group.is_open:
        return
    ways = _ways(state, group, fallen)
    lost = [rollout_id for rollout_id, way in ways.items() if way == LOST]
    if lost:
        is_by_hand = any(group.members.get(rollout_id, CANCELLED) == CANCELLED for rollout_id in lost)
        _end(state, step, group, f"{lost[0]} {_ending_of(state, lost[0])}", is_by_hand=is_by_hand)
        return
    for rollout_id, way in ways.items():
        _take_over(state, step, group, rollout_id, way)
    if not group.missing:
        if len(_successes(group)) < group.least:
            _end(state, step, group, "the others are left out")
        else:
            _close(state, step, group, FILLED, None)


def _successes(group: GroupEntry) -> list[str]:
    """The members that hold a place and can be trained on, in the order of places."""
    return [i for i in group.in_place if group.members[i] in TRAINED_ON]


def _has_rule(state: State, group: GroupEntry) -> bool:
    """Whether it is said what becomes of members that fail, by who enqueued the group or by its feed."""
    return group.has_rule or group.group_id in state.feeds.by_group


def _ending_of(state: State, rollout_id: str) -> str:
    """How a member has ended, for people."""
    entry = state.entries.get(rollout_id)
    if entry is None:
        return "was deleted"
    outcome = entry.latest.outcome if entry.latest is not None else None
    return f"is {entry.rollout.status}" + (f" ({outcome})" if outcome not in (None, entry.rollout.status) else "")


def _ways(state: State, group: GroupEntry, fallen: list[str]) -> dict[str, str]:
    """In which way the place of each of these may be taken over by another rollout; no step is taken yet."""
    spares, renewed, replaced = len(group.spares), group.renewed, group.replaced
    feed = state.feeds.by_group.get(group.group_id)
    is_race = feed is not None and feed.rule["race"]
    ways = {}
    for rollout_id in fallen:
        entry = state.entries.get(rollout_id)
        latest = entry.latest if entry is not None else None
        has_failed = group.members.get(rollout_id) == FAILED and not lifecycle.is_dropped(latest)
        is_infrastructure = latest is not None and latest.outcome in INFRASTRUCTURE
        if not (has_failed and _has_rule(state, group)):
            way = LOST
        elif (is_infrastructure or is_race) and spares:
            way = FREE
        elif is_infrastructure and renewed < state.settings.max_deliveries:
            way, renewed = RENEWED, renewed + 1
        elif replaced < group.replace:
            way, replaced = REPLACED, replaced + 1
        else:
            way = LOST
        spares -= spares > 0 and way in (FREE, REPLACED)
        ways[rollout_id] = way
    return ways


def _take_over(state: State, step: Step, group: GroupEntry, rollout_id: str, way: str) -> None:
    """Let a spare, or else a new rollout, have the place of a member that failed."""
    group.renewed += way == RENEWED
    group.replaced += way == REPLACED
    spare = next(iter(group.spares), None)
    place = group.places.pop(rollout_id)
    if spare is None:
        entry = state.entries[rollout_id]
        rollout = entry.rollout
        request = {name: getattr(rollout, name) for name in CONTENT} | {"config": rollout.config.row()}
        spare = _join(state, step, group, request, rollout.resources_id, place, entry.order).rollout.rollout_id
    else:
        del group.spares[spare]
        group.places[spare] = place
        group.missing -= group.members[spare] in FILLING
    state.changes.append(step.now, "replaced", rollout_id, group_id=group.group_id, by=spare)


# -- how groups end ----------------------------------------------------------------------------------------------------


def _end(state: State, step: Step, group: GroupEntry, *why: str, is_by_hand: bool = False) -> None:
    """No more can be had of a group: it is complete if it has enough, and else it is not trained on."""
    there = len(_successes(group))
    said = ": ".join([f"{there} of {group.n} succeeded", *why])
    if there >= group.least:
        _close(state, step, group, SHORT if group.missing else FILLED, said)
    else:
        _close(state, step, group, CANCEL if is_by_hand else MISSED, said)


def _close(state: State, step: Step, group: GroupEntry, event: str, why: str | None) -> None:
    """End a group."""
    is_cancelling = _has_rule(state, group)
    state.groups.move(group, group_after(group.status, event))
    group.end_time, group.why = step.now, why
    if event in (FILLED, SHORT):
        group.chosen = dict.fromkeys(_successes(group))
        state.groups.completions += 1
        group.completion = state.groups.completions
    _touch(state, group)
    state.group_deadlines.pop(group.group_id, None)
    state.effects.has_batches = True
    state.changes.append(step.now, f"group_{group.status}", group_id=group.group_id, why=why)
    _tell_feed(state, group)
    follow_group(state, group)
    if is_cancelling:
        attempts.cancel(state, step, rollout_ids=group.with_stand(LIVE), group_id=None, tags=None)


def conclude(state: State, step: Step, group: GroupEntry, event: str, why: str) -> None:
    """End a group of a feed, open or complete, by an event after which its feed does not train on it."""
    if is_taken(state, group):  # by another consumer, whose it stays as it is
        _tell_feed(state, group, group_after("complete", event), why)
        follow_group(state, group)
        return
    group.chosen = {}
    _close(state, step, group, event, why)


def is_taken(state: State, group: GroupEntry) -> bool:
    """Whether a consumer has taken a group, so that it stays as it is."""
    return any(state.entries[rollout_id].is_sealed for rollout_id in group.chosen)


def _tell_feed(state: State, group: GroupEntry, ending: str | None = None, why: str | None = None) -> None:
    """Let the feed of a group know how it stands now, or how it has ended for the feed alone."""
    feed = state.feeds.by_group.get(group.group_id)
    item = feed.items.get(group.group_id) if feed is not None else None
    if feed is None or item is None:
        return
    state.moved_feeds[feed.name] = None
    if ending is not None or not (group.is_open or group.status in READY):
        state.feeds.end(feed, item, ending or group.status, why or group.why)
    elif group.is_open:
        item.completed, item.is_kept = None, False
    elif not group.is_ready:
        state.feeds.end(feed, item, group_after("complete", MISSED), f"{len(group.chosen)} of {group.n} are left")
    elif item.completed is None:
        item.completed, item.is_kept = feed.acks, not feed.rule["judged"]


def end_overdue(state: State, step: Step, group_ids: Iterable[str]) -> None:
    """The deadlines of these groups have passed."""
    for group_id in group_ids:
        group = state.groups.get(group_id)
        if group is not None and group.is_open:
            _end(state, step, group, "the deadline has passed")


def cancel_rollouts(
    state: State, step: Step, *, rollout_ids: list[Id] | None, group_id: Id | None, tags: Tags | None
) -> list[Pair]:
    """Cancel rollouts that have not finished. A group that is named ends cancelled, whatever it has."""
    cancelled = attempts.cancel(state, step, rollout_ids=rollout_ids, group_id=group_id, tags=tags)
    group = state.groups.get(group_id)
    if group is not None and group.is_open and rollout_ids is None and not tags:
        _close(state, step, group, CANCEL, f"{group.n - group.missing} of {group.n} succeeded: it was cancelled")
    return cancelled


def _forget(state: State, step: Step, group: GroupEntry) -> None:
    """The last member of a group was deleted."""
    feed = state.feeds.by_group.get(group.group_id)
    if feed is not None and (item := feed.items.get(group.group_id)) is not None:
        state.feeds.end(feed, item, "cancelled", "its rollouts were deleted")
    elif feed is not None:
        state.feeds.release(feed, [group.group_id])
    forget_group(state, group)
    state.evaluations.by_group.pop(group.group_id, None)
    state.groups.remove(group)
    state.group_deadlines.pop(group.group_id, None)
    _touch(state, group)
    state.effects.has_batches = True
    state.changes.append(step.now, "group_deleted", group_id=group.group_id)


def _touch(state: State, group: GroupEntry) -> None:
    state.touch_group(group.group_id)


# -- asking ------------------------------------------------------------------------------------------------------------


def get(state: State, step: Step, *, group_id: Id) -> Group | None:
    """A group, if there is one of this id."""
    group = state.groups.get(group_id)
    return as_shown(state, group) if group is not None else None


SORT: dict[str, Any] = {
    "group_id": "", "n": 0, "start_time": queries.FAR_FUTURE, "end_time": queries.FAR_FUTURE, "status": "",
    "queue": "", "mode": "", "priority": 0,
}  # fmt: skip


def query(
    state: State,
    step: Step,
    *,
    status_in: list[GroupStatus] | None,
    group_id_in: list[Id] | None,
    sort_by: str | None,
    sort_order: SortOrder,
    limit: int,
    offset: int,
) -> Many:
    """One page of the groups that match, in the order in which they came unless sorted, and how many match in all."""
    table = state.groups
    queries.check(sort_order=sort_order)
    if status_in is None and group_id_in is None and sort_by is None:
        queries.page([], limit, offset)  # refuses what is no page
        found = list(islice(table, offset, None if limit == -1 else offset + limit))
        return Many([as_shown(state, group) for group in found], len(table))
    if group_id_in is not None:
        named = (table.get(group_id) for group_id in dict.fromkeys(group_id_in))
        groups = [g for g in named if g is not None and (status_in is None or g.status in status_in)]
    elif status_in is not None:
        groups = [table.by_id[i] for status in dict.fromkeys(status_in) for i in table.having(status)]
    else:
        groups = list(table)
    groups.sort(key=lambda group: group.number)
    groups = queries.arrange(groups, sort_by, sort_order, SORT)
    return Many([as_shown(state, group) for group in queries.page(groups, limit, offset)], len(groups))
