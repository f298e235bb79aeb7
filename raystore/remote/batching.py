"""Operations on their way out of a process, and the batches they leave in.

A batch takes operations in order, up to a size that Ray carries inline, or a larger one when much waits; an operation
that is larger travels alone, and one whose caller has been cancelled does not travel at all. A second batch leaves
beside the first only if it is worth it.
Not here: when batches leave and what becomes of them (`session`).
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Iterable
from typing import Any

from raystore.client.pending import Call
from raystore.core.verbs import CHANGING, HANDING
from raystore.wire import frames
from raystore.wire.frames import Packed

BATCH_BYTES = 384 * 1024  #: of a batch
BULK_BYTES = 1024 * 1024  #: of a batch once as much as this waits
BATCH_OPERATIONS = 512
WORTH_OPERATIONS = 32  #: what must wait for a call of its own while another is under way: each costs a millisecond ...
WORTH_BYTES = 48 * 1024  #: ... of two processes, whatever it carries
WINDOW = 2  #: batches under way at once


class Operation(Call):
    """One operation of a session, packed."""

    __slots__ = ("abandoned", "cancels", "issued", "packed", "sent", "size")

    def __init__(self, verb: str, arguments: dict[str, Any], *, awaited: bool = True) -> None:
        Call.__init__(self, verb, 0, awaited)
        self._pack(arguments)
        # to wait on, should the session be renewed
        self.arguments: dict[str, Any] | None = arguments if "timeout" in arguments else None
        self.issued: float = time.monotonic()
        self.sent: bool = False
        self.abandoned: bool = False
        self.cancels: int | None = None  # ticket of the parked call that this ends

    def _pack(self, arguments: dict[str, Any]) -> None:
        self.packed: Packed = frames.pack_operation(self.verb, arguments)
        self.size: int = len(self.packed.frame) + sum(map(len, self.packed.large))

    @property
    def changes(self) -> bool:
        """Whether running it twice would be wrong."""
        return self.verb in CHANGING

    def shorten(self) -> None:
        """Make an operation that waits wait only for what is left of its time."""
        self._pack_again()

    def resume(self) -> None:
        """Make an operation that waited ask again: for what it may have been handed, then for what is left."""
        self._pack_again(**({"of": self.ticket} if self.verb in HANDING else {}))

    def _pack_again(self, **more: Any) -> None:
        if self.arguments is None:
            return
        timeout = self.arguments.get("timeout")
        if timeout is not None:
            more["timeout"] = max(self.issued + timeout - time.monotonic(), 0.0)
        if more:
            self._pack(self.arguments | more)


class Batch:
    """Operations under way together."""

    __slots__ = ("failing_since", "header", "operations", "refs", "retries", "sequence", "session_id")

    def __init__(self, session_id: str, sequence: int, operations: list[Operation], header: list[Any]) -> None:
        self.session_id: str = session_id
        self.sequence: int = sequence
        self.operations: list[Operation] = operations
        self.header: list[Any] = header  # what the actor's `Inbox.exchange` takes beside the operations
        self.refs: dict[int, list[Any]] = {
            number: op.packed.refs for number, op in enumerate(operations) if op.packed.refs
        }
        self.failing_since: float | None = None
        self.retries: int = 0

    def parts(self, client: tuple[int, str], answered: int, ahead: Iterable[int]) -> list[bytes]:
        """The batch as it travels; up to where all answers have come, and which later ones."""
        header = [*client, self.session_id, self.sequence, answered, list(ahead), *self.header]
        large = [payload for operation in self.operations for payload in operation.packed.large]
        return frames.join(header, [operation.packed.frame for operation in self.operations], large)

    def has(self, ticket: int) -> bool:
        """Whether the operation with this ticket is in it."""
        return bool(self.operations) and self.operations[0].ticket <= ticket <= self.operations[-1].ticket


class Outgoing:
    """Operations that wait to leave, in order. Its owner holds a lock around every call."""

    def __init__(self) -> None:
        self._waiting: deque[Operation] = deque()
        self._bytes = 0
        self._tickets = itertools.count(1)

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def append(self, operation: Operation) -> None:
        """Let an operation wait at the end; it gets its ticket."""
        operation.ticket = next(self._tickets)
        self._waiting.append(operation)
        self._bytes += operation.size

    def drop(self, operation: Operation) -> None:
        """An operation that has not left will not leave."""
        if operation in self._waiting:
            self._waiting.remove(operation)
            self._bytes -= operation.size

    def first_loop(self) -> asyncio.AbstractEventLoop | None:
        """The loop of the operation at the front; None for one of a blocking thread, or if there is none."""
        return self._waiting[0].loop if self._waiting else None

    def oldest(self) -> float | None:
        """When the operation at the front was issued."""
        return self._waiting[0].issued if self._waiting else None

    def may_leave(self, under_way: int) -> bool:
        """Whether a batch should leave while so many are under way."""
        if under_way == 0:
            return bool(self._waiting)
        return under_way < WINDOW and (len(self._waiting) >= WORTH_OPERATIONS or self._bytes >= WORTH_BYTES)

    def take(self) -> list[Operation]:
        """What leaves together next; of much, a half, so that both sides of the window have something to do."""
        limit = BULK_BYTES if self._bytes > BULK_BYTES else BATCH_BYTES
        most = len(self._waiting)
        if most >= 2 * WORTH_OPERATIONS:
            most = min(most // 2, BATCH_OPERATIONS)
        taken: list[Operation] = []
        size = 0
        while self._waiting and len(taken) < most:
            head = self._waiting[0]
            # Tickets of a batch count up from its first, so a gap (of one that was dropped) ends it.
            if taken and (size + head.size > limit or head.ticket != taken[-1].ticket + 1):
                break
            self._waiting.popleft()
            self._bytes -= head.size
            if head.is_cancelled:
                continue  # nobody waits for it, and it has not left: it never was
            head.sent = True
            taken.append(head)
            size += head.size
        return taken

    def put_back(self, operations: Iterable[Operation]) -> None:
        """Let operations that were sent in vain wait again, before all others; everything gets a new ticket."""
        waiting = [*operations, *self._waiting]
        self._waiting.clear()
        self._bytes = 0
        for operation in waiting:
            self.append(operation)

    def clear(self) -> list[Operation]:
        """Let nothing wait any longer; what waited."""
        waiting = list(self._waiting)
        self._waiting.clear()
        self._bytes = 0
        return waiting
