"""Stores on Ray: start one, find one, talk to one, end one.

A store is a named actor. `RayLightningStore` is its client in this process; all clients of one store in a process share
one session, whatever threads and event loops they are used from.
Not here: what the actor does (`actor`), how operations travel (`session`).
"""

from __future__ import annotations

import atexit
import logging
import os
import secrets
import threading
from collections.abc import Callable
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raystore._sync import SyncStore
from raystore.actor import StoreActor
from raystore.calls import Call
from raystore.client import StoreClient
from raystore.config import StoreConfig
from raystore.errors import (
    InvalidValueError,
    NotAStoreError,
    ProtocolMismatchError,
    StoreClosedError,
    StoreError,
    StoreExistsError,
    StoreNotFoundError,
    StoreUnavailableError,
)
from raystore.options import make_config, make_encoder
from raystore.service import PROTOCOL
from raystore.session import CLIENT, Session, ray_connection
from raystore.testing import Testing
from raystore.types import NamedResources, ObjectResource, RolloutConfig, Span, StoreInfo

logger = logging.getLogger("raystore")

NAMESPACE = "raystore"
HANDSHAKE_SECONDS = 60.0  #: for a store to answer for the first time
MAX_CONCURRENCY = 40_000  #: a session may park a listen call and batches that came early: 10,000 sessions
BOXED_FROM_BYTES = 64 * 1024  #: larger objects in resources go to Ray's object store

_sessions: dict[str, tuple[int, Session]] = {}  # of this process, by store id, with the process they belong to
_sessions_lock = threading.Lock()
_attach_lock = threading.Lock()


class _ActorTransport:
    """The process's session to one store, shared by all its clients."""

    def __init__(self, handle: Any, known: dict[str, Any]) -> None:
        self._handle = handle
        self._known = known
        self._closed = False
        self._session: Session | None = None
        self._pid = 0

    @property
    def session(self) -> Session:
        """The session of this process; made at first use, and anew in a forked child."""
        session = self._session
        if session is not None and self._pid == os.getpid() and session.failure is None:
            return session
        if self._closed:
            raise StoreClosedError(self._known["name"])
        if session is not None and session.failure is not None:
            if isinstance(session.failure, StoreClosedError) or ray_connection() in (None, session.connection):
                return session  # which says why
            self._handle = _find(self._known["name"], self._known["namespace"])  # Ray was started anew
            if self._handle is None or _describe(self._handle)["store_id"] != self._known["store_id"]:
                return session
        with _sessions_lock:
            pid = os.getpid()
            store_id = self._known["store_id"]
            owner, found = _sessions.get(store_id, (0, None))
            if found is None or owner != pid or found.failure is not None:
                limit = self._known["limits"]["call_bytes"]
                found = Session(self._handle, self._known["name"], self._known["epoch"], limit)
                _sessions[store_id] = (pid, found)
            found.users += 1
            self._session, self._pid = found, pid
            return found

    async def call(self, verb: str, arguments: dict[str, Any]) -> Any:
        return await self.session.call(verb, arguments)

    def post(self, verb: str, arguments: dict[str, Any]) -> Call:
        return self.session.post(verb, arguments)

    def listen_for_notices(self, handler: Callable[[str, str, str], None]) -> Callable[[], None]:
        return self.session.listen_for_notices(handler)

    @property
    def session_id(self) -> str:
        return self.session.session_id

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        session, self._session = self._session, None
        if session is None or self._pid != os.getpid():
            return
        with _sessions_lock:
            session.users -= 1
            last = session.users == 0
            if last:
                _sessions.pop(self._known["store_id"], None)
        if last:
            session.close()


def close_sessions() -> None:
    """Say goodbye to all stores; at the exit of the process."""
    with _sessions_lock:
        mine = [session for pid, session in _sessions.values() if pid == os.getpid()]
        _sessions.clear()
    for session in mine:
        session.close()


atexit.register(close_sessions)  # before Ray's own, which was registered earlier


class RayLightningStore(StoreClient):
    """A LightningStore that runs as a Ray actor.

    Make one from an actor handle (inside a runner), or with `start` and `connect`. May be pickled, passed to tasks and
    actors, and used from several threads and event loops at once.
    """

    def __init__(self, handle: Any, *, owns: bool = False) -> None:
        self._attach(handle, _describe(handle), owns=owns)

    _origin: tuple[str, str, str] | None = None  # name, namespace and id, while unpickled and not used yet

    def __getattr__(self, name: str) -> Any:
        if self._origin is None or name.startswith("__"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        self._find_origin()
        return getattr(self, name)

    def _find_origin(self) -> None:
        with _attach_lock:
            if self._origin is None:
                return
            name, namespace, store_id = self._origin
            _join_cluster(None)
            handle = _find(name, namespace)
            if handle is None:
                raise StoreUnavailableError(name, "it has ended: there is no such actor any more")
            known = _describe(handle)
            if known["store_id"] != store_id:
                raise StoreUnavailableError(name, f"it has ended, and another store ({known['store_id']}) has its name")
            self._attach(handle, known, owns=False)
            self._origin = None

    def _attach(self, handle: Any, known: dict[str, Any], *, owns: bool) -> None:
        self.actor = handle
        self._known = known
        self._owns = owns
        config: StoreConfig = known["config"]
        self._transport = _ActorTransport(handle, known)
        self._encoder = make_encoder(config.all_limits(), config.span_size_estimator)
        self.sync = SyncStore(self)
        self.testing = Testing(self._transport)

    @property
    def info(self) -> StoreInfo:
        """Who this store is."""
        return _info(self._known)

    def _boxed(self, resources: NamedResources) -> NamedResources:
        return {name: _box(resource) for name, resource in resources.items()}

    def close(self) -> None:
        """Stop using the store; ends it if this object started it and it is not detached."""
        self._transport.close()
        if self._owns:
            self._owns = False
            ray.kill(self.actor)

    def __enter__(self) -> RayLightningStore:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    async def __aenter__(self) -> RayLightningStore:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Callable[..., RayLightningStore], tuple[str, str, str]]:
        if self._origin is not None:
            return _rebuild, self._origin
        return _rebuild, (self._known["name"], self._known["namespace"], self._known["store_id"])

    def __repr__(self) -> str:
        name, namespace = self._origin[:2] if self._origin else (self._known["name"], self._known["namespace"])
        return f"<RayLightningStore {name!r} in namespace {namespace!r}>"


def _rebuild(name: str, namespace: str, store_id: str) -> RayLightningStore:
    """A client of the same store in another process, which finds the store at its first use.

    Not at once: Ray unpickles under a lock that the answer of a call needs too.
    """
    store = RayLightningStore.__new__(RayLightningStore)
    store._origin = (name, namespace, store_id)
    return store


def _box(resource: Any) -> Any:
    """Move a large object to the object store."""
    if not isinstance(resource, ObjectResource) or isinstance(resource.value, ray.ObjectRef):
        return resource
    size = getattr(resource.value, "nbytes", None)
    if not isinstance(size, int):
        size = len(ray.cloudpickle.dumps(resource.value))
    return ObjectResource(value=ray.put(resource.value)) if size > BOXED_FROM_BYTES else resource


# -- the handshake -----------------------------------------------------------------------------------------------------


def _describe(handle: Any) -> dict[str, Any]:
    """Ask an actor who it is; raises if it is no store, does not answer, or speaks another protocol."""
    if not isinstance(handle, ray.actor.ActorHandle):
        raise NotAStoreError(f"{handle!r} (a {type(handle).__name__})")
    if not is_store(handle):
        raise NotAStoreError(f"The actor {handle!r}")
    try:
        known = handle.describe.remote().future().result(timeout=HANDSHAKE_SECONDS)
    except ray.exceptions.ActorDiedError as error:
        raise StoreUnavailableError(repr(handle), f"its actor has died. {_cause(error)}") from None
    except TimeoutError:
        raise StoreUnavailableError(repr(handle), f"no answer within {HANDSHAKE_SECONDS:g} s") from None
    if not isinstance(known, dict) or known.get("kind") != "raystore":
        raise NotAStoreError(f"The actor {handle!r}")
    if known["protocol"] != PROTOCOL:
        theirs = f"raystore {known['version']}, protocol {known['protocol']}"
        raise ProtocolMismatchError(f"{CLIENT[1]}, protocol {PROTOCOL}", theirs)
    return known


def is_store(handle: Any) -> bool:
    """Whether an actor has the methods of a store."""
    return all(hasattr(handle, method) for method in ("describe", "exchange", "listen"))


def _cause(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _info(known: dict[str, Any]) -> StoreInfo:
    names = ("store_id", "name", "namespace", "epoch", "protocol", "node", "limits", "endpoints")
    capabilities = {"thread_safe": True, "async_safe": True, "zero_copy": False, "otlp_traces": False}
    return StoreInfo(**{name: known[name] for name in names}, capabilities=capabilities)


# -- start, connect, list, stop ----------------------------------------------------------------------------------------


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
    max_queued: int | None = None,
    retention: float | int | dict[str, Any] | None = None,
    keep_resources: int | None = None,
    limits: dict[str, int] | None = None,
    clock: str = "system",
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
        max_deliveries: how often a rollout may be aborted, or lost alone with its process, before it fails.
        max_queued: rollouts that may wait; above it, enqueuing raises `OverloadedError`.
        retention: delete finished rollouts that were released or read: an age in seconds, or
            {"max_age_seconds": ..., "max_rollouts": ...}.
        keep_resources: newest resources ids to keep; older ones go when nobody refers to them. Default: all stay.
        limits: bytes of one value, span and call: {"value_bytes", "span_bytes", "call_bytes"}.
        clock: "system", or "manual" for tests (`store.testing.tick`).
        actor_options: for Ray, e.g. {"scheduling_strategy": ..., "runtime_env": ...}.

    Raises:
        StoreExistsError: the name exists, or exists with another configuration.
        InvalidValueError, ValueError: an option has a value that is not valid.
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
        max_queued=max_queued,
        retention=retention,
        keep_resources=keep_resources,
        limits=limits,
        clock=clock,
    )
    _join_cluster(address)
    if name is None:
        name = f"store-{secrets.token_hex(4)}"
    if (existing := _find(name, namespace)) is not None:
        return _take_existing(existing, name, namespace, exist, config)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    options: dict[str, Any] = {
        "name": name,
        "namespace": namespace,
        "lifetime": "detached" if detached else None,
        "num_cpus": 0,
        "max_restarts": 0,  # an empty store that looks alive is worse than a dead one
        "max_task_retries": 0,  # clients retry, with an identity
        "max_concurrency": MAX_CONCURRENCY,
        "enable_task_events": False,
        # The default scheduler may choose a node that goes away sooner than the driver's.
        "scheduling_strategy": here,
    } | (actor_options or {})
    try:
        handle = ray.remote(StoreActor).options(**options).remote(config, name, namespace)
    except ValueError:  # somebody else started one of this name in the same moment
        existing = _find(name, namespace)
        if existing is None:
            raise
        return _take_existing(existing, name, namespace, exist, config)
    store = RayLightningStore(handle, owns=not detached)
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


def connect(name: str | None = None, *, namespace: str = NAMESPACE, address: str | None = None) -> RayLightningStore:
    """Return a client of a running store; without a name, of the only one there is.

    Raises `StoreNotFoundError`, which lists what there is, and `NotAStoreError` for another kind of actor.
    """
    _join_cluster(address)
    if name is None:
        names = _store_names(namespace)
        if len(names) != 1:
            raise StoreNotFoundError(None, namespace, names)
        name = names[0]
    handle = _find(name, namespace)
    if handle is None:
        raise StoreNotFoundError(name, namespace, _store_names(namespace))
    return RayLightningStore(handle)


def list_stores(*, namespace: str | None = NAMESPACE, address: str | None = None) -> list[StoreInfo]:
    """The stores that run, by name; `namespace` None lists all namespaces."""
    _join_cluster(address)
    found = []
    for actor in _named_actors():
        if namespace is None or actor["namespace"] == namespace:
            handle = _find(actor["name"], actor["namespace"])
            if handle is not None and is_store(handle):
                try:
                    found.append(_info(_describe(handle)))
                except StoreError as error:  # one that is ending, or of another version, must not hide the others
                    logger.warning("Left out of the list: %s", error)
    return sorted(found, key=lambda info: info.name or "")


def stop(name: str | RayLightningStore, *, namespace: str = NAMESPACE, address: str | None = None) -> None:
    """End a store, whoever started it; what it holds is gone.

    Raises `StoreNotFoundError` and `NotAStoreError`.
    """
    if isinstance(name, RayLightningStore):
        name._transport.close()
        ray.kill(name.actor)
        name._owns = False
        return
    _join_cluster(address)
    handle = _find(name, namespace)
    if handle is None:
        raise StoreNotFoundError(name, namespace, _store_names(namespace))
    if not is_store(handle):
        raise NotAStoreError(f"The actor {name!r} in namespace {namespace!r}")
    ray.kill(handle)


def _join_cluster(address: str | None) -> None:
    if not ray.is_initialized():
        ray.init(address=address)


def _find(name: str, namespace: str) -> Any:
    try:
        return ray.get_actor(name, namespace=namespace)
    except ValueError:  # Ray's way to say that there is no such actor
        return None


def _named_actors() -> list[dict[str, str]]:
    actors: list[dict[str, str]] = ray.util.list_named_actors(all_namespaces=True)
    return actors


def _store_names(namespace: str) -> list[str]:
    names = [actor["name"] for actor in _named_actors() if actor["namespace"] == namespace]
    return sorted(name for name in names if is_store(_find(name, namespace)))
