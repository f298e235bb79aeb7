"""Operations that are the service's own: those that may wait for their answer, and those about the process.

One table, as for the verbs of the core: what may wait is answered at once if it can be, and parked if not.
Not here: waking what is parked (`service`), decisions (`core`).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from raystore.core import bounds, check, verbs
from raystore.core.counts import counts
from raystore.core.requests import Filters, Mode, Trainable
from raystore.core.schema import Id, Positive, Rule, Seconds, Tags, Text, Whole
from raystore.core.state import State, Step
from raystore.core.verb import Verb
from raystore.errors import InvalidValueError
from raystore.options import resident_bytes
from raystore.service.clock import ManualClock
from raystore.service.waiters import Deliver
from raystore.tracing.losses import Reason

if TYPE_CHECKING:
    from raystore.service.service import Service

FOR_EVER_SECONDS = 1e9  #: who waits for longer waits without a limit

PARKED: Any = object()  #: answer of a call that waits; the real one goes to its `deliver`


@dataclass(slots=True)
class Asked:
    """Who asked, and how to answer later."""

    step: Step
    ticket: int
    deliver: Deliver

    @property
    def session_id(self) -> str:
        """The session that asked."""
        assert self.step.session is not None
        return self.step.session.session_id


# -- what may wait -----------------------------------------------------------------------------------------------------


def _dequeue(
    service: Service,
    asked: Asked,
    *,
    queues: list[Id],
    limit: int,
    worker_id: Id | None,
    timeout: Seconds = 0.0,
    of: int | None = None,
) -> Any:
    wanted = {"queues": queues, "limit": limit, "worker_id": worker_id}
    service.pools.asked(asked.session_id, queues)
    claimed = verbs.VERBS["dequeue"].run(service.state, asked.step, **wanted, timeout=timeout, of=of)
    return _park(service, asked, "dequeue", wanted, timeout) if claimed is None else claimed


def _take(
    service: Service,
    asked: Asked,
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
) -> Any:
    wanted = {"consumer": consumer, "count": count, "max_open": max_open}
    filters = {"mode": mode, "tags": tags, "queue": queue, "group_id": group_id, "status_in": status_in}
    taken = verbs.VERBS["take"].run(service.state, asked.step, **wanted, **filters, timeout=timeout, of=of)
    return _park(service, asked, "take", wanted, timeout) if taken is None else taken


def _wait(service: Service, asked: Asked, *, rollout_ids: list[Id], timeout: float | None) -> Any:
    missing = unfinished(service.state, rollout_ids)
    if not missing or service.stands_still or (timeout is not None and timeout <= 0):
        return finished(service.state, rollout_ids)
    return _park(service, asked, "wait", {"rollout_ids": rollout_ids}, timeout, missing)


def _sort_out(service: Service, asked: Asked, *, rollout_ids: list[Id], instead_of: Whole | None = None) -> Any:
    """What is finished of these, and where the completion log stands, and what is not: all of one moment.

    With a token by which `completed` can be asked for what finishes of the rest, in the place of an earlier one.
    """
    if instead_of is not None:
        service.watches.drop(instead_of)
    done, cursor = finished(service.state, rollout_ids)
    done.sort(key=lambda pair: service.state.completions.place(pair[0].rollout_id))
    rest = unfinished(service.state, rollout_ids)
    return done, (cursor, rest, service.watches.keep(asked.session_id, rest) if rest else None)


def _completed(
    service: Service,
    asked: Asked,
    *,
    cursor: Whole | None,
    limit: Positive,
    timeout: Seconds,
    filters: Filters,
    among: Whole | None = None,
) -> Any:
    wanted: dict[str, Any] = {
        "limit": limit,
        "filters": filters,
        "among": None if among is None else service.watches.find(among),
    }
    items, cursor = verbs.completed_after(service.state, cursor, **wanted)
    if items or service.stands_still or timeout <= 0:
        return items, cursor
    return _park(service, asked, "completed", wanted | {"cursor": cursor}, timeout)


def _changes(
    service: Service, asked: Asked, *, cursor: Whole | None, kinds: list[str] | None, limit: Positive, timeout: Seconds
) -> Any:
    items, cursor = verbs.changes_after(service.state, cursor, kinds, limit)
    if items or service.stands_still or timeout <= 0:
        return items, cursor
    return _park(service, asked, "changes", {"cursor": cursor, "kinds": kinds, "limit": limit}, timeout)


def _park(
    service: Service,
    asked: Asked,
    verb: str,
    arguments: dict[str, Any],
    timeout: float | None,
    missing: list[str] | None = None,
) -> Any:
    bounds.admit("calls that wait", len(service.waiters), bounds.WAITERS)
    deadline = None if timeout is None or timeout > FOR_EVER_SECONDS else asked.step.now + timeout
    parked = service.waiters.park(
        asked.session_id, asked.ticket, verb, arguments, deadline, asked.deliver, missing or ()
    )
    service.refuse_what_never_comes(parked)
    return PARKED


def _report_pool(
    service: Service, asked: Asked, *, pool_id: Id, queues: list[Id], failures: Whole, error: Text | None
) -> None:
    """The runners of a pool fail before they are ready, or (without an error) one is ready."""
    service.pools.report(pool_id, asked.session_id, queues, failures, error)
    service.refuse_what_never_comes()


def _report_spans_lost(service: Service, asked: Asked, *, counts: dict[Reason, Positive]) -> None:
    """A runner has counted what traces lack since its last report."""
    service.spans_lost.update(counts)


def _cancel_wait(service: Service, asked: Asked, *, of: int) -> bool:
    waiter = service.waiters.find(asked.session_id, of)
    if waiter is not None:
        service.waiters.remove(waiter)
    return waiter is not None


def finished(state: State, rollout_ids: list[str]) -> tuple[list[verbs.Pair], int]:
    """Those that are finished, and where the completion log stands."""
    return verbs.finished_among(state, rollout_ids), state.completions.last


def unfinished(state: State, rollout_ids: list[str]) -> list[str]:
    """Those that exist and are not finished."""
    completions, entries = state.completions, state.entries
    return [i for i in rollout_ids if i not in completions and i in entries]


Moment = Annotated[float, Rule("0 <= {v} < 1e12", "a number of seconds, 0 or more")]

# -- others ------------------------------------------------------------------------------------------------------------


def _statistics(service: Service, asked: Asked) -> dict[str, Any]:
    return counts(service.state) | {
        "uptime": time.monotonic() - service.started,
        "memory_capacity_bytes": service.capacity_bytes,
        "waiters": len(service.waiters),
        "operations": service.operations,
        "actor_calls": service.actor_calls,
        "overloads": service.overloads,
        "unserved_queues": service.pools.unserved(service.state.queues.lengths(), service.clock.age()),
        "spans_lost": dict(service.spans_lost),
        "last_eviction_seconds": service.last_eviction_seconds,
        "cpu_seconds": time.process_time(),
        "rss_bytes": resident_bytes(),
        "journal": service.keeper.statistics() if service.keeper is not None else None,
    }


def _story(service: Service, asked: Asked, *, rollout_id: Id) -> list[str]:
    told = check.story(service.state, rollout_id)
    if rollout_id in service.state.queues:
        queue = service.state.entries[rollout_id].rollout.queue
        if (seconds := service.pools.unserved({queue: 1}, service.clock.age()).get(queue)) is not None:
            told.append(f"waits in queue {queue!r}, of which no process has asked for work for {seconds:.0f} s")
    return told


def _check(service: Service, asked: Asked) -> None:
    check.check(service.state)


def _tick(service: Service, asked: Asked, *, seconds: Moment, sessions: bool) -> None:
    if not isinstance(service.clock, ManualClock):
        raise InvalidValueError("clock", service.config.clock, "a store started with clock='manual'")
    service.clock.tick(seconds, sessions=sessions)
    service.advance()


SHELL: dict[str, Verb] = {
    "dequeue": Verb(_dequeue),
    "take": Verb(_take),
    "wait": Verb(_wait, changes=False),
    "sort_out": Verb(_sort_out, changes=False),
    "completed": Verb(_completed, changes=False),
    "changes": Verb(_changes, changes=False),
    "cancel_wait": Verb(_cancel_wait, changes=False),
    "report_pool": Verb(_report_pool, changes=False),
    "report_spans_lost": Verb(_report_spans_lost, changes=False),
    "statistics": Verb(_statistics, changes=False),
    "story": Verb(_story, changes=False),
    "check": Verb(_check, changes=False),
    "tick": Verb(_tick, changes=False),
}
