"""What a service does, written down while it does it.

A batch is recorded when it has run as far as it runs without a break: at its end, or before anything else is. Batches
of reads leave no record.
Not here: the form of records (`records`), committing them (`log`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from raystore.core.state import Step
from raystore.core.verbs import CHANGING, is_part
from raystore.errors import JournalFullError, OverloadedError, StoreError, copy_of, to_record
from raystore.journal import records
from raystore.journal.writer import Log
from raystore.wire import frames

REFUSED_KEPT = 1_000  #: bulk calls of which a part found no room
LOCAL = 0  #: sequence of what is no batch: a call within the store's process


class Source:
    """Where the items of a slice come from: a batch, as it came."""

    __slots__ = ("begun", "first_ticket", "parts", "record", "refused", "sequence", "session_id", "unwritten")

    def __init__(
        self, session_id: str, sequence: int, first_ticket: int, parts: Sequence[bytes], begun: int = 0
    ) -> None:
        self.session_id = session_id
        self.sequence = sequence
        self.first_ticket = first_ticket
        self.begun = begun  # operations that ran before, when it was interrupted
        self.refused: StoreError | None = None  # why none of it may change anything
        self.parts = parts
        self.record = 0  # number of the record that holds the bytes, once there is one
        self.unwritten = 0  # items that ran since


class Recorder:
    """The pen of one service, which holds a lock around every call."""

    def __init__(self, log: Log) -> None:
        self.log = log
        self.operations = 0  # written down
        self._source: Source | None = None
        self._step: Step | None = None
        self._minted = 0
        self._is_worth = False  # something may have changed since the last record
        self._refused: dict[tuple[str, int], StoreError] = {}  # bulk calls of which a part found no room

    def begin(self, source: Source | None) -> None:
        """A slice begins; without a source, of what changes nothing."""
        self._source, self._step = source, None
        if source is not None and not source.record and source.refused is None:
            try:
                self.log.admit(sum(map(len, source.parts)))
            except (JournalFullError, OverloadedError) as error:
                source.refused = error

    def item(self, step: Step, ticket: int, verb: str, arguments: dict[str, Any], *, is_refused: bool = False) -> None:
        """An item is about to run: it is told where its bytes will be. Raises if there is no room for what it does.

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
            self._close()
            self._step, self._minted = step, step.minted
        source.unwritten += 1
        self._is_worth = self._is_worth or (verb in CHANGING and not (is_refused and "chain" not in arguments))
        step.record = source.record or self.log.last + 1
        step.operation = ticket - source.first_ticket
        if self._refused and (refusal := self._refuse_chain(source, arguments)) is not None:
            self.left_out(refusal)
            raise refusal

    def _refuse_chain(
        self, source: Source, arguments: dict[str, Any], why: StoreError | None = None
    ) -> Exception | None:
        """Why a part of a bulk call is refused: an earlier part was, for want of room."""
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
        """Number of the record that holds the newest of what was done."""
        return self.log.last + self._is_worth

    def end(self) -> None:
        """A slice ends."""
        self._close()

    def change(self, kind: str, step: Step, minted: int, arguments: Sequence[Any]) -> None:
        """A step that is no operation was done."""
        self._close()
        self.operations += 1
        session_id = step.session.session_id if step.session else None
        self.log.append([records.pack(kind, step, minted, session_id, arguments)])

    def verified(self, now: float, count: int, digest: str) -> None:
        """What the state is now, of the rollouts that were touched longest ago, for whoever does all this again."""
        self.log.append([records.pack(records.VERIFIED, Step(now), 0, None, [count, digest])])

    def left_out(self, error: Exception) -> None:
        """The item that runs has broken the state, or did not run at all: this is its answer, also another time."""
        source, step = self._source, self._step
        assert source is not None and step is not None
        source.unwritten -= 1
        if source.sequence == LOCAL:
            self._is_worth = False
            return
        self._is_worth = self._is_worth and (source.unwritten > 0 or not source.record)
        self._close()
        arguments = [source.sequence, *to_record(error)]
        self.log.append([records.pack(records.LEFT_OUT, step, step.minted, source.session_id, arguments)])

    def _close(self) -> None:
        """Write down what ran since the last record."""
        if not self._is_worth:
            return
        source, step = self._source, self._step
        assert source is not None and step is not None
        if source.sequence == LOCAL:
            head = records.pack(records.CALL, step, self._minted, source.session_id, [source.first_ticket])
            source.record = self.log.append([head, *source.parts])
        elif not source.record:
            head = records.pack(records.BATCH, step, self._minted, source.session_id, [source.unwritten, source.begun])
            source.record = self.log.append([head, *source.parts])
        else:
            arguments = [source.sequence, source.unwritten]
            self.log.append([records.pack(records.MORE, step, self._minted, source.session_id, arguments)])
        self.operations += source.unwritten
        source.unwritten, self._is_worth = 0, False
        self._minted = step.minted


def local_source(session_id: str, ticket: int, verb: str, arguments: dict[str, Any]) -> Source:
    """A call within the store's process, as bytes."""
    packed = frames.pack_operation(verb, arguments)
    return Source(session_id, LOCAL, ticket, [packed.frame, *packed.large])
