"""What trainers wait for, or let others wait for: consumers, and feeds with their places, budgets and next batches."""

from __future__ import annotations

from itertools import islice

from raystore.core import pauses, training
from raystore.core.feed_table import NO_SLOT, FeedEntry, Item
from raystore.core.findings import Finding, brief, counted, found, lasting, short
from raystore.core.lifecycle import ACTIVE, FINISHED, OPEN, QUEUED
from raystore.core.state import Consumer
from raystore.service.diagnosis.known import (
    GROUPS,
    ITEMS,
    NAMED,
    NOTHING,
    QUEUES,
    SOON,
    STOPPED,
    TRAINING,
    WAITING,
    Told,
)
from raystore.service.diagnosis.work import Work

LOOKED_AT = 1_000  #: rollouts or groups, to see whether one is what a consumer asks for
NEARLY = 0.8  #: share of a budget, from which on it is named


def of_consumer(work: Work, name: str, known: Consumer) -> list[Told]:
    """Why a consumer waits."""
    feed = work.state.feeds.get(name)
    told = of_feed(work, feed, is_asked=True) if feed is not None else of_taker(work, name, known, is_asked=True)
    if any(one.tier <= NOTHING for one in told):
        return told
    others = [*work.of_queues(), *work.of_missing_resources(), *work.of_what_runs()]
    return [*told, *(others or [Told(NOTHING, 0, work.nothing())])]


def of_batches(work: Work, name: str, known: Consumer, *, is_asked: bool) -> tuple[list[Told], str]:
    """What is to be said of the batches that a consumer has open; and since when it has the first, in words."""
    told: list[Told] = []
    state, said = work.state, ""
    for number, whose in islice(sorted(known.holders.items()), NAMED):
        since = known.since.get(number)
        lasts = "" if since is None else f" for {lasting(work.known.now - since)}"
        evidence = {
            "consumer": name, "batch": number, "rollouts": len(known.batches[number]),
            "seconds": None if since is None else work.known.now - since,
        }  # fmt: skip
        if whose is None:
            text = f"Batch {number} of {name!r} was held by a process that has ended; nobody has taken it since"
            told.append(Told(TRAINING, 0, found("batch_left", text, **evidence)))
            continue
        held = f"batch {number} is held{lasts} by {pauses.who(state, whose)}"
        said = said or held
        if is_asked and name not in work.known.asking:
            text = f"Consumer {name!r} waits for nothing: its {held}, and not acknowledged"
            told.append(Told(TRAINING, 0, found("batch_held", text, session_id=whose, **evidence)))
    return told, said


def of_taker(work: Work, name: str, known: Consumer, *, is_asked: bool = False) -> list[Told]:
    """What keeps a consumer that is no feed from its next batch."""
    state = work.state
    told, held = of_batches(work, name, known, is_asked=is_asked)
    asks = name in work.known.asking
    there = len(known.groups) if known.takes == training.GROUPS else len(known.awaiting)
    if held and not asks:
        return told
    if not there and not _may_come(work, known):
        asked = {key: value for key, value in (known.filter or {}).items() if key != "status_in"}
        if state.queues or work.running():
            wanted = f"{known.takes or 'rollouts'}{f' of {short(repr(asked))}' if asked else ''}"
            text = f"Nothing that waits or runs would come to consumer {name!r}, which takes {wanted}"
            told.append(Told(TRAINING, 0, found("nothing_fits", text, consumer=name)))
        return told
    if is_asked and there and not asks:
        what = counted(there, "group" if known.takes == training.GROUPS else "rollout")
        text = f"{what} {'waits' if there == 1 else 'wait'} to be taken by consumer {name!r}, which has not asked"
        told.append(Told(TRAINING, 0, found("batch_ready", text, consumer=name, ready=there)))
        return told
    if known.takes == training.GROUPS:
        names = known.coming if known.coming is not None else state.groups.having(OPEN)
        opened = (state.groups.by_id[i] for i in islice(names, GROUPS))
        group = next((one for one in opened if training.asks_for(state, name, known, one)), None)
        if group is not None:
            waiting, finding = work.waits_for_member(group, f"Consumer {name!r} has {there} complete groups. ")
            told.append(Told(TRAINING, 0, finding))
            if is_asked and waiting is not None:
                told += work.of_waiting(waiting)
    elif is_asked:
        queue = (known.filter or {}).get("queue")
        if queue is None:
            return told  # it waits for what everybody does
        if state.queues.length(queue):
            told += work.of_queue(queue)
    return told


def _may_come(work: Work, known: Consumer) -> bool:
    """Whether anything that waits or runs could be given to a consumer; also if finding out would be a long search."""
    state, wanted = work.state, known.filter
    if known.coming is not None or wanted is None or len(wanted) == 1:
        return training.may_still_come(state, known)
    if known.takes == training.GROUPS:
        opened = state.groups.having(OPEN)
        return len(opened) > LOOKED_AT or any(
            training.fits(wanted, state.groups.by_id[i]) for i in opened if i not in state.evaluations.by_group
        )
    indexes = state.indexes
    statuses = [("status", status) for status in (*ACTIVE, *QUEUED)]
    named = [(key, wanted[name]) for name, key in (("queue", "queue"), ("group_id", "group")) if name in wanted]
    named += [("tag", tag) for tag in wanted.get("tags", {}).items()]
    fewest = min([statuses, *([key] for key in named)], key=lambda keys: sum(map(indexes.count, keys)))
    if sum(map(indexes.count, fewest)) > LOOKED_AT:
        return True
    ids = (i for key in fewest for i in indexes.find(key) if i not in state.evaluations.by_rollout)
    found = (state.entries[i].rollout for i in ids)
    return any(one.status not in FINISHED and training.fits(wanted, one) for one in found)


def of_feed(work: Work, feed: FeedEntry, *, is_asked: bool = False) -> list[Told]:
    """What keeps a feed from its next batch, or from handing out more."""
    state, name = work.state, feed.name
    known = state.consumers[name]
    told = work.closed(feed)
    limited = work.no_slot(feed)
    told += [Told(WAITING, state.queues.held_for(NO_SLOT), one) for one in limited]
    told += budgets(work, feed)
    is_drawn = all(stream.is_over for stream in feed.streams.values())
    if feed.pump is None and not is_drawn:
        ended = "the process that drew them has ended, or closed it"
        text = f"Nobody draws the items of feed {name!r}: {ended}; {counted(len(feed.items), 'group')} are under way"
        told.append(Told(TRAINING, 0, found("no_pump", text, consumer=name, under_way=len(feed.items))))
    asks, ready = name in work.known.asking, len(known.groups)
    there = [item for item in islice(feed.items.values(), ITEMS) if not item.is_taken]
    opened = [item for item in there if state.groups.by_id[item.group_id].is_open]
    stands = not feed.is_closed and not feed.free() and not (is_drawn and opened)
    binds = stands and (work.known.idle > 0 or not opened)  # else runners are at work, as the trainer is
    batches, held = of_batches(work, name, known, is_asked=is_asked and not binds)
    told += batches
    if feed.is_over:
        told.append(Told(NOTHING, 0, over(work, feed, held)))
    elif not asks and (held or training.has_something(state, name, known, feed.rule["batch"])):
        if stands:
            finding = admission(work, feed, ready, held, binds=binds, is_drawn=is_drawn)
            told.append(Told(TRAINING if binds else SOON, 0, finding))
        elif is_asked and not held:
            text = f"Feed {name!r} has {ready} complete groups, which nobody has asked for"
            told.append(Told(TRAINING, 0, found("batch_ready", text, consumer=name, ready=ready)))
    elif not feed.is_closed and feed.refusal() is None:
        told += next_batch(work, feed, known, there, opened, is_asked=is_asked)
    return told


def over(work: Work, feed: FeedEntry, held: str) -> Finding:
    """That a feed has given out everything."""
    endings: dict[str, int] = {}
    for stream in islice(feed.streams.values(), QUEUES):
        for ending, number in stream.endings.items():
            endings[ending] = endings.get(ending, 0) + number
    items = ", ".join(f"{number:,} {ending}" for ending, number in sorted(endings.items())) or "none has ended"
    text = f"Feed {feed.name!r} has given out all its items ({items}){'; its ' if held else ''}{held}"
    return found("feed_over", text, consumer=feed.name, **endings)


def budgets(work: Work, feed: FeedEntry) -> list[Told]:
    """What of the allowances of a feed is nearly spent."""
    told, rule = [], feed.rule
    failed = sum(outcome.error is not None for outcome in feed.outcomes)
    in_a_row, share, window = rule["in_a_row"], rule["share"], rule["window"]
    of_row = feed.failures / in_a_row if in_a_row is not None else 0.0
    of_share = failed / (share * window) if share is not None else 0.0
    if feed.spent is None and max(of_row, of_share) >= NEARLY:
        what = (
            f"{feed.failures} rollouts failed in a row, of {in_a_row} that may"
            if of_row >= of_share
            else f"{failed} of the last {len(feed.outcomes)} rollouts failed, of {share * window:.0f} that may"
        )
        errors = feed.commonest_errors()
        worst = f". The commonest error: {brief(errors[0][0])} (as {errors[0][2]})" if errors else ""
        text = f"{max(of_row, of_share):.0%} of the failure budget of feed {feed.name!r} is spent: {what}{worst}"
        told.append(Told(SOON, 0, found("budget_low", text, consumer=feed.name, share=max(of_row, of_share))))
    bound = rule["max_filtered"]
    if bound is not None and NEARLY * bound <= feed.filtered <= bound:
        text = (
            f"{feed.filtered} groups of feed {feed.name!r} in a row were filtered, of {bound} that may. The last "
            f"one: {brief(feed.filtered_why)}"
        )
        told.append(Told(SOON, 0, found("filtered_many", text, consumer=feed.name, filtered=feed.filtered)))
    return told


def admission(work: Work, feed: FeedEntry, ready: int, held: str, *, binds: bool, is_drawn: bool) -> Finding:
    """That a feed is as far ahead of its trainer as it may be."""
    lag, known, idle = feed.rule["max_lag"], work.state.consumers[feed.name], work.known.idle
    since = min((known.since[n] for n in known.holders if n in known.since), default=None)
    if is_drawn:
        because = "all its items are drawn"
    elif len(feed.items) >= feed.places:
        ahead = f"{counted(lag + 1, 'batch', 'batches')} of {counted(feed.rule['batch'], 'group')} under way"
        because = f"all {feed.places} places are taken (max_lag={lag}: {ahead})"
    else:
        because = "what was undone is trained on again first"
    text = (
        f"Feed {feed.name!r} admits nothing more: {because}. "
        f"The trainer is {'the bottleneck' if binds else 'at work'}: "
        f"{held or 'it has not asked for the next batch'}, and "
        f"{counted(ready, 'more group is', 'more groups are') if ready else 'no other group is'} complete"
        + (f"; {counted(idle, 'call waits', 'calls wait')} for work meanwhile" if idle else "")
    )
    evidence = {"consumer": feed.name, "max_lag": lag, "places": feed.places, "ready": ready, "idle": idle}
    seconds = None if since is None else work.known.now - since
    return found("admission_closed", text, batches=sorted(known.holders)[:NAMED], held_seconds=seconds, **evidence)


def next_batch(
    work: Work, feed: FeedEntry, known: Consumer, there: list[Item], opened: list[Item], *, is_asked: bool
) -> list[Told]:
    """What the next batch of a feed waits for, of the groups that are `there` and those of them that are open."""
    state, name, batch = work.state, feed.name, feed.rule["batch"]
    ready, told = len(known.groups), []
    unjudged = [item for item in there if item.completed is not None and not item.is_kept]
    if unjudged and feed.rule["judged"] and ready + len(unjudged) >= batch:
        groups = counted(len(unjudged), "complete group waits", "complete groups wait")
        text = f"{groups} for the process of feed {name!r}, which reads their spans and calls keep="
        told.append(Told(TRAINING, 0, found("not_judged", text, consumer=name, groups=len(unjudged))))
    if feed.rule["order"] == "chosen" and ready >= batch and not feed.choice:
        text = f"{ready} complete groups wait for the process of feed {name!r}, whose order= chooses among them"
        told.append(Told(TRAINING, 0, found("not_judged", text, consumer=name, groups=ready)))
        return told
    if not opened:
        free = sum(feed.free().values())
        if not there and feed.pump is not None and free:
            places = counted(free, "place is", "places are")
            text = f"{places} free in feed {name!r}, and nothing is drawn"
            told.append(Told(TRAINING, 0, found("not_drawn", text, consumer=name)))
        return told
    is_ordered = feed.rule["order"] == "in_order"
    is_blocked = ready >= batch and (is_ordered or feed.rule["late"] == "wait")  # or it would be given
    target = binding_item(work, feed, known, opened, is_blocked=is_blocked)
    group = state.groups.by_id[target.group_id]
    has = f"The next batch of feed {name!r} has {ready} of {batch} groups"
    before = f"{has}. "
    if is_blocked:
        late = f"that would otherwise lag more than {feed.rule['max_lag']}"
        which = "before these (order='in_order')" if is_ordered else late
        before = f"{has}, and must have one {which}. "
    waiting, finding = work.waits_for_member(group, before)
    told.append(Told(STOPPED if is_blocked and waiting is None else TRAINING, 0, finding))
    if waiting is not None and is_asked:
        told += work.of_waiting(waiting)
    return told


def binding_item(work: Work, feed: FeedEntry, known: Consumer, opened: list[Item], *, is_blocked: bool) -> Item:
    """The item that a feed waits for: one that must be in the next batch, else the one that was claimed first."""
    if is_blocked and feed.rule["order"] != "in_order":
        before = feed.acks + len(known.holders) + 1
        late = [item for item in opened if feed.is_late(item, before)]
        return min(late or opened, key=lambda item: item.number)
    return min(opened, key=lambda item: (item.claimed is None, item.number))
