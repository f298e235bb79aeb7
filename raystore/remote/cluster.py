"""Stores on Ray: start one, connect to one, list them, stop one. A store is a named actor."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterator
from typing import Any, Literal, Unpack

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raystore.client.client import store_info
from raystore.errors import (
    InvalidValueError,
    NotAStoreError,
    StoreError,
    StoreExistsError,
    StoreNotFoundError,
)
from raystore.errors.calls import explained, explained_with
from raystore.journal.opening import checked_directory
from raystore.options import OPTIONS, StoreConfig, StoreOptions, make_config
from raystore.remote.actor import StoreActor
from raystore.remote.handshake import check_connection, describe, find_actor, is_store, join_cluster
from raystore.remote.store import RayLightningStore, end, own
from raystore.types import StoreInfo
from raystore.wire.checks import identifier

logger: logging.Logger = logging.getLogger("raystore")

NAMESPACE = "raystore"

MAX_CONCURRENCY = 40_000  #: calls at once: for 10,000 sessions, each with a parked listen call and early batches


@explained_with(OPTIONS)
def start(
    name: str | None = None,
    *,
    namespace: str = NAMESPACE,
    address: str | None = None,
    detached: bool = False,
    exist: Literal["error", "attach"] = "error",
    actor_options: dict[str, Any] | None = None,
    **options: Unpack[StoreOptions],
) -> RayLightningStore:
    """Start a store on Ray and return a client of it.

    Args:
        name: of the store; None makes one up.
        namespace: of Ray's, in which the name is unique.
        address: of the cluster. Ray's own order applies: this argument, RAY_ADDRESS, a running local cluster, else one
            is started. Without effect if this process is connected already.
        detached: let the store outlive this process, until `stop`. By default it ends with it.
        exist: what to do if the name exists: "error", or "attach" if the configuration is the same.
        actor_options: for Ray, e.g. {"scheduling_strategy": ..., "runtime_env": ...}.
        options: those of every store: memory, deliveries, retention, limits, consumers, the journal; `StoreOptions`
            (`help(raystore.StoreOptions)`) describes each.

    Raises:
        StoreExistsError: the name exists, or exists with another configuration.
        InvalidValueError, ValueError: an option has a value that is not valid.
        JournalError: the journal is missing, damaged, in use, or of another run.
    """
    if exist not in ("error", "attach"):
        raise InvalidValueError("exist", exist, "'error' or 'attach'")
    config = make_config(**options)
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
    chosen: dict[str, Any] = {
        "name": name,
        "namespace": namespace,
        "lifetime": "detached" if detached else None,
        "num_cpus": 0,
        "memory": 1,  # a byte: without any requirement, Ray would ignore `here`
        # Without a journal it would come back empty; a dead store is better, since its clients get errors.
        "max_restarts": 0 if config.journal is None else -1,
        "max_task_retries": 0,  # clients retry, with an identity
        "max_concurrency": MAX_CONCURRENCY,
        "enable_task_events": False,
        # The default scheduler may choose a node that goes away sooner than the driver's.
        "scheduling_strategy": here,
    } | (actor_options or {})
    try:
        actor = ray.remote(StoreActor).options(**chosen)
        handle = actor.remote(config, name, namespace, resume=options.get("resume", "auto"))
    except ValueError:  # another process has just started a store of this name
        existing = find_actor(name, namespace)
        if existing is None:
            raise
        return _take_existing(existing, name, namespace, exist, config)
    if not detached:
        own(handle)
    try:
        store = RayLightningStore(handle, owns=not detached)
    except StoreError:  # it could not start
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
    for _, handle in _stores(namespace):
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


def _stores(namespace: str | None) -> Iterator[tuple[str, Any]]:
    """Names and handles of the stores that run in a namespace, or in all."""
    for actor in ray.util.list_named_actors(all_namespaces=True):
        if namespace in (None, actor["namespace"]):
            handle = find_actor(actor["name"], actor["namespace"])
            if handle is not None and is_store(handle):
                yield actor["name"], handle


def _store_names(namespace: str) -> list[str]:
    return sorted(name for name, _ in _stores(namespace))
