"""Writes the journal records of one service. Not thread-safe: the service holds its lock.

A batch is recorded at its end, or when it is interrupted, before anything else is recorded. Batches of reads leave no
record.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from raystore.core.state import Step
from raystore.core.verbs import CHANGING, is_part
from raystore.errors import JournalFullError, OverloadedError, StoreError, copy_of, to_record
from raystore.journal import format
from raystore.journal.writer import JournalWriter
from raystore.wire import frames

REFUSED_KEPT = 1_000  #: bulk calls of which a part found no space
LOCAL = 0  #: sequence number of a call within the store's process, which is no batch


@dataclass(slots=True, eq=False)
class Source:
    """The batch, or part of a batch, that runs, with the bytes in which it arrived."""

    session_id: str
    sequence: int
    first_ticket: int
    parts: Sequence[bytes]
    begun: int = 0  # operations that ran before, when it was interrupted
    refused: StoreError | None = None  # why no operation of it may change anything
    record: int = 0  # number of the record that holds the bytes, once there is one
    unwritten: int = 0  # items that ran since the last record


class Recorder:
    """Records what one service does."""

    def __init__(self, writer: JournalWriter) -> None:
        self.writer = writer
        self.operations: int = 0  # recorded
        self._source: Source | None = None
        self._step: Step | None = None
        self._minted = 0
        self._is_due = False  # something may have changed since the last record
        self._refused: dict[tuple[str, int], StoreError] = {}  # bulk calls of which a part found no space

    def begin(self, source: Source | None) -> None:
        """A slice begins; without a source, one of operations that change nothing."""
        self._source, self._step = source, None
        if source is not None and not source.record and source.refused is None:
            try:
                self.writer.reserve(sum(map(len, source.parts)))
            except (JournalFullError, OverloadedError) as error:
                source.refused = error

    def item(self, step: Step, ticket: int, verb: str, arguments: dict[str, Any], *, is_refused: bool = False) -> None:
        """An item is about to run; `step` is given the position of its bytes. Raises if there is no space for it.

        One that `is_refused` for its arguments changes nothing, unless it is a part of a bulk call.
        """
        source = self._source
        if source is None:
            assert verb not in CHANGING, f"{verb} would leave no record"
            return
        if source.refused is not None:
            if verb in CHANGING:
                self._refuse_chain(source, arguments, source.refused)
                raise copy_of(source.refused)
            return
        if step is not self._step:
            self.flush()
            self._step, self._minted = step, step.minted
        source.unwritten += 1
        self._is_due = self._is_due or (verb in CHANGING and not (is_refused and "chain" not in arguments))
        step.record = source.record or self.writer.last + 1
        step.operation = ticket - source.first_ticket
        if self._refused and (refusal := self._refuse_chain(source, arguments)) is not None:
            self.left_out(refusal)
            raise refusal

    def _refuse_chain(
        self, source: Source, arguments: dict[str, Any], why: StoreError | None = None
    ) -> Exception | None:
        """The error for a part of a bulk call of which this or an earlier part found no space; else None."""
        if not is_part(arguments.get("chain")):
            return None
        number, is_last = arguments["chain"]
        key = (source.session_id, number)
        refused = self._refused.setdefault(key, why) if why is not None else self._refused.get(key)
        if len(self._refused) > REFUSED_KEPT:  # the last parts of some never came
            del self._refused[next(iter(self._refused))]
        if is_last:
            self._refused.pop(key, None)
        return copy_of(refused) if refused is not None else None

    @property
    def position(self) -> int:
        """Number of the record that holds, or will hold, the newest change."""
        return self.writer.last + self._is_due

    def change(self, kind: str, step: Step, minted: int, arguments: Sequence[Any]) -> None:
        """A step was done that is no operation."""
        self.flush()
        self.operations += 1
        session_id = step.session.session_id if step.session else None
        self.writer.append([format.pack_record_head(kind, step, minted, session_id, arguments)])

    def verified(self, now: float, count: int, digest: str) -> None:
        """Record the digest of the `count` rollouts that were touched longest ago; a replay must find the same."""
        self.writer.append([format.pack_record_head(format.VERIFIED, Step(now, now), 0, None, [count, digest])])

    def left_out(self, error: Exception) -> None:
        """The current item broke the state, or did not run: a replay skips it, and this error is its answer."""
        source, step = self._source, self._step
        assert source is not None and step is not None
        source.unwritten -= 1
        if source.sequence == LOCAL:
            self._is_due = False
            return
        self._is_due = self._is_due and (source.unwritten > 0 or not source.record)
        self.flush()
        arguments = [source.sequence, *to_record(error)]
        head = format.pack_record_head(format.LEFT_OUT, step, step.minted, source.session_id, arguments)
        self.writer.append([head])

    def flush(self) -> None:
        """Record the items that ran since the last record; called at the end of a slice."""
        if not self._is_due:
            return
        source, step = self._source, self._step
        assert source is not None and step is not None
        if source.sequence == LOCAL:
            kind, arguments = format.CALL, [source.first_ticket]
        elif not source.record:
            kind, arguments = format.BATCH, [source.unwritten, source.begun]
        else:
            kind, arguments = format.MORE, [source.sequence, source.unwritten]
        head = format.pack_record_head(kind, step, self._minted, source.session_id, arguments)
        if kind == format.MORE:
            self.writer.append([head])
        else:
            source.record = self.writer.append([head, *source.parts])
        self.operations += source.unwritten
        source.unwritten, self._is_due = 0, False
        self._minted = step.minted


def local_source(session_id: str, ticket: int, verb: str, arguments: dict[str, Any]) -> Source:
    """A call within the store's process, as bytes."""
    packed = frames.pack_operation(verb, arguments)
    return Source(session_id, LOCAL, ticket, [packed.frame, *packed.large])
