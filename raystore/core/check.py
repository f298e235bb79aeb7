"""Diagnostics of a store: `check` verifies its invariants, `story` tells the history of a rollout, `counts` counts.

`check` is for tests and debugging: it reads the whole state, and raises AssertionError at the first broken invariant.
`story` is for people: the known events of one rollout or group, one line for each.
"""

from __future__ import annotations

from itertools import takewhile
from typing import Any

from raystore.core import claims, groups, lifecycle, saved, training
from raystore.core.evaluation_table import LOST
from raystore.core.feed_table import CLOSED, NO_SLOT, FeedEntry
from raystore.core.gates import KEPT
from raystore.core.group_table import CANCELLED, FAILED, FILLING, LIVE, TRAINED_ON, GroupEntry
from raystore.core.indexes import FEED_LENGTH, keys_of
from raystore.core.lifecycle import ACTIVE, FINISHED, GROUP_STATUSES, OPEN, QUEUED, READY, ROLLOUT_STATUSES, is_live
from raystore.core.payload import of_attempt, of_rollout, size_of
from raystore.core.queues import ASIDE
from raystore.core.records import Change
from raystore.core.state import Consumer, State
from raystore.core.training import eviction_class, fits


def check(state: State) -> None:
    """Verify every invariant of the state; it walks all of it, and nothing else happens meanwhile."""
    state.queues.check()
    state.resources.check()
    state.spans.check(state.entries)
    state.indexes.check({i: set(keys_of(entry.rollout, entry.latest)) for i, entry in state.entries.items()})
    evictable = [rollout_id for heap in state.eviction_heaps for rollout_id in heap]
    assert len(evictable) == len(set(evictable)), "a rollout has two classes"
    assert set(evictable) <= state.entries.keys(), "a rollout is to be evicted and does not exist"
    for rollout_id, entry in state.entries.items():
        _check_entry(state, rollout_id)
        in_queue = rollout_id in state.queues
        assert in_queue == (entry.rollout.status in QUEUED), (
            f"{rollout_id} is {entry.rollout.status}, queued {in_queue}"
        )
        finished = entry.rollout.status in FINISHED
        assert (rollout_id in state.completions) == finished, f"{rollout_id} in the completion log"
        assert (entry.rollout.end_time is not None) == finished, f"{rollout_id} has the wrong end time"
    assert set(state.queues) <= state.entries.keys(), "a queued rollout does not exist"
    assert len(state.completions) == sum(e.rollout.status in FINISHED for e in state.entries.values())
    assert set(state.suspects) == {i for i in state.queues if state.queues.line(i) == ASIDE}, "waiting suspects"
    assert all(state.entries[i].suspect for i in state.suspects), "a rollout waits aside and is no suspect"
    for rollout_id in state.suspects:
        state.patience_deadlines.check((False, rollout_id))
    for rollout_id in state.queues:
        if state.queues.backs_off_until(rollout_id) is not None:
            assert state.entries[rollout_id].rollout.status == "requeuing", f"{rollout_id} backs off"
            state.deadlines.check(rollout_id)
            continue
        assert state.queues.waits_for(rollout_id) == _hindrance(state, rollout_id), f"{rollout_id} is held back wrongly"
    payloads = sum(entry.bytes for entry in state.entries.values())
    payloads += sum(size_of(worker.heartbeat_stats) for worker in state.workers.values())
    assert state.payload_bytes == payloads, "payload bytes"
    assert state.attempt_count == sum(len(entry.attempts) for entry in state.entries.values()), "attempt count"
    _check_gates(state)
    _check_sessions(state)
    ended = {session.session_id for session in state.sessions.values() if session.ended_at is not None}
    assert state.ended_sessions.keys() == ended, "ended sessions"
    idle = {worker.worker_id for worker in state.workers.values() if not lifecycle.is_busy(worker)}
    assert state.idle_workers.keys() == idle, "workers that are not busy"
    _check_consumers(state)
    state.groups.check()
    for feed in state.feeds:
        _check_feed(state, feed)
    assert not state.moved_feeds, "a feed has not followed its groups"
    assert state.feeds.by_group.keys() == {i for feed in state.feeds for i in (*feed.items, *feed.trained)}, "feeds"
    statuses = {i: state.entries[i].rollout.status for i in state.evaluations.by_rollout if i in state.entries}
    state.evaluations.check(statuses, state.queues)
    _check_evaluations(state)
    assert not state.moved_members, "a group has not followed its members"
    for group in state.groups:
        _check_group(state, group)
    for worker in state.workers.values():
        assert worker.status in lifecycle.WORKER_STATUSES, f"worker status {worker.status}"
        assert (worker.current_attempt_id is None) == (not lifecycle.is_busy(worker)), f"worker {worker.worker_id}"


def _check_entry(state: State, rollout_id: str) -> None:
    entry = state.entries[rollout_id]
    rollout = entry.rollout
    size = of_rollout(rollout.input, rollout.metadata, rollout.tags)
    size += sum(of_attempt(attempt.metadata, attempt.error) for attempt in entry.attempts)
    size += saved.bytes_of(entry.saved)
    saved.check_entry(entry)
    assert entry.bytes == size, f"{rollout_id} counts {entry.bytes} bytes, and has {size}"
    assert entry.rollout.rollout_id == rollout_id
    assert entry.rollout.status in lifecycle.ROLLOUT_STATUSES, f"rollout status {entry.rollout.status}"
    sequences = [attempt.sequence_id for attempt in entry.attempts]
    assert sequences == list(range(1, len(sequences) + 1)), f"attempt numbers of {rollout_id}: {sequences}"
    for attempt in entry.attempts:
        assert attempt.status in lifecycle.ATTEMPT_STATUSES, f"attempt status {attempt.status}"
        assert attempt.outcome is None or attempt.outcome in lifecycle.OUTCOMES, f"outcome {attempt.outcome}"
        assert lifecycle.is_possible(attempt), f"a lost attempt is {attempt.status}"
    for attempt in entry.attempts[:-1]:
        assert not is_live(attempt), f"attempt {attempt.attempt_id} is live and superseded"
    assert 0 <= entry.forgiven <= len(entry.attempts), f"{rollout_id} is forgiven {entry.forgiven} attempts"
    assert 0 <= entry.blames <= entry.deliveries, f"{rollout_id} is to blame for {entry.blames} losses"
    if entry.rollout.status in ACTIVE:
        state.deadlines.check(rollout_id)
    if state.spans.has(rollout_id):
        number = eviction_class(state, entry)  # or a class that goes sooner: who wants it is found when it is met
        assert any(rollout_id in heap for heap in state.eviction_heaps[: number + 1]), f"{rollout_id} cannot be evicted"


def _check_sessions(state: State) -> None:
    for session in state.sessions.values():
        assert not (session.claims.keys() & session.held.keys()), "a claim is held"
        for rollout_id, attempt_id in [*session.claims, *session.held]:
            entry = state.entries[rollout_id]
            assert entry.holders.get(attempt_id) == session.session_id, f"{attempt_id} is held by another session"
            attempt = next(a for a in entry.attempts if a.attempt_id == attempt_id)
            assert is_live(attempt), f"{attempt_id} is held and not live"
        assert session.ended_at is None or session.is_idle, "an ended session holds something"
        for key in session.claims:
            state.claim_deadlines.check((session.session_id, key))


def _check_group(state: State, group: GroupEntry) -> None:
    name = f"group {group.group_id}"
    assert group.status in GROUP_STATUSES, f"{name} is {group.status}"
    assert group.members and group.members.keys() <= state.entries.keys(), f"members of {name}"
    for rollout_id, stand in group.members.items():
        entry = state.entries[rollout_id]
        assert entry.rollout.group_id == group.group_id, f"{rollout_id} is no member of {name}"
        feed = state.feeds.by_group.get(group.group_id)
        assert stand == groups.stand_of(entry, stand, feed), f"how {rollout_id} stands in {name}"
    places = sorted(group.places.values())
    assert len(places) == len(set(places)) and set(places) <= set(range(group.n)), f"places of {name}"
    standing_by = {i for i, stand in group.members.items() if stand in (LIVE, *FILLING)} - group.places.keys()
    assert group.spares.keys() == standing_by, f"spares of {name}"
    assert set(group.held) == {i for i in group.members if state.queues.is_held(i)}, f"what is held back of {name}"
    assert (group.rests_since is not None) == bool(group.held), f"whether the deadline of {name} rests"
    done = [i for i in group.in_place if group.members[i] in FILLING]
    assert group.missing == group.n - len(done), f"{name} lacks {group.missing}"
    assert all(group.members[i] in TRAINED_ON and i in done for i in group.chosen), f"what is trained on of {name}"
    assert (group.end_time is None) == group.is_open, f"when {name} ended"
    if group.is_open:
        assert len(places) == group.n and group.missing and not group.chosen, f"{name} should end"
        assert not {group.members[i] for i in group.places} & {FAILED, CANCELLED}, f"a place of {name} is empty"
        state.group_deadlines.check(group.group_id)
    elif group.status == "complete":
        assert len(group.chosen) >= group.least, f"{name} has too little"
    elif group.status not in READY:
        assert not group.is_ready, f"{name} could be taken"


def _check_groups_of(state: State, name: str, known: Consumer) -> None:
    expected = {
        group.group_id
        for group in state.groups
        if training.is_ready_for(state, name, group)
        and training.asks_for(state, name, known, group)
        and not any(name in state.entries[rollout_id].taken for rollout_id in group.chosen)
    }
    assert set(known.groups) == expected and not known.awaiting, f"groups that {name} awaits"
    if known.coming is not None:
        open_groups = map(state.groups.by_id.__getitem__, state.groups.having(OPEN))
        coming = {group.group_id for group in open_groups if training.asks_for(state, name, known, group)}
        assert known.coming.keys() == coming, f"groups that may come to {name}"
    assert known.grouped.keys() == known.batches.keys(), f"batches of groups of {name}"
    for number, group_ids in known.grouped.items():
        taken = [state.groups.by_id[group_id] for group_id in group_ids]
        assert all(group.is_ready for group in taken), f"batch {number} of {name} has groups with too little"
        assert known.batches[number] == [i for group in taken for i in group.chosen], f"batch {number} of {name}"
    taken_ids = [group_id for group_ids in known.grouped.values() for group_id in group_ids]
    assert len(taken_ids) == len(set(taken_ids)), f"{name} has a group twice"


def _hindrance(state: State, rollout_id: str) -> str | None:
    """What a rollout that waits should be held back for."""
    rollout = state.entries[rollout_id].rollout
    evaluation = state.evaluations.of_rollout(rollout_id)
    if evaluation is not None and evaluation.lost is not None:
        return LOST
    is_pinned = state.evaluations.pin_of(rollout) is not None
    if rollout.resources_id in state.resources.missing and not is_pinned:
        return rollout.resources_id
    feed = state.feeds.by_group.get(rollout.group_id or "")
    if feed is not None and feed.is_closed:
        return CLOSED
    has_slot = feed is None or feed.rule["max_running"] is None or rollout_id in feed.slots
    return None if has_slot else NO_SLOT


def _check_evaluations(state: State) -> None:
    table = state.evaluations
    assert table.by_group.keys() <= state.groups.by_id.keys(), "groups of evaluations"
    members = {i: key for group_id, key in table.by_group.items() for i in state.groups.by_id[group_id].members}
    assert members | {i: table.by_rollout[i] for i in table.strays} == table.by_rollout, "rollouts of evaluations"
    for key, one in table.running.items():
        is_had = one.pin is None or state.resources.is_there(one.resources_id or "", one.pin)
        assert is_had or one.lost is not None, f"the version of {key} is gone"
        for group_id, item in one.items.items():
            group = state.groups.get(group_id)
            for rollout_id in () if group is None else group.members:
                is_over = state.entries[rollout_id].rollout.status in FINISHED
                assert (rollout_id in item.results) == is_over, f"sample {rollout_id} of {key}"


def _check_feed(state: State, feed: FeedEntry) -> None:
    name, known = f"feed {feed.name}", state.consumers[feed.name]
    assert known.takes == training.GROUPS, f"what {name} takes"
    assert not feed.items.keys() & feed.trained.keys(), f"{name} has an item twice"
    assert all(state.feeds.by_group.get(i) is feed for i in (*feed.items, *feed.trained)), f"groups of {name}"
    taken = {i for number in known.holders for i in known.grouped[number]}
    assert {i for i, item in feed.items.items() if item.is_taken} == taken, f"what {name} has given out"
    assert feed.trained.keys() == {i for number in known.steps for i in known.grouped[number]}, f"trained by {name}"
    for group_id, item in feed.items.items():
        group = state.groups.by_id[group_id]
        assert group.is_open or group.status in READY, f"{group_id} of {name} is {group.status}"
        assert (item.completed is not None) == (not group.is_open), f"when {group_id} of {name} was complete"
        assert item.claimed is None or item.claimed <= feed.acks, f"when {group_id} of {name} was claimed"
        assert not (item.is_kept and group.is_open), f"{group_id} of {name} was judged too soon"
        assert item.is_kept or feed.rule["judged"] or group.is_open, f"nobody judges {group_id} of {name}"
    counted = sum(sum(stream.endings.values()) for stream in feed.streams.values())
    skipped = sum(stream.endings.get("skipped", 0) for stream in feed.streams.values())
    assert counted - skipped + len(feed.items) == feed.drawn, f"endings of {name}"
    reported = [count for window in feed.selection.windows for count in window.items.values()]
    assert sum(reported) <= counted - skipped, f"{name} reports more endings than there were"
    assert feed.selection.untracked or feed.selection.ended.keys() == feed.selection.trained.keys()


def _check_gates(state: State) -> None:
    for queue, limit in state.gates.limits.items():
        running = sum(e.rollout.queue == queue and e.rollout.status in ACTIVE for e in state.entries.values())
        assert limit.running == running, f"{queue} counts {limit.running} running rollouts, and has {running}"
        assert limit.per_minute is not None or not limit.claims, f"{queue} remembers claims, and has no rate"
        state.gates.deadlines.check(queue)
    for queue, whose, pause in state.gates.all_pauses():
        is_live = whose == KEPT or state.sessions[whose].ended_at is None
        assert is_live, f"the pause of {queue!r} by {pause.session_id} has outlived its session"


def _check_consumers(state: State) -> None:
    for name, known in state.consumers.items():
        if known.takes == training.GROUPS:
            _check_groups_of(state, name, known)
        else:
            assert not known.groups and not known.grouped, f"{name} takes no groups"
        expected = set()
        for rollout_id, entry in state.entries.items() if known.takes != training.GROUPS else ():
            statuses = known.filter["status_in"] if known.filter is not None else lifecycle.TRAINABLE
            is_trainable = entry.rollout.status in statuses and not training.is_given_up(entry)
            is_asked = fits(known.filter, entry.rollout)
            is_asked = is_asked and rollout_id not in state.evaluations.by_rollout
            if is_trainable and is_asked and name not in entry.taken:
                expected.add(rollout_id)
            if known.coming is not None:
                is_coming = is_asked and entry.rollout.status not in FINISHED
                assert (rollout_id in known.coming) == is_coming, f"whether {rollout_id} may come to {name}"
        assert set(known.awaiting) == expected, f"what {name} awaits"
        awaited = known.groups if known.takes == training.GROUPS else known.awaiting
        assert known.returned.keys() <= awaited.keys(), f"what came back to {name}"
        assert not (known.holders.keys() & known.steps.keys()), f"a batch of {name} is open and consumed"
        assert known.since.keys() <= known.holders.keys(), f"since when {name} holds batches"
        assert known.inherited.keys() <= known.holders.keys() <= known.batches.keys(), f"batches of {name}"
        for number, whose in known.holders.items():
            assert whose is None or (name, number) in state.sessions[whose].batches, f"batch {number} of {name}"
        for number, rollout_ids in known.batches.items():
            for rollout_id in rollout_ids:
                entry = state.entries[rollout_id]  # what is held is not deleted
                assert entry.taken[name].batch == number and not entry.taken[name].is_durable, f"batch {number}"
    for session in state.sessions.values():
        for name, number in session.batches:
            assert state.consumers[name].holders.get(number) == session.session_id, f"batch {number} of {name}"
            state.claim_deadlines.check((session.session_id, (name, number)))


def story(state: State, rollout_id: str) -> list[str]:
    """What is known of the history of a rollout, or of a group by its id, a line for each thing, oldest first."""
    entry = state.entries.get(rollout_id)
    if entry is None and (named := state.groups.get(rollout_id)) is not None:
        return _story_of_group(state, named)
    lines = [_line(change) for change in state.changes.of(rollout_id, entry.rollout.start_time if entry else 0.0)]
    if entry is None:
        lines.append(f"now: rollout {rollout_id} does not exist")
        return lines
    rollout = entry.rollout
    lines.append(
        f"now: {rollout.status}, {len(entry.attempts)} attempts, {len(state.spans.of(rollout_id))} spans"
        + (", spans evicted" if rollout_id in state.spans.evicted else "")
        + (f", in queue {rollout.queue}" if rollout_id in state.queues else "")
        + (f", {entry.deliveries} charged deliveries" if entry.deliveries else "")
    )
    if (group := state.groups.of(rollout)) is not None:
        place = group.places.get(rollout_id)
        role = "without a place" if place is None else f"in place {place + 1} of {group.n}"
        lines.append(f"in group {group.group_id}, which is {group.status}: {role}")
    if (evaluation := state.evaluations.by_rollout.get(rollout_id)) is not None:
        lines.append(f"of evaluation {evaluation}: no consumer is given it")
    for name, taken in entry.taken.items():
        lines.append(
            f"taken by {name!r}: batch {taken.batch}, "
            + (f"consumed by step {taken.step}" if taken.step is not None else "not consumed yet")
            + (f" ({taken.note})" if taken.note else "")
            + (", durable" if taken.is_durable else "")
        )
    lines += [f"awaited by {name!r}" for name, known in state.consumers.items() if rollout_id in known.awaiting]
    if rollout.requeued_from is not None:
        lines.append(f"requeued from {rollout.requeued_from}")
    lines += [f"requeued as {other}" for other in state.indexes.find(("requeued_from", rollout_id))]
    if entry.saved is not None:
        lines.append(
            f"a state of {saved.bytes_of(entry.saved):,} bytes is saved by attempt {entry.saved.attempt_id}, with the "
            f"spans up to number {entry.saved.mark}: the next attempt goes on from there"
        )
    for tried in entry.attempts:
        held = entry.holders.get(tried.attempt_id)
        lines.append(
            f"attempt {tried.sequence_id} {tried.attempt_id}: {tried.status}, outcome {tried.outcome}, "
            f"worker {tried.worker_id}, session {held}"
            + (f", went on from what {tried.resumed_from} saved" if tried.resumed_from else "")
            + (f", error {tried.error.strip().splitlines()[-1]}" if tried.error and tried.error.strip() else "")
        )
    return lines


def _line(change: Change) -> str:
    attempt = f" attempt {change.attempt_id}" if change.attempt_id else ""
    detail = "".join(f" {name}={value}" for name, value in (change.detail or {}).items())
    return f"#{change.sequence} {change.time:.6f} {change.kind}{attempt}{detail}"


def _story_of_group(state: State, group: GroupEntry) -> list[str]:
    newer = takewhile(lambda change: change.time >= group.start_time, reversed(list(state.changes)))
    changes = [change for change in newer if (change.detail or {}).get("group_id") == group.group_id][::-1]
    lines = [_line(change) + (f" rollout {change.rollout_id}" if change.rollout_id else "") for change in changes]
    lines.append(
        f"now: {group.status}" + (f" ({group.why})" if group.why else "")
        + f", {group.n - group.missing} of {group.n} succeeded, min_size {group.min_size}, {len(group.spares)} spares"
        + (f", {group.replaced + group.renewed} replaced" if group.replaced + group.renewed else "")
    )  # fmt: skip
    feed = state.feeds.by_group.get(group.group_id)
    item = None if feed is None else feed.items.get(group.group_id) or feed.trained.get(group.group_id)
    if feed is not None and item is not None:
        claimed = "not claimed yet" if item.claimed is None else f"claimed after {item.claimed} batches"
        lag = "" if item.lag is None else f", trained with lag {sum(item.lag)}"
        lines.append(
            f"item {item.index} of epoch {item.epoch} of {item.environment!r} in feed {feed.name!r}, {claimed} of "
            f"{feed.acks}{lag}"
        )
    if (evaluation := state.evaluations.by_group.get(group.group_id)) is not None:
        lines.append(f"an item of evaluation {evaluation}: no consumer is given it")
    if group.rests_since is not None:
        lines.append(f"its deadline rests: {len(group.held)} members are held back")
    for rollout_id, stand in group.members.items():
        place = group.places.get(rollout_id)
        lines.append(f"member {rollout_id}: {stand}" + (f", place {place + 1}" if place is not None else ""))
    lines += [f"awaited by {name!r}" for name, known in state.consumers.items() if group.group_id in known.groups]
    for name, known in state.consumers.items():
        for number, group_ids in known.grouped.items():
            if group.group_id in group_ids:
                step = known.steps.get(number)
                said = "not consumed yet" if step is None else f"consumed by step {step}"
                lines.append(f"taken by {name!r}: batch {number}, {said}")
    return lines


def counts(state: State) -> dict[str, Any]:
    """How much a store holds and has done; the service adds the numbers of its process."""
    by_status = {status: state.indexes.count(("status", status)) for status in ROLLOUT_STATUSES}
    return {
        "total_rollouts": len(state.entries),
        "total_attempts": state.attempt_count,
        "total_spans": state.spans.count,
        "total_resources": len(state.resources),
        "total_workers": len(state.workers),
        "total_span_bytes": state.spans.bytes,
        "eviction_threshold_bytes": state.settings.eviction_bytes,
        "safe_threshold_bytes": state.settings.safe_bytes,
        "payload_bytes": state.payload_bytes + state.resources.bytes,
        "accounted_bytes": state.total_bytes,
        "evicted_spans": state.spans.evicted_spans,
        "evicted_rollouts": state.evicted_rollouts,
        "eviction_passes": state.eviction_passes,
        "deadline_fires": state.deadlines.fires,
        "sessions": claims.live_sessions(state),
        "queue_length": len(state.queues),
        "queue_lengths": state.queues.lengths(),
        "held_back": sum(state.queues.held_counts().values()),
        "held_back_by_resources": {
            name: count for name, count in state.queues.held_counts().items() if name not in (CLOSED, NO_SLOT, LOST)
        },
        "backing_off": sum(state.queues.backing_off_by_queue.values()),
        "backing_off_by_queue": dict(state.queues.backing_off_by_queue),
        "groups_by_status": state.groups.counts(),
        "rollouts_by_status": {status: count for status, count in by_status.items() if count},
        "suspects": len(state.suspects),
        "withdrawals": state.withdrawals,
        "changes": state.changes.last,
        "change_feed_length": FEED_LENGTH,
        "memory_full": state.memory_full,
        "waits_for_consumer": state.waits_for,
        "consumers": training.describe(state),
    }
