"""A store behind its protocol, without Ray: batches in and answers out, and another process on the same journal.

The clients of these tests are written by hand, so that they may also send what no client of ours would.
"""

from __future__ import annotations

import threading
from typing import Any

from raystore.core.snapshot import parts
from raystore.journal.opening import open_journal, read_run
from raystore.journal.writer import JournalWriter
from raystore.remote.server_session import Endpoint
from raystore.service.clock import ManualClock, NoAlarm
from raystore.service.service import PROTOCOL, Service
from raystore.types.options import StoreConfig, resolve
from raystore.wire import frames
from raystore.wire.codec import encode

CAPACITY = 2**33


class StillClock(ManualClock):
    """A manual clock by which claims and sessions too age only in ticks, however slow the machine is."""

    def age(self) -> float:
        return self.start + self._aged


class Store:
    """One process of a store, on a clock that stands still; `follow` makes the next one, as after a SIGKILL."""

    def __init__(self, path: Any, *, resume: str = "auto", **options: Any) -> None:
        self.path, self.options = path, options
        config = StoreConfig(**{"clock": "manual", "journal": str(path), "durability": "process", **options})
        opened = open_journal(config, resolve(config, CAPACITY), name="s", resume=resume, now=1e9)
        self.service = Service(config, capacity_bytes=CAPACITY, alarm=NoAlarm, name="s", opened=opened)
        if type(self.service.clock) is ManualClock:
            self.service.clock.__class__ = StillClock
        self.endpoint = Endpoint(self.service)

    @property
    def state(self) -> Any:
        return self.service.state

    @property
    def writer(self) -> JournalWriter:
        """What writes its journal."""
        assert self.service.journal is not None and self.service.journal.recorder is not None
        return self.service.journal.recorder.writer

    def tick(self, seconds: float) -> None:
        """Let time pass, but not for claims and sessions."""
        assert isinstance(self.service.clock, ManualClock)
        self.service.clock.tick(seconds, sessions=False)

    def follow(self) -> Store:
        """The process that goes on; this one has died."""
        self.writer.close()
        return Store(self.path, resume="must", **self.options)

    def difference(self) -> list[Any]:
        """The first thing in which a replay of the journal differs from the state."""
        writer, is_written = self.writer, threading.Event()
        # An answer waits for its own changes only; those that no caller asked for may still be on their way to disk.
        if writer.when_durable(writer.last, lambda _: is_written.set()):
            assert is_written.wait(30)
        pairs = zip(parts(self.state), parts(read_run(self.path).state), strict=False)
        return [pair for pair in pairs if pair[0] != pair[1]][:1]


class Peer:
    """One session."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.ticket = 1
        self.sequence = 0
        self.sent: dict[int, Any] = {}

    def batch(self, *operations: Any, answered: int | None = None, refs: dict[int, list[Any]] | None = None) -> int:
        """Make the next batch; its number."""
        self.sequence += 1
        answered = self.sequence - 1 if answered is None else answered
        self.sent[self.sequence] = (self.ticket, operations, answered, refs)
        self.ticket += len(operations)
        return self.sequence

    def header(self, sequence: int, answered: int | None = None, ahead: list[int] | None = None) -> list[Any]:
        """What a batch says of itself; up to where all answers have come, and which later ones."""
        first, _, was_answered, _ = self.sent[sequence]
        answered = was_answered if answered is None else answered
        return [PROTOCOL, "test", self.name, sequence, answered, ahead or [], first, [], []]

    def parts(self, sequence: int, *, answered: int | None = None, ahead: list[int] | None = None) -> Any:
        """A batch as it travels."""
        header, operations = self.header(sequence, answered, ahead), self.sent[sequence][1]
        return tuple(frames.join(header, [frames.pack(operation) for operation in operations]))

    async def send(self, store: Store, sequence: int, **how: Any) -> list[Any]:
        """Send a batch, for the first time or again; the replies."""
        answer = await store.endpoint.exchange(self.parts(sequence, **how), self.sent[sequence][3])
        _, outcome, replies, *_ = frames.unpack_answer(answer)
        assert outcome == frames.DONE
        return list(replies)

    async def call(self, store: Store, verb: str, **arguments: Any) -> Any:
        """One operation in a batch of its own."""
        (reply,) = await self.send(store, self.batch([verb, arguments]))
        return reply


def request(value: Any = "x", **more: Any) -> dict[str, Any]:
    """What enqueues one rollout."""
    return {"input": encode(value, "input", 10**6), "metadata": None, **more}


def enqueue(value: Any = "x", **more: Any) -> list[Any]:
    return ["enqueue", {"requests": [request(value, **more)]}]
