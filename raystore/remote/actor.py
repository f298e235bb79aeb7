"""The Ray actor: a service on one event loop, and the three methods of the session protocol.

`exchange` never parks, `listen` parks and carries what was waited for, `describe` is the handshake. Arguments and
answers are bytes and small plain values. Imports neither pydantic nor the public types, so that it starts quickly.
Not here: the protocol's two ends (`inbox` here, `session` in clients), the options it is created with (`ray_store`).
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import random
from pathlib import Path
from typing import Any

from raystore import __version__
from raystore.clock import LoopAlarm
from raystore.config import StoreConfig, memory_capacity
from raystore.remote import wire
from raystore.remote.inbox import Inbox, SessionEnded
from raystore.service import PROTOCOL, Service

logger = logging.getLogger("raystore.store")

#: Records form no cycles: what survives a look or two is not looked at again, which would only pause the loop.
COLLECTOR_THRESHOLDS = (3_000, 2, 250_000)
LISTEN_SECONDS = 30.0  #: at most; jittered, so that a thousand clients do not come back at once


class StoreActor:
    """One store as an actor. Its methods are the store's protocol, not its API: wrap the handle in a client."""

    def __init__(self, config: StoreConfig, name: str, namespace: str, object_store_bytes: int | None = None) -> None:
        self._config = config
        self._name = name
        self._namespace = namespace
        self._inboxes: dict[str, Inbox] = {}
        self._service: Service | None = None
        self._node, here = _this_node()
        self._capacity = memory_capacity(object_store_bytes=here if object_store_bytes is None else object_store_bytes)
        self._remarks = _stand_upright()
        gc.collect()
        gc.freeze()  # what was imported lives as long as the actor
        gc.set_threshold(*COLLECTOR_THRESHOLDS)

    def _open(self) -> Service:
        """The service, made on the loop that owns it from then on."""
        if self._service is None:
            loop = asyncio.get_running_loop()
            self._service = Service(
                self._config,
                capacity_bytes=self._capacity,
                alarm=lambda ring: LoopAlarm(loop, ring),
                name=self._name,
            )
            self._service.on_notice = self._wake
        self._service.actor_calls += 1
        return self._service

    def _wake(self, session_id: str) -> None:
        inbox = self._inboxes.get(session_id)
        if inbox is not None and inbox.session.ended_at is not None:
            inbox.release()
        elif inbox is not None:
            inbox.wake()

    async def describe(self) -> dict[str, Any]:
        """Who this store is, what it was configured with, and where operations go (today: here)."""
        service = self._open()
        settings = service.state.settings
        return service.info() | {
            "kind": "raystore",
            "version": __version__,
            "namespace": self._namespace,
            "node": self._node,
            "config": self._config,
            "capacity_bytes": self._capacity,
            "eviction_bytes": settings.eviction_bytes,
            "safe_bytes": settings.safe_bytes,
            "remarks": self._remarks,
            "endpoints": {"spans": self._name, "rollouts": self._name},
        }

    async def exchange(self, *parts: bytes, refs: dict[int, list[Any]] | None = None) -> wire.Answer:
        """Run a batch of operations of a session; what became of it, and their answers."""
        service = self._open()
        (protocol, *header), *operations = wire.split(parts, refs)
        if protocol != PROTOCOL:
            return wire.pack_answer(service.epoch, wire.REFUSED, _own_protocol())
        _, session_id, sequence, answered, *more = header
        inbox = self._inboxes.get(session_id)
        if inbox is None:
            # A client whose first batch was never answered is new; its second may overtake its first.
            if answered or session_id in service.state.sessions:
                return wire.pack_answer(service.epoch, wire.ENDED)
            inbox = self._inboxes[session_id] = Inbox(service, service.open_session(session_id))
            self._sweep(service)
        if inbox.session.ended_at is not None:
            return wire.pack_answer(service.epoch, wire.ENDED)
        service.heard(inbox.session)
        try:
            return await inbox.exchange(sequence, answered, more, operations)
        except SessionEnded:
            return wire.pack_answer(service.epoch, wire.ENDED)

    async def listen(self, frame: bytes) -> wire.Answer:
        """Wait for answers of parked calls and for notices of a session."""
        service = self._open()
        protocol, *header = wire.unpack(frame, [])
        if protocol != PROTOCOL:
            return wire.pack_answer(service.epoch, wire.REFUSED, _own_protocol())
        _, session_id, acknowledged = header
        inbox = self._inboxes.get(session_id)
        if inbox is None or inbox.session.ended_at is not None:
            return wire.pack_answer(service.epoch, wire.ENDED)
        service.heard(inbox.session)
        return await inbox.listen(acknowledged, LISTEN_SECONDS * random.uniform(0.7, 1.0))

    def _sweep(self, service: Service) -> None:
        """Forget sessions that the state has forgotten."""
        for session_id, inbox in list(self._inboxes.items()):
            if session_id not in service.state.sessions:
                inbox.release()
                del self._inboxes[session_id]


def _own_protocol() -> str:
    return f"raystore {__version__}, protocol {PROTOCOL}"


def _this_node() -> tuple[str, int]:
    """Id of the node this actor runs on, and the bytes of its object store."""
    import ray

    node_id = ray.get_runtime_context().get_node_id()
    for node in ray.nodes():
        if node["NodeID"] == node_id:
            return node_id, int(node["Resources"].get("object_store_memory", 0))
    return node_id, 0


def _stand_upright() -> list[str]:
    """Undo what Ray does to its workers: lowest priority, and first in line when memory runs out."""
    remarks = []
    try:
        os.setpriority(os.PRIO_PROCESS, 0, 0)
    except (OSError, AttributeError) as error:
        remarks.append(f"the store runs at nice {os.nice(0)}, since it may not be raised ({error})")
    try:
        Path("/proc/self/oom_score_adj").write_text("0")
    except OSError as error:
        remarks.append(f"the kernel may kill the store first when memory runs out ({error})")
    return remarks
