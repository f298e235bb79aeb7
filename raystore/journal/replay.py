"""The state of a store, made anew from its journal: every record through the same core, in order.

Pure but for the source of records. Bodies of spans are not kept: they stay where they are on disk.
Not here: finding and checking the records (`segments`), going on from there (`service`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from raystore import wire
from raystore.core import verbs, watchdog
from raystore.core.batches import Run, to_keep
from raystore.core.line import AGAIN, ERROR, VALUE, Reply
from raystore.core.records import Config
from raystore.core.state import Session, Settings, State, Step
from raystore.core.steps import STEPS
from raystore.core.verbs import CHANGING
from raystore.errors import StoreError, to_record
from raystore.journal import records
from raystore.journal.records import Told

WAITING = frozenset({"dequeue", "take"})  #: what changes something and may wait before it does
NOTICES_KEPT = 1_000  #: of a session; which of them it has seen is not known, so the newest come again


class Replay:
    """A state that follows a journal."""

    def __init__(self) -> None:
        self.state = State(Settings(eviction_bytes=1, safe_bytes=0))
        self.last = 0  # number of the newest record
        self.now = 0.0  # its time
        self.started: dict[str, Any] = {}  # what the newest process said of itself
        self.state.spans.keeps_bodies = False
        self._runs: dict[str, tuple[int, Run]] = {}  # by session: number of the record with its bytes, and the run

    def feed(self, number: int, record: list[memoryview]) -> None:
        """Do what one record says."""
        told = records.unpack(record[0])
        self.last, self.now = number, told.now
        self.state.spans.written = number
        kinds: dict[str, Callable[[Told, list[memoryview]], None]] = {
            records.START: self._start,
            records.BATCH: self._batch,
            records.MORE: self._more,
            records.CALL: self._call,
            records.LEFT_OUT: self._left_out,
        }
        known = kinds.get(told.kind)
        if known is not None:
            known(told, record)
        else:
            STEPS[told.kind](self.state, self._step(told), *_keys_restored(told))
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
        default_config = Config(*settings["default_config"])
        self.state.configure(Settings(**{**settings, "default_config": default_config}))
        if away is not None:
            watchdog.resume(self.state, told.step(), away)

    # -- operations --------------------------------------------------------------------------------------------------

    def _batch(self, told: Told, record: list[memoryview]) -> None:
        header, *operations = wire.split([bytes(part) for part in record[1:]], None)
        _, _, session_id, sequence, answered, ahead, first_ticket, *_ = header
        line = self._session(told).line
        line.heard(answered, ahead)
        count, begun = told.arguments
        kept = line.begin(sequence, first_ticket)
        kept.replies.extend([AGAIN] * (begun - len(kept.replies)))  # what left no record changed nothing
        run = Run(self.state, kept, operations)
        self._runs[session_id] = (self.last, run)
        self._run(told, count)

    def _more(self, told: Told, record: list[memoryview]) -> None:
        self._run(told, told.arguments[1])

    def _run(self, told: Told, count: int) -> None:
        session, step = self._session(told), self._step(told)
        step.record, run = self._runs[session.session_id]
        for _ in range(count):
            item = next(iter(run))
            step.operation = item.number
            run.answer(item, self._operation(step, item.verb, item.arguments))

    def _call(self, told: Told, record: list[memoryview]) -> None:
        verb, arguments = wire.unpack(record[1], [], (bytes(part) for part in record[2:]))
        step = self._step(told)
        step.record = self.last
        reply = self._operation(step, verb, arguments)
        self._session(told).line.note(told.arguments[0], to_keep(verb, reply))

    def _left_out(self, told: Told, record: list[memoryview]) -> None:
        _, name, arguments = told.arguments
        _, run = self._runs[self._session(told).session_id]
        run.answer(next(iter(run)), [ERROR, name, arguments])

    def _operation(self, step: Step, verb: str, arguments: dict[str, Any]) -> Reply:
        if verb not in CHANGING:
            return AGAIN
        try:
            value = verbs.run(self.state, step, verb, arguments)
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


def replay(numbered: Iterable[tuple[int, list[memoryview]]]) -> Replay:
    """Follow a journal to its end."""
    follower = Replay()
    for number, record in numbered:
        follower.feed(number, record)
    return follower
