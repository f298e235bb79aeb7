"""Verbs of feeds: draw items, publish the policy, judge and choose groups; and what follows from each step.

A feed hands out nothing before its first publish, nor after a rewind until the next one, nor while its failure budget
is spent: its rollouts keep their places in their queues and are passed over. One *pump*, in the process that has the
dataset, draws the items. It asks what there is to do (`work`) and is answered when there is something: places are free,
or groups are complete and are to be judged. Position and groups advance in one step (`add`), so that a pump that died
in mid-draw has drawn or has not.
Not here: the records, lag and the make-up of batches (`feed_table`), takes and acks (`training`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypedDict

from raystore.core import evaluations, fates, groups, publishing, training
from raystore.core.feed_table import CLOSED, NO_SLOT, FeedEntry, Item, Stream
from raystore.core.group_table import GroupEntry
from raystore.core.lifecycle import LATE, MISSED, QUEUED, REJECTED
from raystore.core.records import Resources
from raystore.core.rollouts import CONTENT, put_anew
from raystore.core.schema import ID_LENGTH, Encoded, GroupRequest, Id, Positive, Rule, Seconds, Text, Whole
from raystore.core.state import State, Step, require_room
from raystore.errors import (
    DatasetChangedError,
    FeedHeldError,
    FeedNotFoundError,
    VersionConflictError,
)

FEEDS = 1_000  #: at once

Share = Annotated[float, Rule("0 < {v} <= 1_000_000", "a number above 0, up to 1,000,000")]


class FeedRule(TypedDict):
    """What the user of a feed has said."""

    resources_id: Id
    batch: Positive
    max_lag: Whole
    max_running: Positive | None
    late: Literal["wait", "train", "drop", "requeue"]
    order: Literal["oldest", "ready_first", "in_order", "chosen"]
    on_failure: Literal["mask", "replace", "reward"]
    failure_reward: float | None
    race: bool
    judged: bool  # whether the pump judges each complete group
    batch_tokens: Positive | None
    max_filtered: Positive | None
    in_a_row: Positive | None
    share: float | None
    window: Positive
    requeues: Whole


#: Of a stream, or an environment; empty for a stream of several datasets in one order.
Name = Annotated[str, Rule(f"len({{v}}) <= {ID_LENGTH}", f"text of at most {ID_LENGTH} characters")]
#: Name, share of each batch, how many items, fingerprint of the dataset.
StreamRow = tuple[Name, Share, Whole | None, Name | None]
Position = tuple[Whole, Whole]  #: epoch, and how many of its items were drawn
ItemRow = tuple[Name, Whole, Whole]  #: environment, epoch, index
SkippedRow = tuple[Id, Text]  #: the id that its group would have, and why
#: Group, why it is not trained on (None: it is), its tokens, rollouts that cannot be trained on.
Verdict = tuple[Id, Text | None, Whole | None, list[Id]]


# -- whose a feed is ---------------------------------------------------------------------------------------------------


def open_feed(
    state: State,
    step: Step,
    *,
    feed: Id,
    pump: Id,
    rule: FeedRule,
    streams: list[StreamRow],
    changed: Literal["refuse", "continue"],
) -> list[Any]:
    """Let a pump draw the items of a feed, new or known, by these rules from now on; where the feed stands."""
    assert step.session is not None
    known = state.feeds.get(feed)
    if known is not None:
        _refuse_other(state, step, known, pump)
        if known.pump is None or known.pump[1] != pump:
            _check_streams(known, streams, changed)
    else:
        require_room("feeds", len(state.feeds), FEEDS)
        known = FeedEntry(feed, dict(rule))
        training.know_feed(state, known)
        state.changes.append(step.now, "feed_opened", consumer=feed)
    known.pump = (step.session.session_id, pump)
    known.rule = dict(rule)
    now = {name: _stream(known, name, share, length, mark) for name, share, length, mark in streams}
    for stream in known.streams.values():
        stream.is_over = stream.is_over or stream.name not in now
    known.streams = known.streams | now
    del known.outcomes[: -rule["window"]]
    if not rule["judged"]:
        for item in known.items.values():
            if item.completed is not None:
                _keep(state, known, item)
    _offer(state, step, known)
    state.moved_feeds[feed] = None
    streams_now = [[s.name, s.epoch, s.cursor, s.state, s.is_over] for s in now.values()]
    return [known.branch, known.version, state.consumers[feed].checkpoint, streams_now]


def _refuse_other(state: State, step: Step, feed: FeedEntry, pump: str) -> None:
    """Refuse a pump while another one, in a process that lives, draws the items."""
    if feed.pump is None or feed.pump[1] == pump:
        return
    session = state.sessions.get(feed.pump[0])
    if session is not None and session.ended_at is None:
        if step.session is session:
            raise FeedHeldError(feed.name, "this process")
        raise FeedHeldError(feed.name, f"session {session.session_id}", state.ask_for_sign(session, step.age))


def _check_streams(feed: FeedEntry, streams: list[StreamRow], changed: str) -> None:
    """Refuse datasets that are not those of before."""
    if changed == "continue":
        return
    before = {name: (stream.length, stream.fingerprint) for name, stream in feed.streams.items()}
    now = {name: (length, fingerprint) for name, _, length, fingerprint in streams}
    differing = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    if differing:
        name = differing[0]
        raise DatasetChangedError(feed.name, name, before.get(name, (None, None))[0], now.get(name, (None, None))[0])


def _stream(feed: FeedEntry, name: str, share: float, length: int | None, fingerprint: str | None) -> Stream:
    stream = feed.streams.get(name) or Stream(name, share, length, fingerprint)
    stream.share, stream.length, stream.fingerprint = share, length, fingerprint
    return stream


def close_feed(state: State, step: Step, *, feed: Id, pump: Id) -> None:
    """A pump draws no more; what is under way goes on."""
    known = state.feeds.get(feed)
    if known is not None and known.pump is not None and known.pump[1] == pump:
        known.pump = None


def _known(state: State, feed: str) -> FeedEntry:
    """The feed of this name."""
    known = state.feeds.get(feed)
    if known is None:
        raise FeedNotFoundError(feed)
    return known


def _pumped(state: State, step: Step, feed: str, pump: str) -> FeedEntry:
    """The feed, for the one pump that may draw its items."""
    known = _known(state, feed)
    if known.pump is None or known.pump[1] != pump:
        raise FeedHeldError(feed, "nobody: it was closed" if known.pump is None else f"session {known.pump[0]}")
    return known


# -- what a pump does --------------------------------------------------------------------------------------------------


def work(
    state: State, step: Step, *, feed: Id, pump: Id, seen: Whole = 0, over: bool = False, timeout: Seconds = 0.0
) -> dict[str, Any] | None:
    """What there is to do for a pump; None: nothing yet.

    It has been told of the first `seen` endings, and whether the feed is `over`.
    """
    known = _pumped(state, step, feed, pump)
    found = to_do(state, known, seen)
    is_new = found["places"] or found["judge"] or found["choose"] or found["ended"] or found["over"] != over
    return found if is_new or timeout <= 0 else None


def to_do(state: State, feed: FeedEntry, seen: int) -> dict[str, Any]:
    """Places by stream, groups to be judged, groups among which to choose, endings, and whether the feed is over."""
    complete = (item for item in feed.items.values() if item.completed is not None)
    to_judge = [item.group_id for item in complete if not item.is_kept] if feed.rule["judged"] else []
    choose = None
    if feed.rule["order"] == "chosen" and not feed.choice:
        known = state.consumers[feed.name]
        ready = list(known.groups)
        is_last = all(s.is_over for s in feed.streams.values()) and len(ready) == len(_waiting(feed))
        if len(ready) >= feed.rule["batch"] or (is_last and ready):
            choose = ready
    ended = [list(ending) for ending in feed.endings if ending.number > seen]
    return {
        "places": feed.free(), "judge": to_judge, "choose": choose, "ended": ended, "over": feed.is_over,
    }  # fmt: skip


def _waiting(feed: FeedEntry) -> list[Item]:
    return [item for item in feed.items.values() if not item.is_taken]


def add(
    state: State,
    step: Step,
    *,
    feed: Id,
    pump: Id,
    stream: Name,
    at: Position,
    to: Position,
    over: bool,
    state_after: bytes | None,
    requests: list[GroupRequest],
    items: list[ItemRow],
    skipped: list[SkippedRow],
) -> list[int]:
    """Draw items: enqueue their groups and move the position, or neither; the position now.

    Nothing is done if the position is not `at`: somebody has drawn them. Nor if there are not so many places: batches
    were undone meanwhile.
    """
    known = _pumped(state, step, feed, pump)
    drawn_from = known.streams.get(stream)
    if drawn_from is None:
        raise DatasetChangedError(feed, stream, None, None)
    is_elsewhere = (drawn_from.epoch, drawn_from.cursor) != tuple(at) or len(items) != len(requests)
    if is_elsewhere or (requests and len(requests) > known.free().get(stream, 0)):
        return [drawn_from.epoch, drawn_from.cursor]
    # Groups of a feed of the same name before may be there still.
    made: list[Any] = [{**one, "group_id": groups.free_id(state, one.get("group_id") or "")} for one in requests]
    groups.check_all(state, made)
    drawn_from.epoch, drawn_from.cursor = to
    drawn_from.state, drawn_from.is_over = state_after, over
    for request, (environment, epoch, index) in zip(made, items, strict=True):
        known.drawn += 1
        state.feeds.add(known, Item(request["group_id"], known.drawn, stream, environment, epoch, index))
        groups.make(state, step, request, known.rule["resources_id"])
    for group_id, why in skipped:
        known.count(stream, "skipped")
        known.tell(group_id, "skipped", why)
    state.moved_feeds[feed] = None
    return [drawn_from.epoch, drawn_from.cursor]


def judge(state: State, step: Step, *, feed: Id, pump: Id, verdicts: list[Verdict]) -> None:
    """Say of complete groups whether they are trained on, and which of their rollouts cannot be."""
    known = _pumped(state, step, feed, pump)
    for group_id, why, tokens, unusable in verdicts:
        item, group = known.items.get(group_id), state.groups.get(group_id)
        if item is None or group is None or item.is_taken or item.is_kept or item.completed is None:
            continue
        item.tokens = tokens
        left = dict.fromkeys(i for i in group.chosen if i not in unusable)
        for rollout_id in [i for i in group.chosen if i not in left]:
            known.note_outcome(rollout_id, "a recorded call lacks what training on it needs")
        if len(left) < group.least or (len(left) < len(group.chosen) and groups.is_taken(state, group)):
            groups.conclude(state, step, group, MISSED, f"{len(left)} of {group.n} can be trained on")
            continue
        if len(left) < len(group.chosen):
            group.chosen = left
            state.touch_group(group_id)
        if why is None:
            known.filtered = 0
            _keep(state, known, item)
        else:
            known.filtered, known.filtered_why = known.filtered + 1, why
            groups.conclude(state, step, group, REJECTED, why)
    state.moved_feeds[feed] = None


def _keep(state: State, feed: FeedEntry, item: Item) -> None:
    """A group may be trained on."""
    if not item.is_kept:
        item.is_kept = True
        training.follow_group(state, state.groups.by_id[item.group_id])
        state.effects.has_batches = True


def choose(state: State, step: Step, *, feed: Id, pump: Id, group_ids: list[Id]) -> None:
    """The user's own function has chosen the groups of the next batch."""
    known = _pumped(state, step, feed, pump)
    ready = state.consumers[feed].groups
    known.choice = [group_id for group_id in dict.fromkeys(group_ids) if group_id in ready]
    state.effects.has_batches = True


# -- publishing --------------------------------------------------------------------------------------------------------


def publish(
    state: State,
    step: Step,
    *,
    feed: Id,
    pump: Id,
    version: Whole,
    digest: Text,
    resources: Encoded,
    holds_objects: bool,
    objects: list[tuple[publishing.Address | None, Whole]] | None = None,
) -> Resources:
    """Publish a step of the policy, and hand out from now on."""
    known = _pumped(state, step, feed, pump)
    resources_id = known.rule["resources_id"]
    newest = known.version
    if newest is not None and version < newest:
        raise VersionConflictError(feed, version, f"step {newest} is published already; `restore` goes back")
    if version in known.contents:
        held = state.resources.newest(resources_id)
        if known.contents[version] != digest or held is None:
            raise VersionConflictError(feed, version, "other content is published under it already")
        return held.evolve(resources=None)
    made = publishing.put(
        state, step, resources_id=resources_id, resources=resources, policy_version=version,
        holds_objects=holds_objects, objects=objects,
    )  # fmt: skip
    if newest is None:
        known.branches.append((made.version, known.branch))
    known.version = version
    known.contents = {version: digest}  # steps only grow within a branch
    _offer(state, step, known)
    state.moved_feeds[feed] = None
    return made


def rewind(state: State, step: Step, *, consumer: Id, at_step: Whole) -> int:
    """The model is at an earlier step again: see `training.rewind`.

    A feed begins another branch, hands out nothing until that is published, and answers with the number of groups.
    """
    count = training.rewind(state, step, consumer=consumer, at_step=at_step)
    feed = state.feeds.get(consumer)
    if feed is None:
        return count
    feed.begin_branch(at_step)
    evaluations.drop_undone(state, step, feed)
    _offer(state, step, feed)
    state.moved_feeds[consumer] = None
    return len(state.consumers[consumer].returned)


def forget(state: State, step: Step, *, consumer: Id) -> int:
    """Nothing is kept for a consumer any more: see `training.forget_consumer`. Groups of a feed are as any others."""
    feed = state.feeds.get(consumer)
    members = [] if feed is None else _queued(state, feed)
    count = training.forget_consumer(state, step, consumer=consumer)
    put_anew(state, step, members)
    return count


def _queued(state: State, feed: FeedEntry) -> list[str]:
    """The rollouts of a feed that wait, and do not back off."""
    members = (i for item in feed.items.values() for i in state.groups.by_id[item.group_id].members)
    return [i for i in members if i in state.queues and state.queues.backs_off_until(i) is None]


def _offer(state: State, step: Step, feed: FeedEntry) -> None:
    """Hand out the rollouts of a feed that wait, or hold them back, as it is open or closed now."""
    put_anew(state, step, _queued(state, feed))


def resume(state: State, step: Step, *, feed: Id) -> None:
    """Go on after the failure budget was spent, or too many groups were filtered in a row."""
    known = _known(state, feed)
    known.spent, known.failures, known.filtered = None, 0, 0
    known.outcomes.clear()
    _offer(state, step, known)
    state.moved_feeds[feed] = None
    state.changes.append(step.now, "feed_resumed", consumer=feed)


# -- at the end of a step ----------------------------------------------------------------------------------------------


def settle(state: State, step: Step) -> None:
    """Let groups follow what has become of their members in this step, and feeds what became of groups and batches."""
    while state.moved_members or state.moved_feeds:
        groups.settle(state, step)
        if state.evaluations.moved:
            evaluations.settle(state, step)
        moved = list(state.moved_feeds)
        state.moved_feeds.clear()
        for name in moved:
            feed = state.feeds.get(name)
            if feed is None:
                continue
            _drop_late(state, step, feed)
            _fill_slots(state, step, feed)
            if feed.spent is not None:
                _hold_back(state, step, feed)
            state.effects.has_batches = True
            state.effects.feeds.add(name)
    if state.feeds.uncounted:
        fates.count_ended(state, step)


def _hold_back(state: State, step: Step, feed: FeedEntry) -> None:
    """The failure budget was spent in this step: nothing more is handed out."""
    if not all(map(state.queues.is_held, _queued(state, feed))):
        _offer(state, step, feed)
        state.changes.append(step.now, "feed_paused", consumer=feed.name, why=feed.spent)
        state.effects.said.append(f"Feed {feed.name!r} is paused: {feed.spent}")


def _drop_late(state: State, step: Step, feed: FeedEntry) -> None:
    """End groups that can only be trained too late, or queue their items again, where the feed is to do that."""
    late = feed.rule["late"]
    if late not in ("drop", "requeue"):
        return
    for item in list(feed.items.values()):
        if item.is_taken or not feed.is_late(item, feed.acks):
            continue
        group = state.groups.by_id[item.group_id]
        why = f"{feed.acks - (item.claimed or 0)} batches were trained since its first claim"
        if late == "requeue" and item.requeues < feed.rule["requeues"]:
            del feed.items[item.group_id]  # it goes on in a new group
            groups.conclude(state, step, group, LATE, why)
            fates.count_group(state, step, feed, item, group, "stale")
            del state.feeds.by_group[item.group_id]
            _queue_again(state, step, feed, item, group)
        else:
            groups.conclude(state, step, group, LATE, why)


def _queue_again(state: State, step: Step, feed: FeedEntry, item: Item, group: GroupEntry) -> None:
    """Make another group of the item of a group that was too late."""
    rollout = next(state.entries[i].rollout for i in group.members if i in state.entries)
    member = {name: getattr(rollout, name) for name in CONTENT} | {"config": rollout.config.row()}
    first = item.requeued_from or item.group_id
    made = Item(
        f"{first.split('~')[0]}~{item.requeues + 1}", item.number, item.stream, item.environment, item.epoch,
        item.index, requeued_from=item.group_id, requeues=item.requeues + 1,
    )  # fmt: skip
    rest = None if group.deadline is None else group.deadline + state.paused - group.start_time
    request: Any = {
        "member": member, "n": group.n, "group_id": made.group_id, "min_size": group.min_size, "spare": group.spare,
        "replace": group.replace, "deadline_seconds": rest,
    }  # fmt: skip
    state.feeds.add(feed, made)
    groups.make(state, step, request, feed.rule["resources_id"])


def _fill_slots(state: State, step: Step, feed: FeedEntry) -> None:
    """Let as many rollouts run as may."""
    if feed.rule["max_running"] is None:
        if feed.slots:
            feed.slots = {}
        return
    for rollout_id in [i for i in feed.slots if not _needs_slot(state, i)]:
        del feed.slots[rollout_id]
    room = feed.rule["max_running"] - len(feed.slots)
    if room <= 0 or feed.is_closed:
        return
    held = [state.entries[i] for i in _queued(state, feed) if state.queues.waits_for(i) == NO_SLOT]
    held.sort(key=lambda entry: entry.order or (0, 0))
    put_anew(state, step, [entry.rollout.rollout_id for entry in held[:room]])


def _needs_slot(state: State, rollout_id: str) -> bool:
    """Whether a rollout that has a slot runs, or is offered."""
    entry = state.entries.get(rollout_id)
    if entry is None:
        return False
    if entry.rollout.status in QUEUED:
        if state.queues.backs_off_until(rollout_id) is not None:
            return False
        return state.queues.waits_for(rollout_id) != CLOSED
    return entry.rollout.end_time is None


# -- asking ------------------------------------------------------------------------------------------------------------


def items_of(state: State, step: Step, *, feed: Id, group_ids: list[Id]) -> list[Any]:
    """Of each group that is under way or trained: item, lag, what counts though it failed, and versions."""
    known = _known(state, feed)
    rows = []
    consumer = state.consumers[feed]
    before = {
        group_id: known.acks + place
        for place, number in enumerate(sorted(consumer.holders))
        for group_id in consumer.grouped.get(number, ())
    }
    for group_id in group_ids:
        item = known.items.get(group_id) or known.trained.get(group_id)
        group = state.groups.get(group_id)
        if item is None or group is None:
            continue
        lag = item.lag or known.lag_of(item, before.get(group_id, known.acks))
        failed, versions = [], []
        for rollout_id in group.chosen:
            entry = state.entries[rollout_id]
            if entry.rollout.status != "succeeded":
                failed.append(rollout_id)
            policy = entry.latest.policy_version if entry.latest is not None else None
            versions.append([rollout_id, known.branch_of(entry.latest), policy])
        rows.append(
            [
                group_id, item.environment, item.epoch, item.index, *lag, known.rule["race"], item.requeued_from,
                item.tokens, failed, versions,
            ]
        )  # fmt: skip
    return rows


def status(state: State, step: Step, *, feed: Id) -> dict[str, Any]:
    """Where a feed stands, for people."""
    known = _known(state, feed)
    by_status: dict[str, int] = {}
    for item in known.items.values():
        name = "taken" if item.is_taken else state.groups.by_id[item.group_id].status
        by_status[name] = by_status.get(name, 0) + 1
    return {
        "name": feed,
        "branch": known.branch,
        "version": known.version,
        "checkpoint": state.consumers[feed].checkpoint,
        "acknowledged": known.acks,
        "places": known.places,
        "free": max(known.places - len(known.items), 0),
        "under_way": by_status,
        "unreleased": len(known.trained),
        "drawn": known.drawn,
        "streams": {
            stream.name: {
                "epoch": stream.epoch, "cursor": stream.cursor, "length": stream.length, "over": stream.is_over,
                "endings": dict(stream.endings),
            }
            for stream in known.streams.values()
        },
        "filtered_in_a_row": known.filtered,
        "failed_in_a_row": known.failures,
        "spent": known.spent,
        "errors": [list(row) for row in known.commonest_errors()],
        "pump": None if known.pump is None else known.pump[0],
        "over": known.is_over,
        "evaluations": state.evaluations.finished,
    }  # fmt: skip
