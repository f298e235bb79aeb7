"""What is written down of a store: batches as they came, steps by name, and the start of each process.

The first chunk of a record is its head, `[kind, now, age, seed, minted, session, arguments]`; a batch brings the bytes
it came in as further chunks, so that it is not encoded again. A batch that was interrupted (by others, or by a step) is
one record with its bytes and one more for each part that ran later.
Not here: making the records (`recorder`), what they do (`replay`), how they stand in a file (`frames`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from raystore.core.state import Step
from raystore.wire import frames

START = "start"  # a process begins to write: [who, settings, place up to which it read, how long nobody wrote or None]
BATCH = "batch"  # [items that ran, operations that had run before], and the batch's bytes
MORE = "more"  # [sequence, items that ran] of a batch that is known
CALL = "call"  # [ticket], and the bytes of an operation: in the store's own process, or of a batch that came again
VERIFIED = "verified"  # [rollouts, digest]: what the writer found of those that were touched longest ago
LEFT_OUT = "left_out"  # [sequence, class of the error, its arguments]: an item that is not to be run, and its answer


BODY = 8  #: where the body stands in a span as it travels


class Told(NamedTuple):
    """The head of a record."""

    kind: str
    now: float
    age: float
    seed: int
    minted: int
    session_id: str | None
    arguments: list[Any]

    def step(self) -> Step:
        """The step that it was."""
        step = Step(self.now, seed=self.seed, age=self.age)
        step.minted = self.minted
        return step


def pack(kind: str, step: Step, minted: int, session_id: str | None, arguments: Sequence[Any]) -> bytes:
    """The head of a record."""
    return frames.pack((kind, step.now, step.age, step.seed, minted, session_id, arguments)).frame


def unpack(head: bytes | memoryview) -> Told:
    """The head of a record, read."""
    return Told(*frames.unpack(head, []))
