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
import time
import warnings
from pathlib import Path
from typing import Any

import ray

from raystore import __version__, wire
from raystore.clock import LoopAlarm
from raystore.config import StoreConfig, memory_capacity, resolve
from raystore.core.state import Session
from raystore.errors import FencedError, StoreError, to_record
from raystore.journal.opening import Opened, open_journal
from raystore.remote.inbox import Inbox, SessionEnded
from raystore.service import PROTOCOL, Service

logger = logging.getLogger("raystore.store")

#: Records form no cycles: what survives a look or two is not looked at again, which would only pause the loop.
COLLECTOR_THRESHOLDS = (3_000, 2, 250_000)
SLOW_SECONDS = 0.1  #: an answer that waited for the disk for longer starts the time anew in which to acknowledge claims
FAILED, FENCED = 70, 71  #: exit codes
LISTEN_SECONDS = 30.0  #: at most; jittered, so that a thousand clients do not come back at once


class StoreActor:
    """One store as an actor. Its methods are the store's protocol, not its API: wrap the handle in a client."""

    def __init__(
        self,
        config: StoreConfig,
        name: str,
        namespace: str,
        object_store_bytes: int | None = None,
        resume: str = "auto",
    ) -> None:
        self._config = config
        self._is_durable = config.journal is not None
        self._opened: Opened | None = None
        self._refusal: StoreError | None = None  # why this store cannot be
        self._name = name
        self._namespace = namespace
        self._inboxes: dict[str, Inbox] = {}
        self._service: Service | None = None
        self._node, here = _this_node()
        self._capacity = memory_capacity(object_store_bytes=here if object_store_bytes is None else object_store_bytes)
        self._remarks = _stand_upright()
        if _is_another_process():
            resume = "again"
        try:
            if config.journal is not None:
                settings = resolve(config, self._capacity)
                writer = ray.get_runtime_context().get_actor_id()
                self._opened = open_journal(config, settings, name=name, resume=resume, now=time.time(), writer=writer)
        except StoreError as error:
            logger.critical("%s", error)
            self._refusal = error
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
                opened=self._opened,
                on_failure=_end,
            )
            self._service.on_notice = self._wake
            for session_id, session in self._service.state.sessions.items():  # of the process before this one
                self._inboxes[session_id] = Inbox(self._service, session)
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
        if self._refusal is not None:
            refused = {"kind": "raystore", "version": __version__, "protocol": PROTOCOL, "name": self._name}
            return refused | {"refusal": to_record(self._refusal)}
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
        if self._refusal is not None:
            return wire.pack_answer(0, wire.BROKEN, to_record(self._refusal))
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
            answer = await inbox.exchange(sequence, answered, more, operations, parts)
        except SessionEnded:
            return wire.pack_answer(service.epoch, wire.ENDED)
        if self._is_durable:
            await self._safe(service, inbox.session)
        return answer

    async def listen(self, frame: bytes) -> wire.Answer:
        """Wait for answers of parked calls and for notices of a session."""
        if self._refusal is not None:
            return wire.pack_answer(0, wire.BROKEN, to_record(self._refusal))
        service = self._open()
        protocol, *header = wire.unpack(frame, [])
        if protocol != PROTOCOL:
            return wire.pack_answer(service.epoch, wire.REFUSED, _own_protocol())
        _, session_id, acknowledged, epoch = header
        inbox = self._inboxes.get(session_id)
        if inbox is None or inbox.session.ended_at is not None:
            return wire.pack_answer(service.epoch, wire.ENDED)
        service.heard(inbox.session)
        # A client that knows of the process before has calls that are parked nowhere: it is told at once.
        seconds = LISTEN_SECONDS * random.uniform(0.7, 1.0) if epoch == service.epoch else 0.0
        answer = await inbox.listen(acknowledged, seconds)
        if self._is_durable:
            await self._safe(service, inbox.session)
        return answer

    async def _safe(self, service: Service, session: Session) -> None:
        """Let nothing leave before what it says is as durable as was asked for."""
        loop = asyncio.get_running_loop()
        safe: asyncio.Future[None] = loop.create_future()

        def tell(lost: StoreError | None) -> None:
            if lost is None:  # else the process is about to end
                loop.call_soon_threadsafe(_set, safe)

        started = loop.time()
        if not service.when_safe(tell):
            return
        await safe
        if loop.time() - started > SLOW_SECONDS:
            service.claims_left(session)

    def _sweep(self, service: Service) -> None:
        """Forget sessions that the state has forgotten."""
        for session_id, inbox in list(self._inboxes.items()):
            if session_id not in service.state.sessions:
                inbox.release()
                del self._inboxes[session_id]


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _end(error: StoreError) -> None:
    """End this process at once: what it could still say might not be true. Ray starts another one, which replays."""
    logging.shutdown()
    os._exit(FENCED if isinstance(error, FencedError) else FAILED)


def _is_another_process() -> bool:
    """Whether this actor has had a process before."""
    with warnings.catch_warnings():  # of a name within Ray that it uses itself
        warnings.simplefilter("ignore")
        return bool(ray.get_runtime_context().was_current_actor_reconstructed)


def _own_protocol() -> str:
    return f"raystore {__version__}, protocol {PROTOCOL}"


def _this_node() -> tuple[str, int]:
    """Id of the node this actor runs on, and the bytes of its object store."""
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
