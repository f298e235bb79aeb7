"""The state of a store, made anew from its journal: a snapshot, and every record behind it through the same core.

Bodies of spans are not kept: they stay where they are on disk. What the writer found of its state from time to time is
compared with what is found here.
Not here: finding and checking the records (`reading`), going on from there (`service`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from raystore.core import format1, verbs, wanted, watchdog
from raystore.core.batches import Item, Run, to_keep
from raystore.core.digest import verify
from raystore.core.line import AGAIN, ERROR, VALUE, Kept, Reply
from raystore.core.records import Config
from raystore.core.state import Session, Settings, State, Step
from raystore.core.steps import STEPS
from raystore.core.verbs import CHANGING
from raystore.errors import StoreError, to_record
from raystore.journal import records, snapshot_file
from raystore.journal.failpoints import failpoint
from raystore.journal.files import Place
from raystore.journal.format import FORMAT, Head
from raystore.journal.progress import Watch
from raystore.journal.reader import Reading
from raystore.journal.records import Told
from raystore.wire import frames

WAITING = frozenset({"dequeue", "take"})  #: what changes something and may wait before it does
NOTICES_KEPT = 1_000  #: of a session; which of them it has seen is not known, so the newest come again


class _Begun(NamedTuple):
    """The newest batch of a session, which may go on."""

    record: int  # number of the record with its bytes
    sequence: int
    run: Run | format1.Run
    parts: list[bytes]


class Rules(NamedTuple):
    """By which rules records are done again."""

    run: Callable[..., Any]
    steps: dict[str, Callable[..., Any]]
    resume: Callable[..., None]
    run_of: type[Run] | type[format1.Run]
    are_digests_compared: bool
    begin: Callable[[State, Settings], None]  # a process, after another one with other settings


def _begin(state: State, before: Settings) -> None:
    format1.go_on(state)
    wanted.introduce(state, before)


#: Whoever changes what a record does, or what a digest covers, gives the old rules a file and an entry here.
_RULES = {
    1: Rules(format1.run, format1.STEPS, format1.resume, format1.Run, False, lambda state, before: None),
    FORMAT: Rules(verbs.run, STEPS, watchdog.resume, Run, True, _begin),
}


class Replay:
    """A state that follows a journal."""

    def __init__(self) -> None:
        self.state: State = State(Settings(eviction_bytes=1, safe_bytes=0))
        self.last: int = 0  # number of the newest record
        self.now: float = 0.0  # its time
        self.started: dict[str, Any] = {}  # what the newest process said of itself
        self.operations: int = 0  # that were done again
        self.differences: list[int] = []  # records at which the writer had found something else
        self.state.spans.keeps_bodies = False
        self._settings: dict[str, Any] = {}
        self._runs: dict[str, _Begun] = {}  # by session
        self._indexes: snapshot_file.IndexFile | None = None
        self._rules = _RULES[FORMAT]  # of the record that is done again

    @classmethod
    def of_snapshot(cls, path: Path, watch: Watch | None = None) -> Replay:
        """The state that a snapshot holds."""
        follower = cls()
        state = follower.state
        *_, format_ = snapshot_file.read_head(path)
        follower._indexes, more = snapshot_file.read(path, state, watch)
        follower.last, follower.now, follower.started = more["last"], more["now"], more["started"]
        follower._configure(more["settings"])
        for session_id, record, sequence, parts, number, cut in more["runs"]:
            header, *operations = frames.split(parts, None)
            kept = state.sessions[session_id].line.kept.get(sequence) or Kept(header[6], [])
            run = _RULES[format_].run_of(state, state.sessions[session_id], kept, operations)
            run.go_on(number, [Item(*row) for row in cut])
            follower._runs[session_id] = _Begun(record, sequence, run, parts)
        state.spans.written = follower.last
        return follower

    def write(self, path: Path, place: Place) -> set[int]:
        """Write a snapshot, which goes up to a place; the numbers of the records that hold bodies of its spans."""
        runs = [
            (session_id, begun.record, begun.sequence, begun.parts, begun.run.next, [tuple(i) for i in begun.run.cut])
            for session_id, begun in self._runs.items()
            if session_id in self.state.sessions and isinstance(begun.run, Run) and begun.run.may_change
        ]
        more = {
            "last": self.last, "now": self.now, "started": self.started, "settings": self._settings, "runs": runs,
        }  # fmt: skip
        told = {"offset": place.offset, "who": self.started}
        head = Head(self.started["store_id"], place.epoch, place.number, place.last + 1, more=told)
        return snapshot_file.write(path, head, self.state, self._indexes, more)

    def feed(self, number: int, record: list[memoryview], format_: int = FORMAT) -> None:
        """Do what one record says, by the rules of the format in which it was written."""
        self._rules = _RULES[format_]
        told = records.unpack(record[0])
        self.last, self.now = number, told.now
        self.state.spans.written = number
        kinds: dict[str, Callable[[Told, list[memoryview]], None]] = {
            records.START: self._start,
            records.BATCH: self._batch,
            records.MORE: self._more,
            records.CALL: self._call,
            records.LEFT_OUT: self._left_out,
            records.VERIFIED: self._verified,
        }
        known = kinds.get(told.kind)
        if known is not None:
            known(told, record)
        else:
            self.operations += 1
            self._rules.steps[told.kind](self.state, self._step(told), *_keys_restored(told))
        self._forget_news()

    def _step(self, told: Told) -> Step:
        step = told.step()
        step.session = self.state.sessions.get(told.session_id) if told.session_id is not None else None
        return step

    def _session(self, told: Told) -> Session:
        assert told.session_id is not None
        return self.state.sessions[told.session_id]

    def _start(self, told: Told, record: list[memoryview]) -> None:
        self.started, settings, _, away = told.arguments
        before = self.state.settings
        self._configure(settings)
        self._rules.begin(self.state, before)
        if away is not None:
            self._rules.resume(self.state, told.step(), away)

    def _configure(self, settings: dict[str, Any]) -> None:
        self._settings = settings
        default_config = Config(*settings["default_config"])
        self.state.configure(Settings(**{**settings, "default_config": default_config}))

    def _verified(self, told: Told, record: list[memoryview]) -> None:
        count, digest = told.arguments
        found = verify(self.state, count)
        if found != digest and self._rules.are_digests_compared:
            self.differences.append(self.last)

    # -- operations --------------------------------------------------------------------------------------------------

    def _batch(self, told: Told, record: list[memoryview]) -> None:
        parts = [bytes(part) for part in record[1:]]
        header, *operations = frames.split(parts, None)
        _, _, session_id, sequence, answered, ahead, first_ticket, *_ = header
        line = self._session(told).line
        line.heard(answered, ahead)
        count, begun = told.arguments
        kept = line.begin(sequence, first_ticket)
        del kept.replies[begun:]
        kept.replies.extend([AGAIN] * (begun - len(kept.replies)))  # what left no record changed nothing
        run = self._rules.run_of(self.state, self._session(told), kept, operations)
        self._runs[session_id] = _Begun(self.last, sequence, run, parts)
        self._run(told, count)

    def _more(self, told: Told, record: list[memoryview]) -> None:
        self._run(told, told.arguments[1])

    def _run(self, told: Told, count: int) -> None:
        session, step = self._session(told), self._step(told)
        step.record, _, run, _ = self._runs[session.session_id]
        for _ in range(count):
            item = next(iter(run))
            step.operation = item.number
            run.answer(item, self._operation(step, item.verb, item.arguments))

    def _call(self, told: Told, record: list[memoryview]) -> None:
        verb, arguments = frames.unpack(record[1], [], (bytes(part) for part in record[2:]))
        step = self._step(told)
        step.record = self.last
        reply = self._operation(step, verb, arguments)
        self._session(told).line.note(told.arguments[0], to_keep(verb, arguments, reply))

    def _left_out(self, told: Told, record: list[memoryview]) -> None:
        _, name, arguments = told.arguments
        run = self._runs[self._session(told).session_id].run
        run.answer(next(iter(run)), [ERROR, name, arguments])

    def _operation(self, step: Step, verb: str, arguments: dict[str, Any]) -> Reply:
        if verb not in CHANGING:
            return AGAIN
        self.operations += 1
        try:
            value = self._rules.run(self.state, step, verb, arguments)
        except StoreError as refusal:
            return [ERROR, *to_record(refusal)]
        return AGAIN if value is None and verb in WAITING else [VALUE, value]  # it waited, once

    def _forget_news(self) -> None:
        """Nobody waits while the past is repeated."""
        state = self.state
        state.finished.clear()
        state.came_back = False
        state.queues_touched.clear()
        state.ended.clear()
        state.resources.freed.clear()
        for session_id in state.noticed:
            session = state.sessions.get(session_id)
            if session is not None:
                del session.notices[:-NOTICES_KEPT]
        state.noticed.clear()


def _keys_restored(told: Told) -> list[Any]:
    """The arguments of a step; rollout and attempt ids that were pairs are pairs again."""
    if told.kind == "advance":
        expired, withdrawn, *rest = told.arguments
        return [expired, [(session_id, (key[0], key[1])) for session_id, key in withdrawn], *rest]
    if told.kind in ("take_back", "acknowledge"):
        session_id, keys = told.arguments
        return [session_id, [(key[0], key[1]) for key in keys]]
    return told.arguments


def replay(
    reading: Reading,
    *,
    before: Callable[[int], None] = lambda record: None,
    stop_at: int | None = None,
    watch: Watch | None = None,
) -> Replay:
    """Follow a journal to its end, or to the record before `stop_at`; `before` is told of each that is next.

    A snapshot counts as the newest record that it holds.
    """
    watch = watch or Watch()
    watch.least = reading.least
    follower = Replay()
    if reading.snapshot is not None:
        before(reading.place.last)
        follower = Replay.of_snapshot(reading.snapshot, watch)
    for number, record in reading:
        if number == stop_at:
            break
        before(number)
        watch.step(number)
        failpoint("replay.record")
        follower.feed(number, record, reading.format)
    return follower
