"""The question and its answer: which constraints there are, and which of them binds.

What binds is found by tiers (`known`). Within one, it is what holds up most rollouts; of constraints that hold up the
same ones it is the one that stands first in `findings.KINDS`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice

from raystore.core import pauses, training
from raystore.core.findings import RANK, Finding, brief, counted, found, lasting
from raystore.core.gates import EVERY
from raystore.core.group_table import GroupEntry
from raystore.core.state import Consumer, State
from raystore.errors import InvalidValueError, ReadOnlyError
from raystore.errors.text import meant, quoted
from raystore.service.diagnosis.known import LAST, NAMED, NOTHING, QUEUES, SOON, STORE, Known, Told
from raystore.service.diagnosis.trainers import of_consumer, of_feed, of_taker
from raystore.service.diagnosis.work import Work

FEEDS = 100  #: that are looked at
CONSUMERS = 100  #: that wait, and are no feeds
BEHIND_SECONDS = 1.0  #: for which a change waits for the disk, from which on the disk is slow


def why(
    state: State,
    known: Known,
    *,
    rollout_id: str | None = None,
    group_id: str | None = None,
    consumer: str | None = None,
) -> list[Finding]:
    """What keeps a rollout, a group, a consumer or (None) everything from going on; what binds comes first.

    At most one of the three is given. Raises `RolloutNotFoundError` or `InvalidValueError` for what is unknown.
    """
    given = {"rollout_id": rollout_id, "group_id": group_id, "consumer": consumer}
    named = [name for name, value in given.items() if value is not None]
    if len(named) > 1:
        raise InvalidValueError(named[1], given[named[1]], f"None, since {named[0]} is given: ask for one at a time")
    work = Work(state, known)
    told: Iterable[Told]
    if rollout_id is not None:
        told = work.of_rollout(state.entry(rollout_id))
    elif group_id is not None:
        told = work.of_group(_group(state, group_id))
    elif consumer is not None:
        told = of_consumer(work, consumer, _consumer(state, consumer))
    else:
        told = of_everything(work)
    return _in_order([*of_the_store(work), *told])


def _in_order(told: Iterable[Told]) -> list[Finding]:
    """Each finding once, and some of each kind; one that holds up several things weighs as much as these together."""
    weighed: dict[tuple[str, str], Told] = {}
    for one in told:
        key = (one.finding.kind, one.finding.text)
        before = weighed.get(key, one)
        weight = one.weight if before is one else before.weight + one.weight
        weighed[key] = Told(min(before.tier, one.tier), weight, before.finding)
    ordered = sorted(weighed.values(), key=lambda one: (one.tier, -one.weight, RANK[one.finding.kind]))
    of_kind: Counter[str] = Counter()
    kept = []
    for one in ordered:
        of_kind[one.finding.kind] += 1
        if of_kind[one.finding.kind] <= NAMED:
            kept.append(one.finding)
    return kept


def _group(state: State, group_id: str) -> GroupEntry:
    group = state.groups.get(group_id)
    if group is None:
        carry = state.indexes.count(("group", group_id))
        only = f"; {counted(carry, 'rollout')} only carry this group_id, and are no group (enqueue_group)"
        raise InvalidValueError("group_id", group_id, f"the id of a group of this store{only if carry else ''}")
    return group


def _consumer(state: State, name: str) -> Consumer:
    known = state.consumers.get(name)
    if known is None:
        names = list(islice(state.consumers, NAMED))
        there = f"there are {quoted(names)}" if names else "there are none: a consumer is known from its first take on"
        near = meant(name, state.consumers)
        raise InvalidValueError("consumer", name, f"the name of a consumer or feed of this store; {there}{near}")
    return known


def memory_full(state: State) -> Finding:
    """That no work is handed out, since memory is full of what must stay; and who is in the way."""
    in_the_way = training.in_the_way(state)[:NAMED] if state.waits_for is not None else []
    whose = [f"consumer {name!r} awaits {awaited} rollouts and holds {held}" for name, awaited, held in in_the_way]
    text = (
        f"Memory is full ({state.total_bytes:,} bytes, threshold {state.settings.eviction_bytes:,}) and nothing more "
        f"may be evicted: no work is handed out until {state.settings.safe_bytes:,} bytes are in use. "
        + (f"In the way: {'; '.join(whose)}" if whose else "Nobody has released what is there (on_memory_full='pause')")
    )
    return found("memory_full", text, bytes=state.total_bytes, consumer=state.waits_for)


def of_the_store(work: Work) -> Iterator[Told]:
    """What stops everything."""
    state, known = work.state, work.known
    failed, journal = known.failed, known.journal
    if type(failed) is ReadOnlyError:
        text = "This is a run that was opened for reading, as its journal has it"
        yield Told(LAST, 0, found("read_only", text, path=failed.path))
    elif failed is not None:
        text = f"The store takes no changes any more: {brief(str(failed))}"
        yield Told(STORE, 0, found("store_failed", text, error=type(failed).__name__))
    if journal is not None and journal.is_full:
        text = f"The disk of the journal in {journal.path} is full, so that no change is accepted"
        yield Told(STORE, 0, found("journal_full", text, path=journal.path))
    if journal is not None and journal.behind_seconds >= BEHIND_SECONDS:
        text = (
            f"The oldest change has waited for the disk of the journal for {lasting(journal.behind_seconds)}, with "
            f"{journal.behind_bytes:,} bytes behind it, and answers wait for that"
        )
        evidence = {"seconds": journal.behind_seconds, "bytes": journal.behind_bytes, "path": journal.path}
        yield Told(STORE, 0, found("journal_slow", text, **evidence))
    if state.memory_full:
        yield Told(STORE, 0, memory_full(state))


def of_everything(work: Work) -> list[Told]:
    """What binds the run."""
    state = work.state
    told = [*work.of_queues(), *work.of_missing_resources()]
    for feed in islice(state.feeds, FEEDS):
        told += of_feed(work, feed)
    asking = [name for name in work.known.asking if name in state.consumers and state.feeds.get(name) is None]
    for name in sorted(asking)[:CONSUMERS]:
        told += of_taker(work, name, state.consumers[name])
    told += work.of_what_runs()
    if all(one.tier > NOTHING for one in told):
        told.append(Told(NOTHING, 0, work.nothing()))
    return [*told, *of_idle_pauses(work), *of_failing_pools(work)]


def of_idle_pauses(work: Work) -> Iterator[Told]:
    """Pauses of queues in which nothing waits."""
    gates = work.state.gates
    for name in islice(gates.pauses, QUEUES):
        is_idle = not work.state.queues if name == EVERY else not work.state.queues.length(name)
        if is_idle:
            for one in pauses.paused(work.state, name, work.known.now):
                yield Told(SOON, 0, one)


def of_failing_pools(work: Work) -> Iterator[Told]:
    """Pools that fail, although others serve their queues."""
    pools = work.known.pools
    if pools is None:
        return
    for name, pool in islice(pools.failed.items(), NAMED):
        if any(pools.failing(queue) for queue in pool.queues if work.state.queues.length(queue)):
            continue  # which is told of the queue
        error = brief(pool.error)
        text = f"The runners of pool {name} fail before they are ready, {pool.failures} in a row: {error}"
        yield Told(SOON, 0, found("pool_fails", text, pool_id=name, failures=pool.failures, error=error))
