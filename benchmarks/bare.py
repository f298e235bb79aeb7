"""What no store on Ray can leave out: an actor that does nothing with its batches, or one thing only.

`Batches` is the client's side: operations that coroutines await, which travel together as those of a session do. It
knows no order, no identity, no claims and no retries, and looks at nothing that it is given.
Not here: who is compared with it (`bounds`).
"""

from __future__ import annotations

import asyncio
import functools
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import msgpack
import ray

from raystore.remote.session_state import BATCH_BYTES, BATCH_OPERATIONS, WINDOW, WORTH_BYTES, WORTH_OPERATIONS
from raystore.wire.frames import PART_BYTES

FILE_BYTES = 2**30  #: of the file that is written round and round, allocated beforehand as a journal's segments are
STORED: list[Any] = [0, [[True, None]]]  #: what answers an operation that hands nothing over
IDS = {"rollout_id": "ro-0123456789abcdef", "attempt_id": "at-01234567"}

pack: Callable[[Any], bytes] = msgpack.packb
unpack: Callable[[bytes], Any] = functools.partial(msgpack.unpackb, strict_map_key=False)


class _Bare:
    """An actor whose methods take a batch, and do with it what their name says."""

    def __init__(self, claimed: Any = None, path: str | None = None) -> None:
        """`claimed` is what an operation that claims hands over; `path` is of the file for `write`."""
        self._claimed = claimed
        self._unwritten: list[bytes] = []
        self._came = self._durable = 0  # batches
        self._disk = asyncio.Lock()
        self._end = 0
        self._pause = 0.0
        if path is not None:
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT)
            os.posix_fallocate(self._file, 0, FILE_BYTES)

    async def take(self, *parts: bytes) -> bytes:
        """Nothing."""
        return b""

    async def read(self, *parts: bytes) -> bytes:
        """Unpack the operations, and pack an answer to each."""
        operations = unpack(b"".join(parts))
        return pack([[0, [self._claimed]] if verb == "dequeue" else STORED for verb, _ in operations])

    async def write(self, *parts: bytes) -> bytes:
        """The same, and answer once the batch is on the disk; batches that come meanwhile are synced together."""
        answer = await self.read(*parts)
        self._unwritten += parts
        self._came += 1
        mine = self._came
        async with self._disk:
            if self._durable < mine:
                newest, data, self._unwritten = self._came, b"".join(self._unwritten), []
                await asyncio.to_thread(self._sync, data)
                self._durable = newest
        return answer

    def _sync(self, data: bytes) -> None:
        if self._end + len(data) > FILE_BYTES:
            self._end = 0
        self._end += os.pwrite(self._file, data, self._end)
        os.fdatasync(self._file)

    async def give(self, count: int) -> bytes:
        """So many claims."""
        return pack([self._claimed] * count)

    async def cpu_seconds(self) -> float:
        """Of its process so far."""
        return time.process_time()

    async def watch(self) -> None:
        """Start to note how late the loop comes back to a task that sleeps a millisecond at a time."""

        async def watching() -> None:
            while True:
                before = time.perf_counter()
                await asyncio.sleep(0.001)
                self._pause = max(self._pause, time.perf_counter() - before - 0.001)

        self._watching = asyncio.create_task(watching())

    async def longest_pause(self) -> float:
        """Seconds since `watch`, which ends."""
        self._watching.cancel()
        return self._pause


Bare: Any = ray.remote(num_cpus=0, enable_task_events=False, max_concurrency=1000)(_Bare)


class Batches:
    """Operations that leave together: at the end of a tick, or behind the answers to a batch."""

    def __init__(self, method: Any, *, reads: bool) -> None:
        """`method` of an actor takes the batches; `reads` says whether its answers are unpacked."""
        self._method, self._reads = method, reads
        self._waiting: deque[tuple[bytes, asyncio.Future[Any]]] = deque()
        self._bytes = self._under_way = 0
        self._is_asked = False

    def ask(self, operation: bytes) -> asyncio.Future[Any]:
        """The answer to an operation, once it is there."""
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        self._waiting.append((operation, future))
        self._bytes += len(operation)
        if not self._is_asked:
            self._is_asked = True
            loop.call_soon(self._flush, loop)
        return future

    def _flush(self, loop: asyncio.AbstractEventLoop) -> None:
        self._is_asked = False
        waiting = self._waiting
        while waiting and self._under_way < WINDOW:
            most = len(waiting)
            if self._under_way and most < WORTH_OPERATIONS and self._bytes < WORTH_BYTES:
                return
            if most >= 2 * WORTH_OPERATIONS:  # as in a session, the free places share what waits
                most = min(max(-(-most // (WINDOW - self._under_way)), WORTH_OPERATIONS), BATCH_OPERATIONS)
            operations: list[bytes] = []
            futures: list[asyncio.Future[Any]] = []
            size = 0
            while waiting and len(operations) < most and (not size or size + len(waiting[0][0]) <= BATCH_BYTES):
                operation, future = waiting.popleft()
                operations.append(operation)
                futures.append(future)
                size += len(operation)
            self._bytes -= size
            self._under_way += 1
            done = functools.partial(self._done, loop, futures)
            self._method.remote(*cut(joined(operations))).future().add_done_callback(done)

    def _done(self, loop: asyncio.AbstractEventLoop, futures: list[asyncio.Future[Any]], call: Any) -> None:
        """An answer is there, on a thread of Ray's."""
        loop.call_soon_threadsafe(self._answered, loop, futures, call.result())

    def _answered(self, loop: asyncio.AbstractEventLoop, futures: list[asyncio.Future[Any]], answer: bytes) -> None:
        self._under_way -= 1
        for future, value in zip(futures, unpack(answer) if self._reads else futures, strict=True):
            future.set_result(value)
        loop.call_soon(self._flush, loop)  # behind the callers, so that what they ask now leaves with it


# -- operations --------------------------------------------------------------------------------------------------------


def joined(operations: Sequence[bytes]) -> bytes:
    """Packed operations as one packed list."""
    return b"".join((b"\xdd", len(operations).to_bytes(4, "big"), *operations))


def cut(frame: bytes) -> list[bytes]:
    """A frame as arguments that Ray carries inline."""
    return [frame[first : first + PART_BYTES] for first in range(0, len(frame), PART_BYTES)]


def body(span: Any) -> bytes:
    """What the store does not look at of a span."""
    return pack([span.status.status_code, span.attributes, None, 1, None])


def adding(*spans: Any) -> bytes:
    """The operation that adds spans."""
    rows = [
        [span.sequence_id, span.span_id, span.trace_id, None, span.name, span.start_time, span.end_time, None,
         body(span), -1]
        for span in spans
    ]  # fmt: skip
    return pack(("add_spans", IDS | {"spans": rows}))


def claiming(worker_id: str | None) -> bytes:
    """The operation that claims."""
    return pack(("dequeue", {"queues": ["default"], "limit": 1, "worker_id": worker_id, "timeout": 0.0}))


def finishing() -> bytes:
    """The operation that lets an attempt succeed."""
    return pack(("update_attempt", IDS | {"changes": {"status": "succeeded"}}))


def enqueuing(*tasks: Any) -> bytes:
    """The operation that enqueues."""
    return pack(("enqueue", {"requests": [{"input": pack(task), "metadata": pack({})} for task in tasks]}))
