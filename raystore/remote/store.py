"""Stores on Ray: start one, connect to one, list them, stop one. A store is a named actor.

`RayLightningStore` is its client, and keeps the large objects that it publishes.
A large object of resources goes to Ray's object store, and the resource refers to it there. If the store keeps objects
in a journal, and the object is within the bound, it is written to the journal's directory as well.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal, Unpack

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raystore.client import transport
from raystore.client.client import Boxed, StoreClient, Testing, store_info
from raystore.client.transport import in_thread
from raystore.core.payload import Opaque, Payload
from raystore.errors import (
    InvalidValueError,
    JournalFailedError,
    NotAStoreError,
    StoreError,
    StoreExistsError,
    StoreNotFoundError,
    StoreUnavailableError,
)
from raystore.errors.text import explained, explained_with
from raystore.journal.opening import checked_directory
from raystore.remote.actor import StoreActor
from raystore.remote.session import (
    ActorTransport,
    ClientSession,
    check_connection,
    describe,
    find_actor,
    is_store,
    join_cluster,
    join_cluster_of,
    ray_connection,
)
from raystore.reports.log import logger_of, once
from raystore.types.contract import NamedResources, ObjectResource, StoreInfo
from raystore.types.options import OPTIONS, StoreConfig, StoreOptions, make_config
from raystore.values.objects import PIECE_BYTES, Kept, Origin, Parts, Source, address_of, pickled, size_of
from raystore.wire.checks import identifier

logger: logging.Logger = logger_of("raystore")

NAMESPACE = "raystore"

MAX_CONCURRENCY = 40_000  #: calls at once: for 10,000 sessions, each with a parked listen call and early batches
BOXED_FROM_BYTES = 64 * 1024  #: larger objects in resources go to Ray's object store
FETCH_SECONDS = 60.0  #: to fetch an object that is to be written to the journal, or to send a piece of it
READY_SECONDS = 1.0  #: to wait for an object of which Ray does not know whether it is ready
PATIENCE_SECONDS = 60.0  #: to repeat sending an object to a store that does not take it: it may be restarting
PAUSE_SECONDS = 1.0  #: between two tries

_attach_lock = threading.Lock()
_owned: dict[bytes, Any] = {}  # by actor: handles of the stores that this process started and that end with it


def end(handle: Any) -> None:
    """End the actor of a store."""
    _owned.pop(handle._actor_id.binary(), None)
    ray.kill(handle)


class RayLightningStore(StoreClient):
    """A LightningStore that runs as a Ray actor.

    Make one from an actor handle (inside a runner), or with `start` and `connect`. May be pickled, passed to tasks and
    actors, and used from several threads and event loops at once.

    Attributes:
        actor: the actor handle, to pass to distributed runners.
        sync: blocking twins of all methods.
        testing: for tests, with `clock="manual"`.
    """

    actor: Any

    def __init__(self, handle: Any, *, owns: bool = False) -> None:
        self._attach(handle, describe(handle), owns=owns)

    # Name, namespace, store id and address of the cluster, from unpickling until the first use.
    _origin: tuple[str, str, str, str | None] | None = None

    def __getattr__(self, name: str) -> Any:
        if self._origin is None or name.startswith("__"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        self._find_origin()
        return getattr(self, name)

    def _find_origin(self) -> None:
        with _attach_lock:
            if self._origin is None:
                return
            name, namespace, store_id, address = self._origin
            join_cluster_of(name, address)
            handle = find_actor(name, namespace)
            known = None if handle is None else describe(handle)
            if known is None or known["store_id"] != store_id:
                raise StoreUnavailableError(name, _why_not_found(address, known))
            self._attach(handle, known, owns=False)
            self._origin = None

    def _attach(self, handle: Any, known: dict[str, Any], *, owns: bool) -> None:
        self.actor = handle
        self._known = known
        self._owns = owns
        told = known["objects"] or {"path": None, "token": None}
        origin = Origin(told["path"], told["token"], known["name"], known["namespace"])
        self._reach(ActorTransport(handle, known), known["config"], origin)
        self.testing: Testing = Testing(self._transport)

    @property
    def info(self) -> StoreInfo:
        """Identity, limits and capabilities of this store."""
        return store_info(self._known)

    # -- large objects ---------------------------------------------------------------------------------------------

    async def _boxed(self, resources_id: str | None, resources: NamedResources) -> Boxed:
        """Resources with their large objects in the object store.

        Suspends only to fetch objects of references that the journal is to keep, so that calls keep their order.
        """
        told = self._known["objects"]
        bound = 0 if told is None else told["bound"]
        boxed = Boxed({})
        for name, resource in resources.items():
            boxed.resources[name] = resource
            if not isinstance(resource, ObjectResource):
                continue
            boxed.resources[name], kept, parts = await box(resource, bound=bound)
            if kept is None:
                continue
            boxed.objects.append(kept)
            if kept.address is not None and parts is not None:
                boxed.files.append((kept.address, parts))
            elif bound:
                self._warn(resources_id, name, kept.size, bound)
        boxed.asked = self._store_process()
        return boxed

    def _store_process(self) -> tuple[int, str]:
        """The store's process that answered last, and the session by which it knows this process."""
        state = self._session().state
        return state.epoch, state.session_id

    def _session(self) -> ClientSession:
        assert isinstance(self._transport, ActorTransport)
        return self._transport.session

    def _warn(self, resources_id: str | None, name: str, size: int, bound: int) -> None:
        """Log once that an object is lost if this process dies."""
        logger.warning(
            "Resource %r of %s (%s) is not kept in the journal, which keeps objects of at most journal_object_bytes=%d."
            " It is lost if this process or its object store dies, and what waits for it is then held back until it is "
            "published again. To have it survive, start the store with a larger journal_object_bytes (told once)",
            name, resources_id or "new resources", f"{size} bytes" if size else "a reference", bound,
            extra=once("object", self._known["store_id"], resources_id, name),
        )  # fmt: skip

    async def _published(self, answer: Any, payload: Opaque, boxed: Boxed) -> None:
        """Resources were published: refer to their objects, and write them to the journal."""
        if isinstance(payload, Payload) and payload.refs:
            # A new process of the store may know the version without knowing that its objects are here.
            is_unknown = boxed.asked != self._store_process()
            self._session().hold((answer[0], answer[1]), payload.refs, again=is_unknown)
        for address, parts in boxed.files:
            await in_thread(keep, self._objects_at, address, parts)

    def close(self) -> None:
        """Stop using the store; ends it if this object started it and it is not detached."""
        self._close_feeds()
        self._transport.close()
        if self._owns and not transport.ray_is_inherited():  # in a forked child it is the parent's
            self._owns = False
            end(self.actor)

    def __reduce__(self) -> tuple[Callable[..., RayLightningStore], tuple[str, str, str, str | None]]:
        if self._origin is not None:
            return _rebuild, self._origin
        address, _ = ray_connection() or (None, None)
        return _rebuild, (self._known["name"], self._known["namespace"], self._known["store_id"], address)

    def __repr__(self) -> str:
        name, namespace = self._origin[:2] if self._origin else (self._known["name"], self._known["namespace"])
        return f"<RayLightningStore {name!r} in namespace {namespace!r}>"


def _why_not_found(address: str | None, other: dict[str, Any] | None) -> str:
    """The reason why a store is not found; that it has ended only if this process is connected to its cluster."""
    here, _ = ray_connection() or (None, None)
    if address is not None and here != address:
        return (
            f"it was started in the cluster at {address}, and this process is connected to another one, at {here}. "
            f"Connect to its cluster first: ray.init(address={address!r})"
        )
    if other is None:
        return "it has ended: there is no such actor any more"
    return f"it has ended, and another store ({other['store_id']}) has its name"


def _rebuild(name: str, namespace: str, store_id: str, address: str | None = None) -> RayLightningStore:
    """Unpickle a client, which finds its store at its first use.

    Not at once: Ray unpickles under a lock that it also needs to answer a call.
    """
    store = RayLightningStore.__new__(RayLightningStore)
    store._origin = (name, namespace, store_id, address)
    return store


# -- large objects -----------------------------------------------------------------------------------------------------


#: A resource as it travels; if its object is a reference now: where it is kept, and its bytes.
Box = tuple[ObjectResource, Kept | None, Parts | None]


async def box(resource: ObjectResource, *, bound: int) -> Box:
    """Put the object of a resource into the object store if it is large.

    Its bytes are returned, too, if there are at most `bound` of them: they are to be kept in the journal.
    """
    value = resource.value
    if isinstance(value, Kept):  # it was read from a journal, and is published again
        value = await in_thread(resource.get)
    if isinstance(value, ray.ObjectRef):
        parts, size = await in_thread(_fetched, value, bound) if bound else (None, 0)
        return _referring(value, parts, size)
    size = getattr(value, "nbytes", None)
    parts = None
    if not isinstance(size, int):
        parts = pickled(value)
        size = size_of(parts) if parts is not None else len(ray.cloudpickle.dumps(value))
    if size <= BOXED_FROM_BYTES:
        return resource if value is resource.value else ObjectResource(value=value), None, None
    if size > bound:
        parts = None
    elif parts is None:
        parts = pickled(value)
    return _referring(ray.put(value), parts, size)


def _referring(reference: Any, parts: Parts | None, size: int) -> Box:
    kept = Kept(None if parts is None else address_of(parts), size)
    made = ObjectResource(value=reference)
    made.source = Source(kept, Origin(), "", 0)  # the reader fills in the rest
    return made, kept, parts


def _fetched(reference: Any, bound: int) -> tuple[Parts | None, int]:
    """The object of a user's reference, if it is ready and within the bound; and its size, 0 if unknown."""
    where = ray.experimental.get_object_locations([reference]).get(reference, {})
    size = where.get("object_size") or 0
    if size > bound:
        return None, size
    try:
        value = reference.future().result(timeout=FETCH_SECONDS if size else READY_SECONDS)
    except Exception:  # it is not ready, or has failed: the reader of the resource gets the error
        return None, size
    parts = pickled(value)
    del value
    size = size_of(parts) if parts is not None else size
    return (parts if size <= bound else None), size


def keep(origin: Origin, address: str, parts: Parts) -> None:
    """Write an object to the journal's directory; the store does it if this process does not see the directory.

    Raises `JournalFailedError` if that fails: the version is published, and its object will not survive.
    """
    files = origin.files()
    try:
        if files is not None:
            files.write(address, parts)
        else:
            _send(origin, address, parts)
    except (OSError, ValueError, TimeoutError, ray.exceptions.RayError) as error:
        why = f"an object of resources was published and cannot be kept: {type(error).__name__}: {error}"
        raise JournalFailedError(str(origin.path), why) from error


def _send(origin: Origin, address: str, parts: Parts) -> None:
    """Have the store write an object."""
    until = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            _send_all(origin, address, parts)
            return
        except (ray.exceptions.RayError, ValueError):  # the store restarts, and has lost the pieces so far
            if time.monotonic() > until:
                raise
            time.sleep(PAUSE_SECONDS)


def _send_all(origin: Origin, address: str, parts: Parts) -> None:
    actor = ray.get_actor(origin.name, namespace=origin.namespace)
    upload, total, at = secrets.token_hex(4), size_of(parts), 0
    for piece in _pieces(parts):
        actor.piece.remote(address, at, total, upload, piece).future().result(timeout=FETCH_SECONDS)
        at += len(piece)


def _pieces(parts: Parts) -> Iterator[bytes]:
    """The bytes of an object in pieces of `PIECE_BYTES`; the last may be shorter."""
    pending = bytearray()
    for part in parts:
        left = memoryview(part)
        while left:
            room = PIECE_BYTES - len(pending)
            pending += left[:room]
            left = left[room:]
            if len(pending) == PIECE_BYTES:
                yield bytes(pending)
                pending.clear()
    if pending:
        yield bytes(pending)


# -- starting and finding stores ---------------------------------------------------------------------------------------


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
        _owned[handle._actor_id.binary()] = handle  # an actor ends with the last reference to it
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
