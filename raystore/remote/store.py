"""`RayLightningStore`: the client of a store that runs as a Ray actor.

Not here: starting and finding stores (`cluster`), how operations travel (`session`).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import ray

from raystore._sync import SyncStore
from raystore.client import StoreClient, forks
from raystore.client.pending import in_thread
from raystore.client.resources import Boxed
from raystore.client.testing import Testing
from raystore.core.payload import Opaque, Payload
from raystore.errors import (
    StoreUnavailableError,
)
from raystore.options import StoreConfig
from raystore.remote import boxing
from raystore.remote.handshake import describe, find_actor, join_cluster_of, ray_connection, store_info
from raystore.remote.session import Session
from raystore.remote.transport import ActorTransport
from raystore.types import NamedResources, ObjectResource, StoreInfo
from raystore.values.objects import Origin
from raystore.wire.convert import Encoder

logger = logging.getLogger("raystore")

_attach_lock = threading.Lock()
_owned: dict[bytes, Any] = {}  # handles of the stores that this process started and that end with it, by actor


def own(handle: Any) -> None:
    """Keep a store that this process has started: it would end with the last object that refers to its actor."""
    _owned[handle._actor_id.binary()] = handle


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

    # Name, namespace, id, and the address of its cluster, while unpickled and not used yet.
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
        self._warned: set[tuple[str | None, str]] = set()  # of what does not survive
        config: StoreConfig = known["config"]
        self._transport = ActorTransport(handle, known)
        self._encoder = Encoder(config.all_limits(), config.estimator())
        self.sync = SyncStore(self)
        self.testing = Testing(self._transport)

    @property
    def info(self) -> StoreInfo:
        """Who this store is."""
        return store_info(self._known)

    # -- large objects ---------------------------------------------------------------------------------------------

    async def _boxed(self, resources_id: str | None, resources: NamedResources) -> Boxed:
        """Suspends only to look at references that a journal is to keep, so that calls keep their order."""
        told = self._known["objects"]
        bound = 0 if told is None else told["bound"]
        boxed = Boxed({})
        for name, resource in resources.items():
            boxed.resources[name] = resource
            if not isinstance(resource, ObjectResource):
                continue
            boxed.resources[name], kept, parts = await boxing.box(resource, bound=bound)
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
        """Which process the store is, and by which session it knows this one."""
        session = self._session()
        return session.epoch, session.session_id

    def _session(self) -> Session:
        assert isinstance(self._transport, ActorTransport)
        return self._transport.session

    def _warn(self, resources_id: str | None, name: str, size: int, bound: int) -> None:
        if (resources_id, name) in self._warned:
            return
        self._warned.add((resources_id, name))
        logger.warning(
            "Resource %r of %s (%s) is not kept in the journal, which keeps objects of at most journal_object_bytes=%d."
            " It is lost if this process or its object store dies, and what waits for it is then held back until it is "
            "published again. To have it survive, start the store with a larger journal_object_bytes (told once)",
            name, resources_id or "new resources", f"{size} bytes" if size else "a reference", bound,
        )  # fmt: skip

    async def _published(self, answer: Any, payload: Opaque, boxed: Boxed) -> None:
        if isinstance(payload, Payload) and payload.refs:
            session = self._session()
            session.held.hold((answer[0], answer[1]), payload.refs)
            if boxed.asked != self._store_process():  # another process may have the version, and not its objects
                session.hold_again()
        for address, parts in boxed.files:
            await in_thread(boxing.keep, self._origin_of_objects(), address, parts)

    def _origin_of_objects(self) -> Origin:
        told = self._known["objects"] or {"path": None, "token": None}
        return Origin(told["path"], told["token"], self._known["name"], self._known["namespace"])

    def close(self) -> None:
        """Stop using the store; ends it if this object started it and it is not detached."""
        self._transport.close()
        if self._owns and not forks.ray_is_inherited():  # in a forked child it is the parent's
            self._owns = False
            end(self.actor)

    def __reduce__(self) -> tuple[Callable[..., RayLightningStore], tuple[str, str, str, str | None]]:
        if self._origin is not None:
            return _rebuild, self._origin
        connection = ray_connection()
        address = None if connection is None else connection[0]
        return _rebuild, (self._known["name"], self._known["namespace"], self._known["store_id"], address)

    def __repr__(self) -> str:
        name, namespace = self._origin[:2] if self._origin else (self._known["name"], self._known["namespace"])
        return f"<RayLightningStore {name!r} in namespace {namespace!r}>"


def _why_not_found(address: str | None, other: dict[str, Any] | None) -> str:
    """Why there is no store where it was; that it has ended is said only if this is its cluster."""
    connection = ray_connection()
    here = None if connection is None else connection[0]
    if address is not None and here != address:
        return (
            f"it was started in the cluster at {address}, and this process is connected to another one, at {here}. "
            f"Connect to its cluster first: ray.init(address={address!r})"
        )
    if other is None:
        return "it has ended: there is no such actor any more"
    return f"it has ended, and another store ({other['store_id']}) has its name"


def _rebuild(name: str, namespace: str, store_id: str, address: str | None = None) -> RayLightningStore:
    """A client of the same store in another process, which finds the store at its first use.

    Not at once: Ray unpickles under a lock that the answer of a call needs too.
    """
    store = RayLightningStore.__new__(RayLightningStore)
    store._origin = (name, namespace, store_id, address)
    return store
