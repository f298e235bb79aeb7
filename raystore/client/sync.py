"""The contract as blocking calls, `store.sync`.

They take effect in order with the calls that are awaited, and may be used inside a running event loop, which they
block. `raystore.api.LightningStore` says what each method means.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from functools import wraps
from typing import Any, Concatenate, Final, ParamSpec, TypeVar

from raystore.api import LightningStore
from raystore.client.transport import iterate_blocking, run_blocking

P = ParamSpec("P")
T = TypeVar("T")


def blocking(
    method: Callable[Concatenate[Any, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[SyncStore, P], T]:
    """The twin of a method, with its signature and text."""

    @wraps(method)
    def twin(self: SyncStore, /, *args: P.args, **kwargs: P.kwargs) -> T:
        call: Coroutine[Any, Any, T] = getattr(self._store, method.__name__)(*args, **kwargs)
        return run_blocking(call)

    return twin


def iterating(
    method: Callable[Concatenate[Any, P], AsyncIterator[T]],
) -> Callable[Concatenate[SyncStore, P], Iterator[T]]:
    """The twin of a method that gives one answer after another."""

    @wraps(method)
    def twin(self: SyncStore, /, *args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        return iterate_blocking(getattr(self._store, method.__name__)(*args, **kwargs))

    return twin


class SyncStore:
    """Blocking twins of a store's methods."""

    def __init__(self, store: LightningStore) -> None:
        self._store = store

    statistics: Final = blocking(LightningStore.statistics)
    metrics: Final = blocking(LightningStore.metrics)
    story: Final = blocking(LightningStore.story)
    why: Final = blocking(LightningStore.why)
    check: Final = blocking(LightningStore.check)
    start_rollout: Final = blocking(LightningStore.start_rollout)
    enqueue_rollout: Final = blocking(LightningStore.enqueue_rollout)
    enqueue_many_rollouts: Final = blocking(LightningStore.enqueue_many_rollouts)
    enqueue_group: Final = blocking(LightningStore.enqueue_group)
    enqueue_many_groups: Final = blocking(LightningStore.enqueue_many_groups)
    get_group: Final = blocking(LightningStore.get_group)
    query_groups: Final = blocking(LightningStore.query_groups)
    dequeue_rollout: Final = blocking(LightningStore.dequeue_rollout)
    dequeue_many_rollouts: Final = blocking(LightningStore.dequeue_many_rollouts)
    query_rollouts: Final = blocking(LightningStore.query_rollouts)
    get_rollout_by_id: Final = blocking(LightningStore.get_rollout_by_id)
    update_rollout: Final = blocking(LightningStore.update_rollout)
    cancel_rollouts: Final = blocking(LightningStore.cancel_rollouts)
    requeue: Final = blocking(LightningStore.requeue)
    release: Final = blocking(LightningStore.release)
    delete_rollouts: Final = blocking(LightningStore.delete_rollouts)
    wait_for_rollouts: Final = blocking(LightningStore.wait_for_rollouts)
    wait_for_rollout: Final = blocking(LightningStore.wait_for_rollout)
    as_completed: Final = iterating(LightningStore.as_completed)
    completed: Final = blocking(LightningStore.completed)
    changes: Final = blocking(LightningStore.changes)
    pause: Final = blocking(LightningStore.pause)
    resume: Final = blocking(LightningStore.resume)
    limit_queue: Final = blocking(LightningStore.limit_queue)
    start_attempt: Final = blocking(LightningStore.start_attempt)
    query_attempts: Final = blocking(LightningStore.query_attempts)
    get_latest_attempt: Final = blocking(LightningStore.get_latest_attempt)
    update_attempt: Final = blocking(LightningStore.update_attempt)
    get_next_span_sequence_id: Final = blocking(LightningStore.get_next_span_sequence_id)
    get_many_span_sequence_ids: Final = blocking(LightningStore.get_many_span_sequence_ids)
    add_span: Final = blocking(LightningStore.add_span)
    add_many_spans: Final = blocking(LightningStore.add_many_spans)
    add_otel_span: Final = blocking(LightningStore.add_otel_span)
    query_spans: Final = blocking(LightningStore.query_spans)
    query_many_spans: Final = blocking(LightningStore.query_many_spans)
    take: Final = blocking(LightningStore.take)
    take_groups: Final = blocking(LightningStore.take_groups)
    ack: Final = blocking(LightningStore.ack)
    nack: Final = blocking(LightningStore.nack)
    checkpoint: Final = blocking(LightningStore.checkpoint)
    rewind: Final = blocking(LightningStore.rewind)
    forget_consumer: Final = blocking(LightningStore.forget_consumer)
    ledger: Final = blocking(LightningStore.ledger)
    evaluate: Final = blocking(LightningStore.evaluate)
    evaluations: Final = blocking(LightningStore.evaluations)
    drop_evaluation: Final = blocking(LightningStore.drop_evaluation)
    selection_report: Final = blocking(LightningStore.selection_report)
    add_resources: Final = blocking(LightningStore.add_resources)
    update_resources: Final = blocking(LightningStore.update_resources)
    get_resources_by_id: Final = blocking(LightningStore.get_resources_by_id)
    get_latest_resources: Final = blocking(LightningStore.get_latest_resources)
    query_resources: Final = blocking(LightningStore.query_resources)
    delete_resources: Final = blocking(LightningStore.delete_resources)
    query_workers: Final = blocking(LightningStore.query_workers)
    get_worker_by_id: Final = blocking(LightningStore.get_worker_by_id)
    update_worker: Final = blocking(LightningStore.update_worker)
