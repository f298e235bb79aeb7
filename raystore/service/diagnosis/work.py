"""What rollouts and groups wait for: runners, gates, resources, a feed that is closed, each other.

Not here: what trainers wait for (`trainers`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from heapq import nlargest
from itertools import islice
from statistics import median
from typing import Any

from raystore.core import claims, pauses, retries
from raystore.core.evaluation_table import LOST
from raystore.core.feed_table import CLOSED, NO_SLOT, FeedEntry
from raystore.core.findings import Finding, brief, counted, found, lasting, short
from raystore.core.gates import EVERY
from raystore.core.group_table import LIVE, GroupEntry
from raystore.core.lifecycle import ACTIVE, FINISHED
from raystore.core.queues import ASIDE, HELD, PLAIN
from raystore.core.records import Attempt, Rollout
from raystore.core.state import Entry, State
from raystore.errors import FailureBudgetError
from raystore.errors.text import meant, quoted
from raystore.service.diagnosis.known import (
    ITEMS,
    MEMBERS,
    NAMED,
    NOTHING,
    PLACES,
    QUEUES,
    SOON,
    STOPPED,
    TRAINING,
    WAITING,
    Known,
    Told,
)
from raystore.service.presence import Pools
from raystore.wire.codec import plain_of

FINISHED_LAST = 64  #: rollouts whose durations are looked at
COMPARED = 200  #: names of queues that are served, to which that of another one is compared
FEW = 3  #: durations, of which no median is taken
QUIET_SECONDS = 5.0  #: without a sign of life, from which on that is told: a runner gives one within a second
RESTING_SECONDS = 60.0  #: for which a runner that has said that it rests is believed to live
SLOW = 1.5  #: times the median, from which on it is named,
SHORT_SECONDS = 0.01  #: unless the median is below


def typical_seconds(state: State, queue: str) -> float | None:
    """The median duration of the rollouts of a queue that succeeded last, or (if these are too few) of any queue.

    None if that is not known yet. All medians that are told are from here.
    """
    mine: list[float] = []
    others: list[float] = []
    for _, rollout_id in state.completions.after(state.completions.last - FINISHED_LAST):
        entry = state.entries[rollout_id]
        latest = entry.latest
        if latest is not None and latest.status == "succeeded" and latest.end_time is not None:
            durations = mine if entry.rollout.queue == queue else others
            durations.append(latest.end_time - latest.start_time)
    taken = mine if len(mine) >= FEW else [*mine, *others]
    return median(taken) if len(taken) >= FEW else None


def unserved(pools: Pools, queue: str, waiting: int, seconds: float) -> Finding:
    """That rollouts wait in a queue of which nobody has asked for work: a misspelt name, perhaps."""
    served = pools.servers.keys()
    some = sorted(islice(served, COMPARED))
    if served:
        hint = f"Served are {quoted(some[:NAMED])}{', ...' if len(served) > NAMED else ''}{meant(queue, some) or '.'}"
    else:
        hint = "No queue is served: the runners are not ready yet, have ended, or were never started."
    text = (
        f"Rollouts wait in queue {queue!r} ({waiting}), and no process has asked for work of it for "
        f"{lasting(seconds)}. {hint}"
    )
    return found("unserved_queue", text, queue=queue, rollouts=waiting, seconds=seconds, served=some[:NAMED])


@dataclass(slots=True)
class Work:
    """The state and what is known beside it, while one question is answered."""

    state: State
    known: Known
    _said: Counter[str] = field(default_factory=Counter)  # how often each kind was found of a queue
    _oldest: tuple[Entry, str, dict[str, Any]] | None = None
    _everywhere: list[Finding] | None = None

    def _is_named(self, kind: str) -> bool:
        """Whether another queue is to be named in a finding of a kind; of many only the first are, since words cost."""
        self._said[kind] += 1
        return self._said[kind] <= NAMED

    def nothing(self) -> Finding:
        """That there is nothing to do."""
        state, idle = self.state, self.known.idle
        over = len(state.completions)
        past = f"; {counted(over, 'rollout has', 'rollouts have')} finished" if over else ""
        wait = f"; {counted(idle, 'call waits', 'calls wait')} for work" if idle else ""
        text = f"Nothing is queued and nothing runs{past}{wait}"
        return found("no_tasks", text, finished=over, idle=idle)

    def running(self) -> int:
        """How many rollouts run."""
        return sum(self.state.indexes.count(("status", status)) for status in ACTIVE)

    def oldest(self) -> tuple[Entry, str, dict[str, Any]] | None:
        """The rollout that has run for longest (of each status: that has had it for longest), and what it does."""
        if self._oldest is None:
            ids = (next(iter(self.state.indexes.find(("status", status))), None) for status in sorted(ACTIVE))
            entries = [self.state.entries[rollout_id] for rollout_id in ids if rollout_id is not None]
            entry = min(entries, key=_began, default=None)
            self._oldest = None if entry is None else (entry, *self.at_work(entry))
        return self._oldest

    def of_what_runs(self) -> Iterator[Told]:
        """That all that is unfinished runs."""
        state, running = self.state, self.running()
        by_itself = sum(state.queues.backing_off_by_queue.values()) + len(state.suspects)
        oldest = self.oldest()
        if oldest is None or len(state.queues) > by_itself:
            return
        entry, said, evidence = oldest
        idle = self.known.idle
        more = f"; {counted(idle, 'call waits', 'calls wait')} for more work" if idle else ""
        left = "Nothing is left in the queues" if not state.queues else "What is left in the queues waits for its time"
        text = (
            f"{left}: {counted(running, 'rollout')} {'runs' if running == 1 else 'run'}, the oldest of them "
            f"{entry.rollout.rollout_id}, {said}{more}"
        )
        yield Told(TRAINING, 0, found("all_claimed", text, running=running, idle=idle, **evidence))

    def at_work(self, entry: Entry) -> tuple[str, dict[str, Any]]:
        """What a rollout that runs does, as far as that is known: in words, and as evidence."""
        rollout, attempt, now = entry.rollout, entry.latest, self.known.now
        evidence: dict[str, Any] = {"rollout_id": rollout.rollout_id}
        if attempt is None or attempt.status not in ACTIVE:
            return f"{rollout.status} by hand, without an attempt that runs", evidence
        seconds, usual = now - attempt.start_time, typical_seconds(self.state, rollout.queue)
        evidence |= {
            "attempt_id": attempt.attempt_id, "worker_id": attempt.worker_id, "seconds": seconds,
            "median_seconds": usual,
        }  # fmt: skip
        said = f"running for {lasting(seconds)}"
        if attempt.status == "preparing":
            said = f"claimed {lasting(seconds)} ago" + (
                ", without a sign of life since" if seconds > QUIET_SECONDS else ""
            )
        if attempt.resumed_from is not None:
            evidence["resumed_from"] = attempt.resumed_from
            said += f", having gone on from what attempt {attempt.resumed_from} saved"
        if usual is not None and usual >= SHORT_SECONDS and seconds > SLOW * usual:
            ratio = seconds / usual
            said += f", {ratio:,.{0 if ratio >= 10 else 1}f} times the median of {lasting(usual)}"
        holder = entry.holders.get(attempt.attempt_id)
        if attempt.worker_id is not None:
            said += f", on worker {attempt.worker_id}"
        elif holder is not None:
            said += f", in {pauses.who(self.state, holder)}"
        timeout = rollout.config.timeout_seconds
        if timeout is not None:
            said += f", of at most {lasting(timeout)}"
        return said + self._last_sign(attempt, evidence), evidence

    def _last_sign(self, attempt: Attempt, evidence: dict[str, Any]) -> str:
        """What was heard last of an attempt: the span that was open at its last heartbeat, else the last that ended."""
        now, said = self.known.now, ""
        span = self.state.spans.latest(attempt.rollout_id)
        if (open_span := self._open_span(attempt)) is not None:
            name, since = open_span
            evidence |= {"span": short(name), "span_seconds": now - since}
            said += f", in span '{short(name)}' for {lasting(now - since)}"
        elif span is not None and span.attempt_id == attempt.attempt_id:
            ended = span.end_time if span.end_time is not None else span.start_time
            ago = "" if ended is None else f", which ended {lasting(now - ended)} ago"
            evidence |= {"span": short(span.name), "span_seconds": None if ended is None else now - ended}
            said += f"; the last span received of it is '{short(span.name)}'{ago}"
        if (heard := attempt.last_heartbeat_time) is not None:
            evidence["heard_seconds"] = now - heard
            said += f"; last heard of {lasting(now - heard)} ago"
        return said

    def _open_span(self, attempt: Attempt) -> tuple[str, float] | None:
        """The newest open span of an attempt, and since when, as its runner said with its last heartbeat."""
        worker = self.state.workers.get(attempt.worker_id or "")
        stats = None if worker is None else plain_of(worker.heartbeat_stats)
        places = stats.get("places") if isinstance(stats, dict) else None
        for place in places[:PLACES] if isinstance(places, list) else ():
            match place:
                case {"rollout_id": attempt.rollout_id, "span": str() as name, "span_since": float() as since}:
                    return name, since
        return None

    def of_queues(self) -> list[Told]:
        """What holds up the rollouts of each queue in which some wait."""
        told: list[Told] = []
        state = self.state
        for queue, _ in nlargest(QUEUES, state.queues.lengths().items(), key=lambda item: item[1]):
            told += self.of_queue(queue)
        return told

    def of_queue(self, queue: str) -> Iterator[Told]:
        """What holds up the rollouts of a queue: those that might be claimed, those that back off, and suspects."""
        queues, now = self.state.queues, self.known.now
        aside = queues.in_line(queue, ASIDE)
        offered = queues.length(queue) - queues.in_line(queue, HELD) - aside
        yield from self.at_the_gate(queue, offered)
        if queue in queues.backing_off_by_queue and self._is_named("backing_off"):
            for one in retries.reasons(self.state, queue, now):
                yield self._by_itself(queues.backing_off_by_queue[queue], one)
        if aside and self._is_named("suspect_waits"):
            for first in islice((i for i in islice(self.state.suspects, ITEMS) if queues.line_of[i][0] == queue), 1):
                yield self._by_itself(aside, self.suspect(first))

    def _by_itself(self, weight: int, finding: Finding) -> Told:
        """A finding of what ends by itself: as long as more runs than waits for it, it is a remark."""
        return Told(WAITING if weight >= self.running() else SOON, weight, finding)

    def at_the_gate(self, queue: str, offered: int) -> list[Told]:
        """What keeps the rollouts of a queue that could be claimed from being claimed, if there are any."""
        hindrance = self.state.gates.hindrance(queue, self.known.now)
        reasons: list[Finding] = []
        if hindrance is not None:
            reasons += self.paused_everywhere()
            reasons += pauses.reasons(self.state, queue, self.known.now) if self._is_named(hindrance) else []
        if offered:
            kind = self.nobody(queue) or ("" if hindrance else "no_runner")
            if kind and self._is_named(kind):
                reasons.append(self.unattended(queue, kind) if kind != "no_runner" else self.no_runner(queue, offered))
        return [Told(WAITING, offered, one) for one in reasons]

    def paused_everywhere(self) -> list[Finding]:
        """The pauses of all queues."""
        if self._everywhere is None:
            self._everywhere = pauses.paused(self.state, EVERY, self.known.now)
        return self._everywhere

    def nobody(self, queue: str) -> str:
        """The kind of the finding that nobody serves a queue; empty if somebody does, or nobody knows."""
        pools = self.known.pools
        if pools is None:
            return ""
        if pools.failing(queue) is not None:
            return "pool_failed"
        return "unserved_queue" if pools.unserved_for(queue, self.known.age) is not None else ""

    def unattended(self, queue: str, kind: str) -> Finding:
        """That nobody serves a queue."""
        pools, waiting = self.known.pools, self.state.queues.length(queue)
        assert pools is not None
        name = pools.failing(queue)
        if name is not None:
            pool = pools.failed[name]
            text = (
                f"Nobody works for queue {queue!r} ({waiting}): the runners of pool {name} fail before they are ready, "
                f"{pool.failures} in a row, the last one with: {brief(pool.error)}"
            )
            evidence = {"pool_id": name, "failures": pool.failures, "error": brief(pool.error), "rollouts": waiting}
            return found(kind, text, queue=queue, **evidence)
        return unserved(pools, queue, waiting, pools.unserved_for(queue, self.known.age) or 0.0)

    def no_runner(self, queue: str, offered: int) -> Finding:
        """That rollouts wait for a runner, of which there are some."""
        known, oldest = self.known, self.oldest()
        waiting = f"{counted(offered, 'rollout waits', 'rollouts wait')} in queue {queue!r}"
        evidence: dict[str, Any] = {"queue": queue, "rollouts": offered, "running": self.running()}
        if known.suspended and known.idle:
            text = (
                f"{waiting}, and {counted(known.suspended, 'process', 'processes')} must show first that they live, "
                "since a claim was not acknowledged"
            )
            return found("runners_silent", text, processes=known.suspended, **evidence)
        resting = self._resting()
        if oldest is None and resting:
            text = (
                f"{waiting}, and nothing runs: {counted(resting, 'runner rests', 'runners rest')}, since preempt= says "
                "that their nodes go away"
            )
            return found("runners_rest", text, runners=resting, **evidence)
        if oldest is None:
            served = len(known.pools.servers.get(queue, ())) if known.pools is not None else 0
            by = f"; {counted(served, 'process serves', 'processes serve')} it" if served else ""
            text = f"{waiting}, and nothing runs: no runner asks for work at the moment{by}"
            return found("runners_busy", text, **evidence)
        entry, said, more = oldest
        text = (
            f"{waiting}, and no runner is free: {counted(self.running(), 'rollout runs', 'rollouts run')}, the oldest "
            f"of them {entry.rollout.rollout_id}, {said}"
        )
        return found("runners_busy", text, **evidence, **more)

    def _resting(self) -> int:
        """How many of the runners that were heard of last rest, as far as they have said so lately."""
        workers, resting = self.state.workers, 0
        for worker_id in islice(reversed(self.state.idle_workers), PLACES):
            worker = workers[worker_id]
            stats = plain_of(worker.heartbeat_stats)
            is_known = worker.last_heartbeat_time is not None and (
                self.known.now - worker.last_heartbeat_time < RESTING_SECONDS
            )
            resting += is_known and isinstance(stats, dict) and stats.get("resting") is True
        return resting

    def suspect(self, rollout_id: str) -> Finding:
        """That a suspect waits for an idle runner."""
        state, entry = self.state, self.state.entries[rollout_id]
        others = len(state.suspects) - 1
        waited = self.known.age - state.suspects[rollout_id]
        text = (
            f"Rollout {rollout_id} was lost with its process {counted(entry.losses, 'time')}, and has waited for "
            f"an idle runner for {lasting(waited)}; any may take it after "
            f"{lasting(state.settings.suspect_patience_seconds)}"
            + (f"; {counted(others, 'other')} wait likewise" if others else "")
        )
        return found("suspect_waits", text, rollout_id=rollout_id, losses=entry.losses, seconds=waited, others=others)

    def of_missing_resources(self) -> Iterator[Told]:
        """Resources that cannot be had, and for which rollouts wait."""
        for resources_id in islice(self.state.resources.missing, QUEUES):
            number = self.state.queues.held_for(resources_id)
            if number:
                yield Told(WAITING, number, self.gone(resources_id))
        yield from self.of_lost_versions()

    def of_lost_versions(self, rollout_id: str | None = None) -> Iterator[Told]:
        """Evaluations whose version cannot be had; or (of a rollout) that of its own."""
        known = self.state.evaluations
        mine = None if rollout_id is None else known.of_rollout(rollout_id)
        lost = [one for one in known.running.values() if one.lost is not None and mine in (None, one)]
        for one in lost[:NAMED]:
            number = one.position * int(one.rule["samples"]) - one.counted
            text = (
                f"Evaluation {one.key} waits for version {one.version} of resources {one.resources_id}, which cannot "
                f"be had ({brief(one.lost or '')}): {counted(number, 'rollout has', 'rollouts have')} not finished"
            )
            evidence = {"evaluation": one.name, "version": one.version, "resources_id": one.resources_id}
            yield Told(WAITING, number, found("evaluation_version_gone", text, rollouts=number, **evidence))

    def share_of_evaluations(self, rollout: Rollout) -> list[Finding]:
        """That a rollout of an evaluation waits, since evaluations have their share."""
        others = self.state.queues.in_line(rollout.queue, PLAIN)
        share, mine, running = claims.share_of(self.state, rollout.rollout_id)
        if not others or mine < max(share * (running + 1), 1):
            return []
        text = (
            f"Rollout {rollout.rollout_id} waits for its evaluation's share: {mine} of {running} rollouts that run are "
            f"of evaluations (eval_share={share:g}), and {counted(others, 'other waits', 'others wait')}"
        )
        evidence = {"rollout_id": rollout.rollout_id, "share": share, "evaluations": mine, "running": running}
        return [found("evaluation_share", text, **evidence)]

    def gone(self, resources_id: str) -> Finding:
        """That resources cannot be had."""
        version, cause = self.state.resources.missing[resources_id]
        number = self.state.queues.held_for(resources_id)
        newest = self.state.resources.newest(resources_id)
        policy = newest.policy_version if newest is not None else None
        which = f"version {version}" + ("" if policy is None else f", policy version {policy},")
        text = (
            f"Resources {resources_id} {which} cannot be had ({brief(cause)}): "
            f"{counted(number, 'rollout waits', 'rollouts wait')} until they are published again"
        )
        evidence = {"resources_id": resources_id, "version": version, "policy_version": policy, "rollouts": number}
        return found("resources_gone", text, **evidence)

    def of_rollout(self, entry: Entry) -> Iterator[Told]:
        """Why a rollout has not finished."""
        rollout = entry.rollout
        rollout_id = rollout.rollout_id
        if rollout.status in FINISHED:
            latest, ended = entry.latest, rollout.end_time
            ago = "" if ended is None else f" {lasting(self.known.now - ended)} ago"
            tried = counted(len(entry.attempts), "attempt")
            text = f"Rollout {rollout_id} has ended{ago}: {rollout.status}, after {tried}"
            if latest is not None and latest.outcome is not None:
                text += f", the last with outcome {latest.outcome}"
            if latest is not None and latest.error:
                text += f": {brief(latest.error)}"
            evidence = {"status": rollout.status, "outcome": latest.outcome if latest is not None else None}
            yield Told(NOTHING, 0, found("rollout_finished", text, rollout_id=rollout_id, **evidence))
        elif rollout_id in self.state.queues:
            yield from self.of_waiting(entry)
        else:
            said, evidence = self.at_work(entry)
            yield Told(TRAINING, 0, found("rollout_runs", f"Rollout {rollout_id} has not ended: {said}", **evidence))

    def of_waiting(self, entry: Entry) -> list[Told]:
        """What holds up a rollout that waits in a queue: its own reason first, then those of its queue."""
        state, rollout = self.state, entry.rollout
        queues = state.queues
        waits_for = queues.waits_for(rollout.rollout_id)
        feed = state.feeds.by_group.get(rollout.group_id or "")
        own: list[Finding] = []
        if waits_for in (CLOSED, NO_SLOT):
            own = [one.finding for one in self.closed(feed)] + self.no_slot(feed) if feed is not None else []
        elif waits_for == LOST:
            own = [told.finding for told in self.of_lost_versions(rollout.rollout_id)]
        elif waits_for is not None:
            own = [self.gone(waits_for)]
        elif rollout.rollout_id in state.suspects:
            own = [self.suspect(rollout.rollout_id)]
        own += retries.why_it_backs_off(state, entry, self.known.now)
        is_offered = not own
        if is_offered and queues.is_evaluated(rollout.rollout_id):
            own += self.share_of_evaluations(rollout)
        gate = self.at_the_gate(rollout.queue, 1 if is_offered else 0)
        return [*(Told(WAITING, 1, one) for one in own), *gate]

    def of_group(self, group: GroupEntry) -> list[Told]:
        """Why a group is not complete."""
        if not group.is_open:
            ended = "" if group.end_time is None else f" for {lasting(self.known.now - group.end_time)}"
            because = f": {brief(group.why)}" if group.why else ""
            text = f"Group {group.group_id} is not open any more; it is {group.status}{ended}{because}"
            evidence = {"group_id": group.group_id, "status": group.status}
            return [Told(NOTHING, 0, found("group_ended", text, **evidence))]
        waiting, finding = self.waits_for_member(group)
        told = [Told(TRAINING, 0, finding)]
        return [*self.of_waiting(waiting), *told] if waiting is not None else told

    def waits_for_member(self, group: GroupEntry, before: str = "") -> tuple[Entry | None, Finding]:
        """What a group waits for; and the first of its members that waits in a queue, if one does."""
        state = self.state
        live = [i for i in islice(group.places, MEMBERS) if group.members.get(i) == LIVE and i in state.entries]
        queued = next((state.entries[i] for i in live if i in state.queues), None)
        running = [state.entries[i] for i in live if i not in state.queues]
        evidence: dict[str, Any] = {"group_id": group.group_id, "missing": group.missing, "n": group.n}
        text = f"{before}Group {group.group_id} has {group.n - group.missing} of {group.n}, and waits for "
        if queued is not None:
            rollout = queued.rollout
            evidence |= {"rollout_id": rollout.rollout_id, "queue": rollout.queue}
            waits = f"which waits in queue {rollout.queue!r} ({lasting(self.known.now - rollout.start_time)} old)"
            text += f"rollout {rollout.rollout_id}, {waits}"
        elif running:
            oldest = min(running, key=_began)
            said, more = self.at_work(oldest)
            evidence |= more
            text += f"rollout {oldest.rollout.rollout_id}, {said}"
        else:
            text += counted(group.missing, "more rollout")
        if group.deadline is not None:
            left = group.deadline + state.paused - self.known.now
            rests = ", which rests while members are held back" if group.rests_since is not None else ""
            text += f"; its deadline is in {lasting(left)}{rests}"
        return queued, found("group_waits", text, **evidence)

    def closed(self, feed: FeedEntry) -> list[Told]:
        """Why a feed hands out nothing, or gives nothing, until somebody does something."""
        told = []
        refusal, held = feed.refusal(), self.state.queues.held_for(CLOSED)
        if isinstance(refusal, FailureBudgetError):
            errors = [
                f"{count:,} x {brief(error)} (as {rollout_id})" for error, count, rollout_id in refusal.errors[:3]
            ]
            text = (
                f"Feed {feed.name!r} is paused: {refusal.why}. The commonest errors: {'; '.join(errors) or 'not known'}"
            )
            told.append(Told(STOPPED, held, found("budget_spent", text, consumer=feed.name, why=refusal.why)))
        elif refusal is not None:
            text = (
                f"Feed {feed.name!r} gives no batch: {feed.filtered} groups in a row were filtered, and max_filtered "
                f"is {feed.rule['max_filtered']}. The last one: {brief(feed.filtered_why)}"
            )
            told.append(
                Told(STOPPED, held, found("filtered_too_many", text, consumer=feed.name, filtered=feed.filtered))
            )
        if feed.version is None:
            when = "since its restore" if feed.branch else "yet"
            wait = f"; {counted(held, 'rollout waits', 'rollouts wait')} for that" if held else ""
            text = f"Nothing was published to feed {feed.name!r} {when}, and it hands out nothing before{wait}"
            told.append(Told(WAITING, max(held, 1), found("not_published", text, consumer=feed.name, rollouts=held)))
        return told

    def no_slot(self, feed: FeedEntry) -> list[Finding]:
        """That as many rollouts of a feed run, or are offered, as may."""
        limit, held = feed.rule["max_running"], self.state.queues.held_for(NO_SLOT)
        if limit is None or not held or len(feed.slots) < limit or feed.is_closed:
            return []
        text = (
            f"Feed {feed.name!r} has reached max_running={limit}: {counted(held, 'rollout waits', 'rollouts wait')} "
            f"until another one ends"
        )
        return [found("limit_reached", text, consumer=feed.name, max_running=limit, rollouts=held)]


def _began(entry: Entry) -> float:
    """When what a rollout runs began."""
    return entry.latest.start_time if entry.latest is not None else entry.rollout.start_time
