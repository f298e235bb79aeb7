"""Stores on Ray: start one, connect to one, list them, stop one. A store is a named actor."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raystore.config import DEFAULT_JOURNAL_OBJECT_BYTES, StoreConfig
from raystore.errors import (
    InvalidValueError,
    NotAStoreError,
    StoreError,
    StoreExistsError,
    StoreNotFoundError,
)
from raystore.errors.calls import explained
from raystore.journal.opening import checked_directory
from raystore.options import make_config
from raystore.remote.actor import StoreActor
from raystore.remote.handshake import check_connection, describe, find_actor, is_store, join_cluster, store_info
from raystore.remote.store import RayLightningStore, end, own
from raystore.types import RolloutConfig, Span, StoreInfo
from raystore.wire.checks import identifier

logger: logging.Logger = logging.getLogger("raystore")

NAMESPACE = "raystore"

MAX_CONCURRENCY = 40_000  #: calls at once: a session may park a listen call and early batches; for 10,000 sessions


@explained
def start(
    name: str | None = None,
    *,
    namespace: str = NAMESPACE,
    address: str | None = None,
    detached: bool = False,
    exist: str = "error",
    eviction_memory_threshold: float | int | None = None,
    safe_memory_threshold: float | int | None = None,
    span_size_estimator: Callable[[Span], int] | None = None,
    default_config: RolloutConfig | None = None,
    duplicate_spans: str = "reject",
    on_memory_full: str = "evict",
    max_deliveries: int = 3,
    suspect_patience_seconds: float = 10.0,
    max_queued: int | None = None,
    retention: float | int | dict[str, Any] | None = None,
    keep_resources: int | None = None,
    limits: dict[str, int] | None = None,
    consumers: Sequence[str] | Mapping[str, Mapping[str, Any] | None] | None = None,
    clock: str = "system",
    journal: str | os.PathLike[str] | None = None,
    durability: str = "power",
    resume: str = "auto",
    journal_object_bytes: int = DEFAULT_JOURNAL_OBJECT_BYTES,
    actor_options: dict[str, Any] | None = None,
) -> RayLightningStore:
    """Start a store on Ray and return a client of it.

    Args:
        name: of the store; None makes one up.
        namespace: of Ray's, in which the name is unique.
        address: of the cluster. Ray's own order applies: this argument, RAY_ADDRESS, a running local cluster, else one
            is started. Without effect if this process is connected already.
        detached: let the store outlive this process, until `stop`. By default it ends with it.
        exist: what to do if the name exists: "error", or "attach" if the configuration is the same.
        eviction_memory_threshold: above it whole rollouts lose their spans; a float is a ratio of the memory capacity,
            an int is bytes. Default 0.7.
        safe_memory_threshold: down to it; likewise. Default 0.8 of the eviction threshold.
        span_size_estimator: counts bytes of a span, in the process that adds it; then only spans count.
        default_config: of rollouts that are enqueued without one.
        duplicate_spans: "reject" or "keep" a span whose id its attempt has already.
        on_memory_full: "evict", or "pause": evict released rollouts only, and hand out no work until below the safe
            threshold.
        max_deliveries: how often a rollout may be aborted, or lost with its process and be to blame, before it fails.
            To blame is what was lost alone, or, of what was lost together, what had been lost most often before.
        suspect_patience_seconds: how long a rollout that was lost with its process waits for a process that runs
            nothing else; then any gets it. A process takes no other work for one for as long at most.
        max_queued: rollouts that may wait; above it, enqueuing raises `OverloadedError`.
        retention: delete finished rollouts that were released or read: an age in seconds, or
            {"max_age_seconds": ..., "max_rollouts": ...}.
        keep_resources: newest resources ids to keep; older ones go when nobody refers to them. Default: all stay.
        limits: bytes of one value, span and call: {"value_bytes", "span_bytes", "call_bytes"}.
        consumers: names of those who will `take`, so that what they await is kept for them from the start; or of each
            name its filter, as arguments of `take`: {"trainer": {"mode": "train"}}. Outside it nothing is kept for it.
        clock: "system", or "manual" for tests (`store.testing.tick`).
        journal: a directory, in which everything that happens is written down; a store that is started there again goes
            on where it was, and an actor that dies is restarted by Ray and does the same. It must be reachable from
            every node on which the actor may be placed.
        durability: when an answer may leave: "power": once what it says is on disk; "process": once the system has it
            (a crash of the process loses nothing, one of the machine the newest); "none": at once.
        resume: "auto": go on with the run in `journal` if it is of a store of this name, else begin one; "must": go on
            with the run that is there; "never": begin one, in an empty directory.
        journal_object_bytes: objects of resources up to this size are kept in the journal, too, and outlive the process
            that published them; of larger ones what waits for them is held back after a crash, until they are published
            again. 0 keeps none.
        actor_options: for Ray, e.g. {"scheduling_strategy": ..., "runtime_env": ...}.

    Raises:
        StoreExistsError: the name exists, or exists with another configuration.
        InvalidValueError, ValueError: an option has a value that is not valid.
        JournalError: the journal is missing, damaged, in use, or of another run.
    """
    if exist not in ("error", "attach"):
        raise InvalidValueError("exist", exist, "'error' or 'attach'")
    config = make_config(
        eviction_memory_threshold=eviction_memory_threshold,
        safe_memory_threshold=safe_memory_threshold,
        span_size_estimator=span_size_estimator,
        default_config=default_config,
        duplicate_spans=duplicate_spans,
        on_memory_full=on_memory_full,
        max_deliveries=max_deliveries,
        suspect_patience_seconds=suspect_patience_seconds,
        max_queued=max_queued,
        retention=retention,
        keep_resources=keep_resources,
        limits=limits,
        consumers=consumers,
        clock=clock,
        journal=journal,
        durability=durability,
        resume=resume,
        journal_object_bytes=journal_object_bytes,
    )
    if name is not None:
        identifier("name", name)
    if config.journal is not None and not actor_options:  # else the store may be on a node that has other directories
        checked_directory(config.journal)
    join_cluster(address)
    if name is None:
        name = f"store-{secrets.token_hex(4)}"
    if (existing := find_actor(name, namespace)) is not None:
        return _take_existing(existing, name, namespace, exist, config)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    options: dict[str, Any] = {
        "name": name,
        "namespace": namespace,
        "lifetime": "detached" if detached else None,
        "num_cpus": 0,
        "memory": 1,  # a byte: Ray asks any node to place an actor without requirements, and that one ignores `here`
        # Without a journal it would come back empty, and a store that only looks alive is worse than a dead one.
        "max_restarts": 0 if config.journal is None else -1,
        "max_task_retries": 0,  # clients retry, with an identity
        "max_concurrency": MAX_CONCURRENCY,
        "enable_task_events": False,
        # The default scheduler may choose a node that goes away sooner than the driver's.
        "scheduling_strategy": here,
    } | (actor_options or {})
    try:
        handle = ray.remote(StoreActor).options(**options).remote(config, name, namespace, resume=resume)
    except ValueError:  # somebody else started one of this name in the same moment
        existing = find_actor(name, namespace)
        if existing is None:
            raise
        return _take_existing(existing, name, namespace, exist, config)
    if not detached:
        own(handle)
    try:
        store = RayLightningStore(handle, owns=not detached)
    except StoreError:  # it could not begin, or not go on
        end(handle)
        raise
    known = store._known
    logger.info(
        "Started store %r in namespace %r: memory capacity %d bytes, eviction above %d, down to %d",
        name, namespace, known["capacity_bytes"], known["eviction_bytes"], known["safe_bytes"],
    )  # fmt: skip
    for remark in known["remarks"]:
        logger.warning("Store %r: %s", name, remark)
    return store


def _take_existing(existing: Any, name: str, namespace: str, exist: str, config: StoreConfig) -> RayLightningStore:
    if exist == "error":
        raise StoreExistsError(name, namespace, [])
    store = RayLightningStore(existing)
    differing = config.differences(store._known["config"])
    if differing:
        store.close()
        raise StoreExistsError(name, namespace, differing)
    return store


@explained
def connect(name: str | None = None, *, namespace: str = NAMESPACE, address: str | None = None) -> RayLightningStore:
    """Return a client of a running store; without a name, of the only one there is.

    Raises `StoreNotFoundError`, which lists what there is, and `NotAStoreError` for another kind of actor.
    """
    join_cluster(address)
    if name is None:
        names = _store_names(namespace)
        if len(names) != 1:
            raise StoreNotFoundError(None, namespace, names)
        name = names[0]
    handle = find_actor(name, namespace)
    if handle is None:
        raise StoreNotFoundError(name, namespace, _store_names(namespace))
    return RayLightningStore(handle)


@explained
def list_stores(*, namespace: str | None = NAMESPACE, address: str | None = None) -> list[StoreInfo]:
    """The stores that run, by name; `namespace` None lists all namespaces."""
    join_cluster(address)
    found = []
    for actor in _named_actors():
        if namespace is None or actor["namespace"] == namespace:
            handle = find_actor(actor["name"], actor["namespace"])
            if handle is not None and is_store(handle):
                try:
                    found.append(store_info(describe(handle, waits=False)))
                except StoreError as error:  # one that is ending, or of another version, must not hide the others
                    logger.warning("Left out of the list: %s", error)
    return sorted(found, key=lambda info: info.name or "")


@explained
def stop(name: str | RayLightningStore, *, namespace: str = NAMESPACE, address: str | None = None) -> None:
    """End a store, whoever started it; what it holds is gone.

    Raises `StoreNotFoundError` and `NotAStoreError`.
    """
    if isinstance(name, RayLightningStore):
        check_connection()
        name._transport.close()
        end(name.actor)
        name._owns = False
        return
    identifier("name", name)
    join_cluster(address)
    handle = find_actor(name, namespace)
    if handle is None:
        raise StoreNotFoundError(name, namespace, _store_names(namespace))
    if not is_store(handle):
        raise NotAStoreError(f"The actor {name!r} in namespace {namespace!r}")
    end(handle)


def _named_actors() -> list[dict[str, str]]:
    actors: list[dict[str, str]] = ray.util.list_named_actors(all_namespaces=True)
    return actors


def _store_names(namespace: str) -> list[str]:
    names = [actor["name"] for actor in _named_actors() if actor["namespace"] == namespace]
    return sorted(name for name in names if is_store(find_actor(name, namespace)))
