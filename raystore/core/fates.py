"""What becomes of the rollouts of a feed: the ending of each member, once that of its group is known.

A group ends as trained, filtered, stale, failed or cancelled. A member whose agent failed, or that was not needed, has
an ending of its own (`ENDINGS`). Only members that were started count: of the others nothing is known.
Not here: how endings are counted (`selection`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from raystore.core import lifecycle
from raystore.core.feed_table import Counted, FeedEntry, Item
from raystore.core.group_table import CANCELLED, FAILED, LIVE, MASKED, SCORED, GroupEntry
from raystore.core.lifecycle import INFRASTRUCTURE
from raystore.core.records import Attempt, packed
from raystore.core.schema import Calls, Id
from raystore.core.selection import Ended, Fate, Value, Window
from raystore.core.state import Entry, State, Step
from raystore.errors import InvalidValueError
from raystore.errors.text import quoted

UNDER_WAY = "under way"  #: the ending of what has none yet

#: Endings of rollouts, and what each says.
ENDINGS = {
    "trained": "in a batch that was acknowledged",
    "masked": "its agent failed, and on_failure='mask' left it out",
    "replaced": "its agent failed, and on_failure='replace' gave its place to another rollout",
    "raced": "cut off, since race=True had enough that were quicker",
    "spare": "not needed, since no place became free",
    "dropped": "its agent gave the task up (rs.Drop)",
    "lost": "by the infrastructure; another rollout had its place",
    "unusable": "a recorded call lacks what require= asks for",
    "filtered": "the group did not pass keep=",
    "stale": "the group would have been trained too late (late='drop' or 'requeue')",
    "failed": "its agent failed, or too few of the group could be trained on",
    "cancelled": "the group was cancelled, or deleted",
    UNDER_WAY: "runs, or waits for its group, its judgement or its batch",
}
SHOWN = 100  #: indexes of items, for each environment
VALUE_LETTERS = 64  #: of a tag, by which values are told apart


def count_ended(state: State, step: Step) -> None:
    """Count the items whose groups have come to an ending in this step, with all members."""
    ended, state.feeds.uncounted = state.feeds.uncounted, []
    for feed, item, ending in ended:
        group = state.groups.get(item.group_id)
        known = feed.selection
        is_first = known.count_item(step.now, item.environment, item.index, ending)
        if group is None:  # its rollouts were deleted
            continue
        count_group(state, step, feed, item, group, ending, is_first=is_first)


def count_group(
    state: State, step: Step, feed: FeedEntry, item: Item, group: GroupEntry, ending: str, *, is_first: bool = False
) -> None:
    """Count the members of a group; that of an item which goes on in another group, too."""
    fates = list(_fates(state, feed, item, group, ending, step.now))
    values = values_of(item.environment, group.tags)
    feed.selection.count(step.now, fates, values, ending)
    if ending == "trained":
        item.counted = Counted(step.now, fates, values, is_first)


def note_calls(state: State, entry: Entry, calls: Calls) -> None:
    """A runner has said how often an attempt called models."""
    if (item := state.feeds.item_of(entry.rollout.group_id)) is not None:
        item.calls[entry.rollout.rollout_id] = (calls["turns"], calls["response_tokens"])


def values_of(environment: str, tags: Mapping[str, Any]) -> list[Value]:
    """By what rollouts are told apart: their environment and their other tags."""
    others = [(f"tag {name}", str(value)[:VALUE_LETTERS]) for name, value in tags.items() if name != "env"]
    return [("environment", environment), *others]


def _fates(state: State, feed: FeedEntry, item: Item, group: GroupEntry, ending: str, now: float) -> Iterator[Fate]:
    """What became of each member that was started, and is still there."""
    for rollout_id, stand in group.members.items():
        entry = state.entries.get(rollout_id)
        latest = entry.latest if entry is not None else None
        if entry is None or latest is None:
            continue
        rollout = entry.rollout
        fate, reason = _ending_of(feed, item, group, entry, stand, ending)
        # Of an attempt that went on from a saved state, a runner reports its own calls only.
        whole = latest.resumed_from is None
        turns, tokens = item.calls.get(rollout_id, (None, None)) if whole else (None, None)
        reward = feed.rule["failure_reward"] if stand == SCORED else rollout.reward
        is_cut = lifecycle.is_cut_off(rollout.status, latest)
        seconds = ran_for(entry.attempts, now if rollout.end_time is None else rollout.end_time)
        yield Fate(fate, reason, is_cut, seconds, turns, tokens, reward, latest.policy_version)


def ran_for(attempts: Sequence[Attempt], end: float) -> float:
    """How long the latest attempt ran until the end of its rollout, with those whose work it went on with."""
    latest = attempts[-1]
    seconds, earlier = max(end - latest.start_time, 0.0), latest.resumed_from
    for attempt in reversed(attempts):
        if attempt.attempt_id == earlier:
            ended = attempt.end_time or attempt.last_heartbeat_time or attempt.start_time
            seconds, earlier = seconds + max(ended - attempt.start_time, 0.0), attempt.resumed_from
    return seconds


def _ending_of(
    feed: FeedEntry, item: Item, group: GroupEntry, entry: Entry, stand: str, ending: str
) -> tuple[str, str]:
    """The ending of a member of a group with an ending, and the reason."""
    rollout, latest = entry.rollout, entry.latest
    outcome = (latest.outcome if latest is not None else None) or rollout.status
    if ending == "trained" and rollout.rollout_id in group.chosen:
        return ending, outcome
    if stand == MASKED:
        return "masked", outcome
    if stand == FAILED:
        if lifecycle.is_dropped(latest):
            return "dropped", outcome
        if outcome in INFRASTRUCTURE:
            return "lost", outcome
        return ("replaced" if feed.rule["on_failure"] == "replace" else "failed"), outcome
    if ending == UNDER_WAY:
        return ending, "runs" if stand == LIVE else "waits"
    was_cut = stand in (LIVE, CANCELLED)
    if was_cut and item.completed is not None:  # by the completion of its group
        return ("raced" if feed.rule["race"] else "spare"), outcome
    if ending == "trained":
        return ("unusable" if rollout.rollout_id in group.places else "spare"), outcome
    if ending == "filtered":
        return ending, _rule_of(group.why or "")
    return ending, "still ran" if was_cut else outcome


def _rule_of(why: str) -> str:
    """Why a group was filtered, without the numbers of this group."""
    return "".join("#" if letter.isdigit() else letter for letter in why)[:80]


# -- asking ------------------------------------------------------------------------------------------------------------


def selection(state: State, step: Step, *, consumer: Id, since: float | None) -> dict[str, Any]:
    """What a feed has trained on and thrown away, from an instant on; with what is under way.

    Of a consumer that is no feed, only the time.
    """
    feed = state.feeds.get(consumer)
    if feed is None:
        if consumer not in state.consumers:
            there = f"; there are {quoted(sorted(state.consumers))}" if state.consumers else "; there is none"
            raise InvalidValueError("consumer", consumer, f"the name of a feed, or of another consumer{there}")
        return {"until": step.now}
    found = feed.selection.since(since) or Window(step.now, step.now)
    under_way = Window(step.now, step.now)
    for item in feed.items.values():
        group = state.groups.by_id[item.group_id]
        fates = list(_fates(state, feed, item, group, UNDER_WAY, step.now))
        under_way.add(fates, [], 1)
        if fates:
            under_way.endings.setdefault(UNDER_WAY, Ended()).groups += 1
    counts = told(consumer, found, under_way, step.now)
    return counts | {
        "starved": feed.selection.starved(SHOWN),
        "untracked": feed.selection.untracked,
        "is_of_feed": True,
    }


def told(consumer: str, found: Window, under_way: Window, now: float) -> dict[str, Any]:
    """What a report is made of, by what has come to an end and what has not, as far as anybody may know it."""
    return {
        "consumer": consumer,
        "since": found.since,
        "until": now,
        "endings": {name: packed(ended) for name, ended in found.endings.items()},
        "under_way": {name: packed(ended) for name, ended in under_way.endings.items()},
        "values": [[*key, tally] for key, tally in found.values.items()],
        "by_seconds": [[number, row] for number, row in found.by_seconds.items()],
        "items": [[*key, count] for key, count in found.items.items() if count],
        "starved": [],
        "untracked": 0,
        "is_of_feed": False,
    }
