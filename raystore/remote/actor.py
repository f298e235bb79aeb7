"""The Ray actor: a service on one event loop, and the methods that clients call.

`describe` is the handshake. `exchange` runs a batch and returns at once; `listen` is parked until the store has
something to say. `linger` and `hold` are a lifeline. `piece` carries large objects of the journal for clients that do
not see its directory, and belongs to no session. Arguments and answers are bytes and small plain values.

A thread of its own reads the journal. Meanwhile `describe` tells the progress, and everything else waits.
Imports neither pydantic nor the public types, so that the actor starts quickly.
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
from raystore.journal.reader import ReadingProgress
from raystore.remote.exporter import Exporter
from raystore.remote.lifelines import Lifelines, here
from raystore.remote.server_session import Endpoint
from raystore.reports.log import logger_of
from raystore.service.clock import LoopAlarm
from raystore.service.service import PROTOCOL, Service
from raystore.types.options import StoreConfig, memory_capacity, resolve
from raystore.wire import frames

logger: logging.Logger = logger_of("raystore.store")

#: Records form no cycles. So the garbage collector seldom looks at old objects, which would only pause the loop.
COLLECTOR_THRESHOLDS = (3_000, 2, 250_000)
SWITCH_SECONDS = 0.0005  #: the interpreter's switch interval; short, since the journal's thread waits for a busy loop
FULL_PATIENCE_SECONDS = 60.0  #: to wait for room on the disk after a restart; clients retry for as long
READ_SECONDS = 2.0  #: that `describe` waits for the journal to be read before it says how far that is
FAILED, FENCED = 70, 71  #: exit codes


class StoreActor:
    """One store as an actor. Its methods are the store's protocol, not its API: wrap the handle in a client."""

    def __init__(self, config: StoreConfig, name: str, namespace: str, *, resume: str = "auto") -> None:
        self._config = config
        self._opened: Opened | None = None
        self._refusal: StoreError | None = None  # why this store could not start
        self._name = name
        self._namespace = namespace
        self._service: Service | None = None  # for tests that look into the process
        self._endpoint: Endpoint | None = None
        self._node, object_store_bytes = _this_node()
        self._capacity = memory_capacity(object_store_bytes=object_store_bytes)
        self._remarks = _restore_priority()
        _end_when_told()
        self._progress = ReadingProgress()
        self._read: Future[None] = Future()  # done once the journal is read
        self._is_read = False
        if config.journal is None:
            self._begin()
            return
        if _is_another_process():
            resume = "again"
        writer = ray.get_runtime_context().get_actor_id()
        arguments = (resume, writer)
        threading.Thread(target=self._read_journal, args=arguments, name="raystore-opening", daemon=True).start()

    def _read_journal(self, resume: str, writer: str) -> None:
        """Read the journal and become its writer; on a thread of its own."""
        config = self._config
        try:
            self._opened = _open(config, resolve(config, self._capacity), self._name, resume, writer, self._progress)
            sys.setswitchinterval(SWITCH_SECONDS)
        except StoreError as error:
            logger.critical("%s", error)
            self._refusal = error
        except BaseException as error:  # all callers that wait get it: a failing disk, or a bug of ours
            self._refusal = JournalFailedError(str(config.journal), f"{type(error).__name__}: {error}")
            logger.critical("%s", self._refusal, exc_info=not isinstance(error, OSError))
        self._begin()

    def _begin(self) -> None:
        """Let waiting calls proceed: the journal is read."""
        gc.collect()
        gc.freeze()  # what was imported lives as long as the actor
        gc.set_threshold(*COLLECTOR_THRESHOLDS)
        self._is_read = True
        self._read.set_result(None)

    def __repr__(self) -> str:
        """The name in Ray's logs, its dashboard and `ray list actors`."""
        return f"Store({self._name})"

    async def _until_read(self) -> None:
        """Wait until the journal has been read, however long that takes; clients see the progress in `describe`."""
        if not self._is_read:
            await asyncio.shield(asyncio.wrap_future(self._read))

    def _open(self) -> Endpoint:
        """The endpoint and its service, made at first use, on the loop that owns them from then on."""
        if self._endpoint is None:
            self._read.result()  # callers have waited for it
            loop = asyncio.get_running_loop()
            service = Service(
                self._config,
                capacity_bytes=self._capacity,
                alarm=lambda ring: LoopAlarm(loop, ring),
                name=self._name,
                opened=self._opened,
                on_failure=_end,
            )
            self._service, self._endpoint = service, Endpoint(service)
            self._lifelines = Lifelines(service)
            self._lifelines.start()
            self._exporter = Exporter(service, self._name)
            self._exporter.start()
            self._endpoint.on_open = self._lifelines.opened
        return self._endpoint

    async def describe(self) -> dict[str, Any]:
        """The identity of this store, its configuration, and the actors that take operations (today: this one)."""
        brief = {"kind": "raystore", "version": __version__, "protocol": PROTOCOL, "name": self._name}
        try:
            async with asyncio.timeout(READ_SECONDS):
                await self._until_read()
        except TimeoutError:
            progress = self._progress
            at = [progress.kilobytes, progress.kilobytes_in_all]
            return brief | {"reading": [progress.steps, str(progress)], "kilobytes": at}
        if self._refusal is not None:
            return brief | {"refusal": to_record(self._refusal)}
        service = self._open().service
        service.actor_calls += 1
        settings = service.state.settings
        return service.info() | {
            **brief,
            "namespace": self._namespace,
            "node": self._node,
            "machine": here(),
            "config": self._config,
            "capacity_bytes": self._capacity,
            "eviction_bytes": settings.eviction_bytes,
            "safe_bytes": settings.safe_bytes,
            "remarks": self._remarks + ([] if self._opened is None else self._opened.remarks),
            "endpoints": {"spans": self._name, "rollouts": self._name},
            "objects": None if service.objects is None else service.objects.description(),
        }

    async def exchange(self, *parts: bytes, refs: dict[int, list[Any]] | None = None) -> frames.Answer:
        """Run a batch of operations of a session; see `Endpoint.exchange`."""
        if not self._is_read:
            await self._until_read()
        if self._refusal is not None:
            return frames.pack_answer(0, frames.BROKEN, to_record(self._refusal))
        return await self._open().exchange(parts, refs)

    async def listen(self, frame: bytes) -> frames.Answer:
        """Wait for answers of parked calls of a session, and for notices."""
        if not self._is_read:
            await self._until_read()
        if self._refusal is not None:
            return frames.pack_answer(0, frames.BROKEN, to_record(self._refusal))
        return await self._open().listen(frame)

    async def linger(self, session_id: str) -> None:
        """Return when a session has ended. The caller owns the result, which is the lifeline of its process."""
        await self._until_read()
        if self._refusal is None:
            self._open()
            await self._lifelines.linger(session_id)

    async def hold(self, session_id: str, lifelines: list[Any]) -> None:
        """Watch the lifeline of a session's process, which breaks when that process ends."""
        await self._until_read()
        if self._refusal is None:
            self._open()
            await self._lifelines.hold(session_id, lifelines[0])

    async def piece(
        self, address: str, offset: int, total: int = 0, upload: str = "", data: bytes = b""
    ) -> bytes | None:
        """Read or write (`upload`) a piece of an object in the journal, for a client that does not see its files."""
        await self._until_read()
        objects = self._open().service.objects if self._refusal is None else None
        if objects is None:
            return b""
        if upload:
            await asyncio.to_thread(objects.files.write_piece, upload, address, offset, total, data)
            return None
        return await asyncio.to_thread(objects.files.read_piece, address, offset)


def _end(error: StoreError) -> None:
    """End this process at once, since its answers may be wrong. Ray starts another one, which reads the journal."""
    logging.shutdown()
    os._exit(FENCED if isinstance(error, FencedError) else FAILED)


def _open(
    config: StoreConfig, settings: Settings, name: str, resume: str, writer: str, progress: ReadingProgress
) -> Opened:
    """Open the journal as its writer. After a restart, wait for a while if there is no room on the disk."""
    until = time.monotonic() + FULL_PATIENCE_SECONDS
    while True:
        try:
            return open_journal(
                config, settings, name=name, resume=resume, now=time.time(), writer=writer, progress=progress
            )
        except JournalFullError:
            if resume != "again" or time.monotonic() > until:
                raise
            progress.advance()
            time.sleep(0.5)


def _is_another_process() -> bool:
    """Whether Ray has restarted this actor in a new process."""
    with warnings.catch_warnings():  # Ray warns of its own use of a deprecated name
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
    """Let SIGTERM end this process at once, as SIGKILL would; no answered call is lost.

    Ray's own handler is in Python and waits for the main thread, which seldom runs Python in an actor: a busy store
    would go on for half a minute. It is set with C, since this is not the main thread, in which Python wants to set it.
    """
    ctypes.CDLL(None).signal(signal.SIGTERM, signal.SIG_DFL)


def _restore_priority() -> list[str]:
    """Give this process a normal priority, and do not let the kernel kill it first; returns remarks on failures."""
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
