"""Worker records: what each runner is doing, as far as the store was told.

Of workers that are not busy the newest 10,000 are kept: names of runners that ended long ago would only grow.
A worker follows the attempts that name it, but only those it is busy with: a late report of an old attempt says nothing
about a worker that has moved on.
Not here: sessions, which are processes and hold attempts (`claims`).
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

from raystore.core import queries
from raystore.core.lifecycle import ACTIVE, WorkerStatus, is_busy, is_idle, worker_after
from raystore.core.payload import size_of
from raystore.core.records import Attempt, Many, Worker
from raystore.core.schema import Id, Logic, SortOrder, WorkerChanges
from raystore.core.state import IDLE_WORKERS, State, Step, require_room

WORKERS = 100_000  #: records of runners


def admit(state: State, worker_id: str | None) -> None:
    """Refuse a worker that is new when there are too many."""
    if worker_id is not None and worker_id not in state.workers:
        require_room("workers", len(state.workers), WORKERS)


def update(state: State, step: Step, *, worker_id: Id, changes: WorkerChanges) -> Worker:
    """A heartbeat of a worker, with statistics if given; never changes its status."""
    admit(state, worker_id)
    return state.put_worker(worker_id, last_heartbeat_time=step.now, **changes)


def came_away_empty(state: State, step: Step, worker_id: str) -> None:
    """A worker asked for work and there was none."""
    worker = state.workers.get(worker_id)
    if worker is not None and is_idle(worker):
        state.put_worker(worker_id, last_dequeue_time=step.now)
    else:
        _follow(state, worker_id, "idle", None, last_dequeue_time=step.now, last_idle_time=step.now)


def follow(state: State, step: Step, attempt: Attempt) -> None:
    """Let the worker that an attempt names follow the attempt's status."""
    worker_id = attempt.worker_id
    assert worker_id is not None
    worker = state.workers.get(worker_id)
    current = (worker.current_rollout_id, worker.current_attempt_id) if worker else (None, None)
    if attempt.status in ACTIVE:
        _follow(state, worker_id, worker_after(attempt.status), attempt, last_busy_time=step.now)
    elif current in ((attempt.rollout_id, attempt.attempt_id), (None, None)):
        _follow(state, worker_id, worker_after(attempt.status), None, last_idle_time=step.now)


def _follow(state: State, worker_id: str, status: str, attempt: Attempt | None, **stamps: Any) -> None:
    state.put_worker(
        worker_id,
        status=status,
        current_rollout_id=attempt.rollout_id if attempt else None,
        current_attempt_id=attempt.attempt_id if attempt else None,
        **stamps,
    )


def surplus(state: State) -> list[str]:
    """The workers that are not busy and were not heard of for the longest time, beyond those that are kept."""
    return list(islice(state.idle_workers, max(len(state.idle_workers) - IDLE_WORKERS, 0)))


def forget(state: State, step: Step, worker_ids: Iterable[str]) -> None:
    """Drop the records of workers."""
    for worker_id in worker_ids:
        worker = state.workers.get(worker_id)
        if worker is not None and not is_busy(worker):
            del state.workers[worker_id]
            state.idle_workers.pop(worker_id, None)
            state.payload_bytes -= size_of(worker.heartbeat_stats)


def get(state: State, step: Step, *, worker_id: Id) -> Worker | None:
    """The record of a worker, if there is one."""
    return state.workers.get(worker_id)


def query(
    state: State,
    step: Step,
    *,
    status_in: list[WorkerStatus] | None,
    worker_id_contains: str | None,
    filter_logic: Logic,
    sort_by: str | None,
    sort_order: SortOrder,
    limit: int,
    offset: int,
) -> Many:
    """One page of workers, and how many match in all."""
    conditions = []
    if status_in is not None:
        conditions.append(queries.is_in("status", status_in))
    if worker_id_contains is not None:
        conditions.append(queries.contains("worker_id", worker_id_contains))
    matches = queries.select(state.workers.values(), conditions, filter_logic)
    matches = queries.arrange(matches, sort_by, sort_order, queries.WORKER_SORT)
    return Many(queries.page(matches, limit, offset), len(matches))
