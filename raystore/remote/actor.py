"""The Ray actor: a service on one event loop, and the methods of the session protocol.

`exchange` never parks, `listen` parks and carries what was waited for, `describe` is the handshake; `piece` carries
large objects of the journal for clients that do not see its directory, and belongs to no session. Arguments and answers
are bytes and small plain values. Imports neither pydantic nor the public types, so that it starts quickly.
A journal is read on a thread of its own: `describe` says meanwhile how far that is, and everything else waits for it.
Not here: what the methods do (`front`), the client's side (`session`), the options it is created with (`cluster`).
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import logging
import os
import signal
import sys
import threading
import time
import warnings
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import ray

from raystore import __version__
from raystore.core.state import Settings
from raystore.errors import FencedError, JournalFailedError, JournalFullError, StoreError, to_record
from raystore.journal.opening import Opened, open_journal
from raystore.journal.progress import Watch
from raystore.options import StoreConfig, memory_capacity, resolve
from raystore.remote.endpoint import Front
from raystore.remote.lifelines import Lifelines
from raystore.remote.processes import here
from raystore.service.clock import LoopAlarm
from raystore.service.service import PROTOCOL, Service
from raystore.wire import frames

logger = logging.getLogger("raystore.store")

#: Records form no cycles: what survives a look or two is not looked at again, which would only pause the loop.
COLLECTOR_THRESHOLDS = (3_000, 2, 250_000)
SWITCH_SECONDS = 0.0005  #: so that the thread that writes a journal need not wait for a busy loop for long
FULL_PATIENCE_SECONDS = 60.0  #: clients try for as long
READ_SECONDS = 2.0  #: so long the handshake waits for a journal to be read, before it says how far that is
FAILED, FENCED = 70, 71  #: exit codes


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
        self._opened: Opened | None = None
        self._refusal: StoreError | None = None  # why this store cannot be
        self._name = name
        self._namespace = namespace
        self._service: Service | None = None  # for whoever looks at the process from within
        self._front: Front | None = None
        self._node, object_store = _this_node()
        self._capacity = memory_capacity(
            object_store_bytes=object_store if object_store_bytes is None else object_store_bytes
        )
        self._remarks = _stand_upright()
        _end_when_told()
        self._watch = Watch()
        self._read: Future[None] = Future()  # once the journal is
        self._is_read = False
        if config.journal is None:
            self._begin()
            return
        if _is_another_process():
            resume = "again"
        writer = ray.get_runtime_context().get_actor_id()
        reading = threading.Thread(target=self._read_journal, args=(resume, writer), name="raystore-opening")
        reading.daemon = True
        reading.start()

    def _read_journal(self, resume: str, writer: str) -> None:
        """Become the writer of the journal, with all that it holds; on a thread of its own."""
        config = self._config
        try:
            self._opened = _open(config, resolve(config, self._capacity), self._name, resume, writer, self._watch)
            sys.setswitchinterval(SWITCH_SECONDS)
        except StoreError as error:
            logger.critical("%s", error)
            self._refusal = error
        except OSError as error:
            self._refusal = JournalFailedError(str(config.journal), f"{type(error).__name__}: {error}")
            logger.critical("%s", self._refusal)
        except BaseException as error:  # a bug of ours: everybody who waits is to be told
            logger.critical("The journal cannot be read", exc_info=True)
            self._refusal = JournalFailedError(str(config.journal), f"{type(error).__name__}: {error}")
        self._begin()

    def _begin(self) -> None:
        """Everything is there that the service needs."""
        gc.collect()
        gc.freeze()  # what was imported lives as long as the actor
        gc.set_threshold(*COLLECTOR_THRESHOLDS)
        self._is_read = True
        self._read.set_result(None)

    def __repr__(self) -> str:
        """What Ray's own tools show: in its logs, dashboard and `ray list actors`."""
        return f"Store({self._name})"

    async def _until_read(self) -> None:
        """Wait until the journal has been read, however long that takes; whoever asks sees that it goes on."""
        if not self._is_read:
            await asyncio.shield(asyncio.wrap_future(self._read))

    def _open(self) -> Front:
        """The sessions and their service, made on the loop that owns it from then on."""
        if self._front is None:
            self._read.result()  # there is none before
            loop = asyncio.get_running_loop()
            service = Service(
                self._config,
                capacity_bytes=self._capacity,
                alarm=lambda ring: LoopAlarm(loop, ring),
                name=self._name,
                opened=self._opened,
                on_failure=_end,
            )
            self._service, self._front = service, Front(service)
            self._lifelines = Lifelines(service)
            self._lifelines.start()
            self._front.on_open = self._lifelines.opened
        return self._front

    async def describe(self) -> dict[str, Any]:
        """Who this store is, what it was configured with, and where operations go (today: here)."""
        brief = {"kind": "raystore", "version": __version__, "protocol": PROTOCOL, "name": self._name}
        try:
            async with asyncio.timeout(READ_SECONDS):
                await self._until_read()
        except TimeoutError:
            return brief | {"reading": [self._watch.steps, str(self._watch)]}
        if self._refusal is not None:
            return brief | {"refusal": to_record(self._refusal)}
        service = self._open().service
        service.actor_calls += 1
        settings = service.state.settings
        return service.info() | {
            "kind": "raystore",
            "version": __version__,
            "namespace": self._namespace,
            "node": self._node,
            "machine": here(),
            "config": self._config,
            "capacity_bytes": self._capacity,
            "eviction_bytes": settings.eviction_bytes,
            "safe_bytes": settings.safe_bytes,
            "remarks": self._remarks + ([] if self._opened is None else self._opened.remarks),
            "endpoints": {"spans": self._name, "rollouts": self._name},
            "objects": None if service.objects is None else service.objects.told(),
        }

    async def exchange(self, *parts: bytes, refs: dict[int, list[Any]] | None = None) -> frames.Answer:
        """Run a batch of operations of a session; what became of it, and their answers."""
        if not self._is_read:
            await self._until_read()
        if self._refusal is not None:
            return frames.pack_answer(0, frames.BROKEN, to_record(self._refusal))
        return await self._open().exchange(parts, refs)

    async def listen(self, frame: bytes) -> frames.Answer:
        """Wait for answers of parked calls and for notices of a session."""
        if not self._is_read:
            await self._until_read()
        if self._refusal is not None:
            return frames.pack_answer(0, frames.BROKEN, to_record(self._refusal))
        return await self._open().listen(frame)

    async def linger(self, session_id: str) -> None:
        """Come back when a session has ended; the result is a lifeline of its process."""
        await self._until_read()
        if self._refusal is None:
            self._open()
            await self._lifelines.linger(session_id)

    async def hold(self, session_id: str, lifelines: list[Any]) -> None:
        """Take the lifeline of the process of a session: the end of that process breaks it."""
        await self._until_read()
        if self._refusal is None:
            self._open()
            await self._lifelines.hold(session_id, lifelines[0])

    async def piece(
        self, address: str, offset: int, total: int = 0, upload: str = "", data: bytes = b""
    ) -> bytes | None:
        """A piece of an object in the journal, for a client that does not see the directory: read, or written.

        On a thread, since files take their time; nothing of it changes the state.
        """
        await self._until_read()
        objects = self._open().service.objects if self._refusal is None else None
        if objects is None:
            return b""
        loop = asyncio.get_running_loop()
        if upload:
            await loop.run_in_executor(None, objects.files.write_piece, upload, address, offset, total, data)
            return None
        return await loop.run_in_executor(None, objects.files.read_piece, address, offset)


def _end(error: StoreError) -> None:
    """End this process at once: what it could still say might not be true. Ray starts another one, which replays."""
    logging.shutdown()
    os._exit(FENCED if isinstance(error, FencedError) else FAILED)


def _open(config: StoreConfig, settings: Settings, name: str, resume: str, writer: str, watch: Watch) -> Opened:
    """Become the writer of the journal; one that goes on waits for a while if there is no room on the disk."""
    until = time.monotonic() + FULL_PATIENCE_SECONDS
    while True:
        try:
            return open_journal(config, settings, name=name, resume=resume, now=time.time(), writer=writer, watch=watch)
        except JournalFullError:
            if resume != "again" or time.monotonic() > until:
                raise
            watch.step()
            time.sleep(0.5)


def _is_another_process() -> bool:
    """Whether this actor has had a process before."""
    with warnings.catch_warnings():  # of a name within Ray that it uses itself
        warnings.simplefilter("ignore")
        return bool(ray.get_runtime_context().was_current_actor_reconstructed)


def _this_node() -> tuple[str, int]:
    """Id of the node this actor runs on, and the bytes of its object store."""
    node_id = ray.get_runtime_context().get_node_id()
    for node in ray.nodes():
        if node["NodeID"] == node_id:
            return node_id, int(node["Resources"].get("object_store_memory", 0))
    return node_id, 0


def _end_when_told() -> None:
    """Let SIGTERM end this process at once, as a SIGKILL would: it loses nothing of what was acknowledged.

    Python's handler, which Ray sets, waits for the main thread to run Python; it seldom does in an actor, and a busy
    store goes on for half a minute. Only the main thread could set another, which this is not.
    """
    ctypes.CDLL(None).signal(signal.SIGTERM, signal.SIG_DFL)


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
