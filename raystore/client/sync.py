"""The contract as blocking calls, `store.sync`.

They take effect in order with the calls that are awaited, and may be used inside a running event loop, which they
block. `raystore.api.LightningStore` says what each method means.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

from raystore.api import LightningStore
from raystore.client.transport import iterate_blocking, run_blocking

P = ParamSpec("P")
T = TypeVar("T")


def blocking(
    method: Callable[Concatenate[Any, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[SyncStore, P], T]:
    """The twin of a method, with its signature and text."""

    @wraps(method)
    def twin(self: SyncStore, *args: P.args, **kwargs: P.kwargs) -> T:
        return run_blocking(getattr(self._store, method.__name__)(*args, **kwargs))

    return twin


def iterating(
    method: Callable[Concatenate[Any, P], AsyncIterator[T]],
) -> Callable[Concatenate[SyncStore, P], Iterator[T]]:
    """The twin of a method that gives one answer after another."""

    @wraps(method)
    def twin(self: SyncStore, *args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        return iterate_blocking(getattr(self._store, method.__name__)(*args, **kwargs))

    return twin


class SyncStore:
    """Blocking twins of a store's methods."""

    def __init__(self, store: LightningStore) -> None:
        self._store = store

    statistics = blocking(LightningStore.statistics)
    metrics = blocking(LightningStore.metrics)
    story = blocking(LightningStore.story)
    why = blocking(LightningStore.why)
    check = blocking(LightningStore.check)
    start_rollout = blocking(LightningStore.start_rollout)
    enqueue_rollout = blocking(LightningStore.enqueue_rollout)
    enqueue_many_rollouts = blocking(LightningStore.enqueue_many_rollouts)
    enqueue_group = blocking(LightningStore.enqueue_group)
    enqueue_many_groups = blocking(LightningStore.enqueue_many_groups)
    get_group = blocking(LightningStore.get_group)
    query_groups = blocking(LightningStore.query_groups)
    dequeue_rollout = blocking(LightningStore.dequeue_rollout)
    dequeue_many_rollouts = blocking(LightningStore.dequeue_many_rollouts)
    query_rollouts = blocking(LightningStore.query_rollouts)
    get_rollout_by_id = blocking(LightningStore.get_rollout_by_id)
    update_rollout = blocking(LightningStore.update_rollout)
    cancel_rollouts = blocking(LightningStore.cancel_rollouts)
    requeue = blocking(LightningStore.requeue)
    release = blocking(LightningStore.release)
    delete_rollouts = blocking(LightningStore.delete_rollouts)
    wait_for_rollouts = blocking(LightningStore.wait_for_rollouts)
    wait_for_rollout = blocking(LightningStore.wait_for_rollout)
    as_completed = iterating(LightningStore.as_completed)
    completed = blocking(LightningStore.completed)
    changes = blocking(LightningStore.changes)
    pause = blocking(LightningStore.pause)
    resume = blocking(LightningStore.resume)
    limit_queue = blocking(LightningStore.limit_queue)
    start_attempt = blocking(LightningStore.start_attempt)
    query_attempts = blocking(LightningStore.query_attempts)
    get_latest_attempt = blocking(LightningStore.get_latest_attempt)
    update_attempt = blocking(LightningStore.update_attempt)
    get_next_span_sequence_id = blocking(LightningStore.get_next_span_sequence_id)
    get_many_span_sequence_ids = blocking(LightningStore.get_many_span_sequence_ids)
    add_span = blocking(LightningStore.add_span)
    add_many_spans = blocking(LightningStore.add_many_spans)
    add_otel_span = blocking(LightningStore.add_otel_span)
    query_spans = blocking(LightningStore.query_spans)
    query_many_spans = blocking(LightningStore.query_many_spans)
    take = blocking(LightningStore.take)
    take_groups = blocking(LightningStore.take_groups)
    ack = blocking(LightningStore.ack)
    nack = blocking(LightningStore.nack)
    checkpoint = blocking(LightningStore.checkpoint)
    rewind = blocking(LightningStore.rewind)
    forget_consumer = blocking(LightningStore.forget_consumer)
    ledger = blocking(LightningStore.ledger)
    evaluate = blocking(LightningStore.evaluate)
    evaluations = blocking(LightningStore.evaluations)
    drop_evaluation = blocking(LightningStore.drop_evaluation)
    selection_report = blocking(LightningStore.selection_report)
    add_resources = blocking(LightningStore.add_resources)
    update_resources = blocking(LightningStore.update_resources)
    get_resources_by_id = blocking(LightningStore.get_resources_by_id)
    get_latest_resources = blocking(LightningStore.get_latest_resources)
    query_resources = blocking(LightningStore.query_resources)
    delete_resources = blocking(LightningStore.delete_resources)
    query_workers = blocking(LightningStore.query_workers)
    get_worker_by_id = blocking(LightningStore.get_worker_by_id)
    update_worker = blocking(LightningStore.update_worker)
