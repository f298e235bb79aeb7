"""Beginning to write a journal: as a new run, or going on with the one that is there.

Not here: the options (`config`), replay itself (`replay`).
"""

from __future__ import annotations

import logging
import secrets
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

from raystore.core import format1, wanted, watchdog
from raystore.core.state import Settings, State, Step
from raystore.errors import (
    FencedError,
    InvalidValueError,
    JournalFullError,
    JournalHeldError,
    JournalInUseError,
    JournalMissingError,
    StoreError,
)
from raystore.journal import records
from raystore.journal.compaction import rewrite
from raystore.journal.failpoints import failpoint
from raystore.journal.files import RECORDS, SNAPSHOT, Directory, Place
from raystore.journal.progress import Progress, Watch
from raystore.journal.reader import Reading, settled
from raystore.journal.recorder import Recorder
from raystore.journal.replay import Replay, replay
from raystore.journal.snapshotter import Keeper
from raystore.journal.writer import FULL_SECONDS, Log, is_full
from raystore.options import StoreConfig

logger = logging.getLogger("raystore.store")

HOLD_AFTER = 2  #: processes that end at the same record: the next one serves what was before it, and goes no further


@dataclass(slots=True)
class Opened:
    """A journal that is being written, and the state to go on from."""

    state: State
    directory: Directory
    recorder: Recorder | None  # None: for reading only
    store_id: str
    epoch: int
    not_before: float  # the clock of the run stands there
    remarks: list[str]
    keeper: Keeper | None = None
    held: StoreError | None = None  # why nothing may be written


def open_journal(
    config: StoreConfig,
    settings: Settings,
    *,
    name: str | None,
    resume: str,
    now: float,
    writer: str | None = None,
    watch: Watch | None = None,
) -> Opened:
    """Become the writer of a store's journal.

    `resume`: "auto" goes on with the run that is there, if it is of this store, and begins one if there is none; "must"
    goes on, with whatever run, also if its writer seems alive; "never" begins one where there is none; "again" is for
    a process that takes the place of another of the same `writer`, which must find its run, and nobody else's since.
    `now` is the wall clock. Who opens a long one on a thread may `watch` it.
    """
    assert config.journal is not None
    directory = usable(config.journal)
    _check(directory, name, resume, writer)
    try:
        _make(directory)
        is_forced = resume == "must"
        return _begin(
            directory, config, settings, watch or Watch(), name=name, now=now, writer=writer, is_forced=is_forced
        )
    except OSError as error:
        if is_full(error):
            raise JournalFullError(str(directory.path), FULL_SECONDS) from None
        raise


def usable(path: str | Path, *, to_write: bool = True) -> Directory:
    """Where a journal is, or is to be; raises for a path at which no process of this user on this machine can do so."""
    directory = Directory(path)
    if (expected := directory.unusable(to_write=to_write)) is not None:
        raise InvalidValueError("journal", str(directory.path), expected)
    return directory


def _make(directory: Directory) -> None:
    try:
        directory.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if is_full(error):
            raise
        expected = f"a directory that is there, or can be made ({error.strerror}); name another"
        raise InvalidValueError("journal", str(directory.path), expected) from None


def _begin(
    directory: Directory,
    config: StoreConfig,
    settings: Settings,
    watch: Watch,
    *,
    name: str | None,
    now: float,
    writer: str | None,
    is_forced: bool,
) -> Opened:
    epoch = directory.begin_epoch()
    failpoint("opening.epoch")
    progress = Progress(directory.path)
    stop_at = progress.died_at if progress.deaths >= HOLD_AFTER and not is_forced else None

    def read() -> tuple[Reading, Replay]:
        reading = Reading(directory, epoch)
        if stop_at is not None and reading.place.last == stop_at:
            raise JournalHeldError(str(directory.path), stop_at, progress.deaths)
        return reading, replay(reading, before=progress.at, stop_at=stop_at, watch=watch)

    try:
        reading, found = settled(read)
    except StoreError:
        progress.done()  # which is told, and is no death
        raise
    if stop_at is not None:
        held = JournalHeldError(str(directory.path), stop_at, progress.deaths)
        logger.critical("%s", held)
        progress.at(stop_at)
        found.state.guard_all()
        format1.go_on(found.state)
        wanted.configure(found.state, settings)
        return Opened(
            found.state, directory, None, found.started["store_id"], epoch, found.now, [str(held)], held=held
        )  # fmt: skip
    progress.done()
    failpoint("opening.read")
    reading.sync()  # of a process that died, the last records may be in the system's memory only
    if reading.is_old and found.started:
        rewrite(directory, found, reading.place)
    store_id = found.started.get("store_id") or secrets.token_hex(8)
    first = reading.place.last + 1
    log = Log(directory, store_id=store_id, epoch=epoch, first=first, durability=config.durability)
    who = {"store_id": store_id, "name": name if name is not None else found.started.get("name"), "writer": writer}
    remarks = [
        f"{cut.bytes} bytes behind byte {cut.offset} of {cut.segment} were never finished, and are left out"
        for cut in reading.cuts
    ]
    remarks += [f"a replay differs from what the store was at record {number}" for number in found.differences]
    for remark in remarks:
        logger.warning("Journal %s: %s", directory.path, remark)
    return go_on(found, log, settings, who=who, after=reading.place, now=now, remarks=remarks)


def go_on(
    found: Replay, log: Log, settings: Settings, *, who: dict[str, Any], after: Place, now: float, remarks: list[str]
) -> Opened:
    """Write down that a process begins, and let what it found be what it goes on from."""
    state = found.state
    step = Step(max(now, found.now))
    away = step.now - found.now if found.started else None
    told = asdict(settings) | {"default_config": settings.default_config.row()}
    begun: list[Any] = [who, told, astuple(after), away]
    log.append([records.pack(records.START, step, 0, None, begun)])
    format1.go_on(state)
    wanted.configure(state, settings)
    if away is not None:
        watchdog.resume(state, step, away)
    state.spans.keeps_bodies = True
    keeper = Keeper(log.directory, log.epoch, found.operations)
    if found.differences:
        keeper.failed = remarks[-1]  # the evidence is kept
    log.on_closed = keeper.closed
    return Opened(state, log.directory, Recorder(log), who["store_id"], log.epoch, found.now, remarks, keeper)


def _check(directory: Directory, name: str | None, resume: str, writer: str | None) -> None:
    """Refuse to write where that is not what was asked for, before anybody who writes there is disturbed."""
    path = str(directory.path)
    is_there = bool(directory.segments(RECORDS, SNAPSHOT))
    if resume == "never" and is_there:
        raise JournalInUseError(path, "it holds a run, and resume='never' asks for a new one; take an empty directory")
    if resume == "must" and not is_there:
        raise JournalMissingError(path, "resume='must' asks for a run")
    if resume == "again" and not is_there:
        raise JournalMissingError(path, "this store wrote one before it was restarted, perhaps on another node")
    if resume == "auto" and (running := directory.writer()) is not None:
        raise JournalInUseError(path, f"a running store writes it ({running}). Connect to that store, or end it first")
    who = settled(lambda: Reading(directory).who)
    if resume == "again" and who and who.get("writer") != writer:
        raise FencedError(path, max(directory.epochs()))
    theirs = who.get("name")
    if resume == "auto" and name is not None and theirs is not None and theirs != name:
        raise JournalInUseError(
            path,
            f"it holds the run of store {theirs!r}, and this is {name!r}. Start that one, or take another directory; "
            "resume='must' goes on with it under this name",
        )


def read_run(path: str | Path) -> Replay:
    """The state that a journal holds, without becoming its writer."""
    directory = usable(path, to_write=False)
    if not directory.segments(RECORDS, SNAPSHOT):
        raise JournalMissingError(str(directory.path), "there are no segments")
    return settled(lambda: replay(Reading(directory)))


def open_for_reading(path: str | Path) -> Opened:
    """A run to look at; whoever writes it is not disturbed."""
    found = read_run(path)
    found.state.guard_all()
    format1.go_on(found.state)
    epoch = max(Directory(path).epochs(), default=0)
    return Opened(found.state, Directory(path), None, found.started["store_id"], epoch, found.now, [])
