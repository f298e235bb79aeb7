"""Making the state of a store anew from its journal: a snapshot, and every record behind it through the same core.

Bodies of spans are not kept: they stay where they are on disk. The digests that the writer recorded from time to time
are compared with those of the replayed state.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from raystore.core import expiry, format1, training, verbs
from raystore.core.batches import BatchRun, Item, to_keep
from raystore.core.records import Config
from raystore.core.snapshot import verify
from raystore.core.state import AGAIN, ERROR, VALUE, BatchReplies, Reply, Session, Settings, State, Step
from raystore.core.verbs import CHANGING, STEPS, VERBS
from raystore.errors import StoreError, to_record
from raystore.journal import format, snapshot_file
from raystore.journal.failpoints import failpoint
from raystore.journal.files import JournalPosition
from raystore.journal.format import FORMAT, Chunks, FileHead, RecordHead, WriterInfo
from raystore.journal.reader import JournalReader, ReadingProgress
from raystore.wire import frames

NOTICES_KEPT = 1_000  #: of a session; which of them it has seen is not known, so the newest are sent again


class _Begun(NamedTuple):
    """The newest batch of a session, of which more may run."""

    record: int  # number of the record with its bytes
    sequence: int
    run: BatchRun | format1.Run
    parts: list[bytes]


class Rules(NamedTuple):
    """The rules by which records of one format are replayed."""

    run: Callable[..., Any]
    steps: dict[str, Callable[..., Any]]
    resume: Callable[..., None]
    run_of: type[BatchRun] | type[format1.Run]
    are_digests_compared: bool
    begin: Callable[[State, Settings], None]  # called when a process begins, with the settings of the one before


def _begin(state: State, before: Settings) -> None:
    format1.go_on(state)
    training.introduce(state, before)


#: A change of what a record does, or of what a digest covers, moves the old rules to a file with an entry here.
_RULES = {
    1: Rules(format1.run, format1.STEPS, format1.resume, format1.Run, False, lambda state, before: None),
    FORMAT: Rules(verbs.run, STEPS, expiry.resume, BatchRun, True, _begin),
}


class Replay:
    """A state that follows a journal."""

    def __init__(self) -> None:
        self.state: State = State(Settings(eviction_bytes=1, safe_bytes=0))
        self.last: int = 0  # number of the newest record
        self.now: float = 0.0  # its time
        self.writer: WriterInfo = {}  # the newest writer
        self.operations: int = 0  # that were replayed
        self.differences: list[int] = []  # records at which the writer had found another digest
        self.state.spans.keeps_bodies = False
        self._settings: dict[str, Any] = {}
        self._runs: dict[str, _Begun] = {}  # by session
        self._indexes: snapshot_file.SpanIndexFile | None = None
        self._rules = _RULES[FORMAT]  # of the record that is replayed

    @classmethod
    def from_snapshot(cls, path: Path, progress: ReadingProgress | None = None) -> Replay:
        """The state that a snapshot holds."""
        replayed = cls()
        state = replayed.state
        *_, format_ = snapshot_file.read_head(path)
        advance = (progress or ReadingProgress()).advance
        replayed._indexes, more = snapshot_file.read(path, state, on_section=advance)
        replayed.last, replayed.now, replayed.writer = more["last"], more["now"], more["started"]
        replayed._configure(more["settings"])
        for session_id, record, sequence, parts, number, cut in more["runs"]:
            header, *operations = frames.split(parts, None)
            run = _RULES[format_].run_of(state, state.sessions[session_id], sequence, header[6], operations)
            run.go_on(number, [Item(*row) for row in cut])
            replayed._runs[session_id] = _Begun(record, sequence, run, parts)
        state.spans.written = replayed.last
        return replayed

    def write_snapshot(self, path: Path, position: JournalPosition) -> set[int]:
        """Write a snapshot that goes up to a position; returns the records that hold bodies of its spans."""
        runs = [
            (session_id, begun.record, begun.sequence, begun.parts, begun.run.next, [tuple(i) for i in begun.run.cut])
            for session_id, begun in self._runs.items()
            if session_id in self.state.sessions and isinstance(begun.run, BatchRun) and begun.run.may_change
        ]
        more = {
            "last": self.last, "now": self.now, "started": self.writer, "settings": self._settings, "runs": runs,
        }  # fmt: skip
        in_head = {"offset": position.offset, "who": self.writer}
        head = FileHead(self.writer["store_id"], position.epoch, position.segment, position.record + 1, more=in_head)
        return snapshot_file.write(path, head, self.state, self._indexes, more)

    def apply(self, number: int, record: Chunks, format_: int = FORMAT) -> None:
        """Replay one record, by the rules of the format in which it was written."""
        self._rules = _RULES[format_]
        head = format.unpack_record_head(record[0])
        self.last, self.now = number, head.now
        self.state.spans.written = number
        kinds: dict[str, Callable[[RecordHead, Chunks], None]] = {
            format.START: self._start,
            format.BATCH: self._batch,
            format.MORE: lambda head, record: self._run(head, head.arguments[1]),
            format.CALL: self._call,
            format.LEFT_OUT: self._left_out,
            format.VERIFIED: self._verified,
        }
        known = kinds.get(head.kind)
        if known is not None:
            known(head, record)
        else:
            self.operations += 1
            self._rules.steps[head.kind](self.state, self._step(head), *_with_pairs(head))
        self._drop_news()

    def _step(self, head: RecordHead) -> Step:
        step = head.step()
        step.session = self.state.sessions.get(head.session_id) if head.session_id is not None else None
        return step

    def _session(self, head: RecordHead) -> Session:
        assert head.session_id is not None
        return self.state.sessions[head.session_id]

    def _start(self, head: RecordHead, record: Chunks) -> None:
        self.writer, settings, _, away = head.arguments
        before = self.state.settings
        self._configure(settings)
        self._rules.begin(self.state, before)
        if away is not None:
            self._rules.resume(self.state, head.step(), away)

    def _configure(self, settings: dict[str, Any]) -> None:
        self._settings = settings
        default_config = Config.of(settings["default_config"])
        self.state.configure(Settings(**{**settings, "default_config": default_config}))

    def _verified(self, head: RecordHead, record: Chunks) -> None:
        count, digest = head.arguments
        found = verify(self.state, count)
        if found != digest and self._rules.are_digests_compared:
            self.differences.append(self.last)

    # -- operations --------------------------------------------------------------------------------------------------

    def _batch(self, head: RecordHead, record: Chunks) -> None:
        parts = [bytes(part) for part in record[1:]]
        header, *operations = frames.split(parts, None)
        _, _, session_id, sequence, answered, ahead, first_ticket, *_ = header
        cache = self._session(head).replies
        cache.answers_received(answered, ahead)
        count, begun = head.arguments
        kept = cache.kept.setdefault(sequence, BatchReplies(first_ticket, []))
        del kept.replies[begun:]
        kept.replies.extend([AGAIN] * (begun - len(kept.replies)))  # operations without a record changed nothing
        run = self._rules.run_of(self.state, self._session(head), sequence, first_ticket, operations)
        self._runs[session_id] = _Begun(self.last, sequence, run, parts)
        self._run(head, count)

    def _run(self, head: RecordHead, count: int) -> None:
        """Run as many operations or pieces of the batch as ran then."""
        session, step = self._session(head), self._step(head)
        step.record, _, run, _ = self._runs[session.session_id]

        def operate(number: int, ticket: int, verb: str, arguments: dict[str, Any]) -> Reply:
            step.operation = number
            return self._operation(step, verb, arguments)

        run.run(operate, itertools.count(1).__next__, count - 1)

    def _call(self, head: RecordHead, record: Chunks) -> None:
        verb, arguments = frames.unpack(record[1], [], [bytes(part) for part in record[2:]])
        step = self._step(head)
        step.record = self.last
        reply = self._operation(step, verb, arguments)
        self._session(head).replies.note(head.arguments[0], to_keep(verb, arguments, reply))

    def _left_out(self, head: RecordHead, record: Chunks) -> None:
        _, *error = head.arguments
        run = self._runs[self._session(head).session_id].run
        run.run(lambda *operation: [ERROR, *error], itertools.count(1).__next__, 0)

    def _operation(self, step: Step, verb: str, arguments: dict[str, Any]) -> Reply:
        if verb not in CHANGING:
            return AGAIN
        self.operations += 1
        try:
            value = self._rules.run(self.state, step, verb, arguments)
        except StoreError as refusal:
            return [ERROR, *to_record(refusal)]
        return AGAIN if value is None and VERBS[verb].waits_for else [VALUE, value]  # its caller waited, once

    def _drop_news(self) -> None:
        """Nobody waits for news during a replay."""
        if not self.state.effects:
            return
        for session_id in self.state.take_effects().noticed:
            session = self.state.sessions.get(session_id)
            if session is not None:
                del session.notices[:-NOTICES_KEPT]


def _with_pairs(head: RecordHead) -> list[Any]:
    """The arguments of a step; pairs of ids, which are lists in a record, are tuples again."""
    if head.kind == "advance":
        expired, withdrawn, *rest = head.arguments
        return [expired, [(session_id, (key[0], key[1])) for session_id, key in withdrawn], *rest]
    if head.kind in ("take_back", "acknowledge"):
        session_id, keys = head.arguments
        return [session_id, [(key[0], key[1]) for key in keys]]
    return head.arguments


def replay(
    reader: JournalReader,
    *,
    before: Callable[[int], None] = lambda record: None,
    stop_at: int | None = None,
    progress: ReadingProgress | None = None,
) -> Replay:
    """Replay a journal to its end, or to the record before `stop_at`; `before` is called with the number of each.

    A snapshot counts as the newest record that it holds.
    """
    progress = progress or ReadingProgress()
    progress.known_last, progress.kilobytes_in_all = reader.known_last, reader.size_bytes // 1000
    replayed = Replay()
    if reader.snapshot is not None:
        before(reader.position.record)
        replayed = Replay.from_snapshot(reader.snapshot, progress)
    for number, record in reader:
        if number == stop_at:
            break
        before(number)
        progress.advance(number, reader.bytes_read)
        failpoint("replay.record")
        replayed.apply(number, record, reader.format)
    return replayed
