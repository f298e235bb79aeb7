"""Keeping a journal short: when enough has been written since the last snapshot, a helper process makes the next.

The writer goes on in a new segment, and the helper reads what is closed; the store's own process does nothing but start
it and hear of its end. From time to time a digest of the rollouts that were touched longest ago is written down:
whoever reads the journal must find the same. If a helper does not, that is an alarm, and nothing more is deleted.
Not here: what the helper does (`compaction`).
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from raystore.core.digest import verify
from raystore.core.state import State
from raystore.journal.files import SNAPSHOT, Directory
from raystore.journal.recorder import Recorder
from raystore.journal.writer import SEGMENT_BYTES

logger: logging.Logger = logging.getLogger("raystore.store")

VERIFY_LAG = 2_000  #: so many rollouts are touched before the first of them is looked at: most have come to rest then
VERIFY_AT_ONCE = 64

OPERATIONS = 30_000  #: since the last snapshot; reading so many again takes one to two seconds
MOST_FAILURES = 8  #: each doubles what is waited for
SHARE = 10  #: and as many as so many rollouts, since each is read and written again


class Keeper:
    """Has a helper make snapshots for one writer of a journal."""

    def __init__(self, directory: Directory, epoch: int, operations: int) -> None:
        """`operations` are those that were read behind the last snapshot."""
        self.directory = directory
        self.epoch = epoch
        self._since = -operations  # number of the operation behind the last snapshot
        self._seen = 0  # operations of this writer
        self._counted = 0  # of them, up to the segment that is being replaced
        self._to_verify = 0  # rollouts before the segment may be closed
        self._is_asked = False
        self.made: int = 0  # snapshots
        self.longest_seconds: float = 0.0  # that the store was held up for a digest
        self.failed: str = ""  # why there will be no more
        self.last: dict[str, Any] = {}  # what the last helper said
        self.on_done: Callable[[], None] = lambda: None
        self._bytes = 0  # closed since the last snapshot
        self._failures = 0
        self._lock = threading.Lock()
        self._is_closed = False
        self._helper: subprocess.Popen[bytes] | None = None
        self._thread: threading.Thread | None = None

    @property
    def operations(self) -> int:
        """How many have been written since the last snapshot."""
        return self._seen - self._since

    def statistics(self) -> dict[str, Any]:
        """What `statistics()` says of a journal."""
        return {
            "operations_since_snapshot": self.operations,
            "snapshots": self.made,
            "snapshot_bytes": self.last.get("bytes", 0),
            "snapshot_seconds": self.last.get("seconds", 0.0),
            "helper_rss_bytes": self.last.get("rss", 0),
            "longest_pause_seconds": self.longest_seconds,
            "failed": self.failed,
        }

    def look(self, recorder: Recorder, state: State, now: float) -> None:
        """Do what is due after a step: write down a digest, go on in a new segment so that the one before can go."""
        self._seen = recorder.operations
        touched = len(state.touched)
        if touched and (touched > VERIFY_LAG or self._to_verify > 0):
            started = time.perf_counter()
            recorder.verified(now, VERIFY_AT_ONCE, verify(state, VERIFY_AT_ONCE))
            self.longest_seconds = max(self.longest_seconds, time.perf_counter() - started)
        if self._to_verify > 0:
            self._to_verify -= VERIFY_AT_ONCE
            if self._to_verify <= 0:
                recorder.log.rotate()
        elif not self._is_asked and self._is_due(len(state.entries)):
            self._is_asked = True
            self._to_verify = touched + 1

    def _is_due(self, rollouts: int) -> bool:
        return self.operations >= max(OPERATIONS, rollouts // SHARE) << self._failures and not self.failed

    def closed(self, number: int, size: int, is_asked: bool) -> None:
        """A segment was closed, because that `is_asked` or because it was full; on the writer's thread.

        Number 0 says that it was asked for in vain, since there is no room.
        """
        with self._lock:
            if not number:
                self._is_asked = False
                self._put_off("there is no room for another segment")
                return
            self._bytes += size
            enough = max(SEGMENT_BYTES, self.last.get("bytes", 0)) << self._failures
            if self._is_closed or self.failed or self._thread is not None or not (is_asked or self._bytes >= enough):
                return
            self._counted, self._bytes = self._seen, 0
            self._thread = threading.Thread(target=self._help, args=(number,), name="raystore-keeper", daemon=True)
            try:
                self._thread.start()
            except RuntimeError as error:  # the system has no thread left; the journal itself can go on
                self._thread, self._is_asked = None, False
                self._put_off(str(error))

    def _help(self, number: int) -> None:
        """Run a helper to its end, on a thread of its own."""
        command = [sys.executable, "-m", "raystore.journal.compaction"]
        command += [str(self.directory.path), str(self.epoch), str(number)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        try:
            with self._lock:
                if self._is_closed:
                    return
                helper = self._helper = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    env=environment,
                    # Ray ends a worker with its process group, and the helper is to finish. In a session of its own the
                    # system would count it apart, and that it is nice would help nobody.
                    process_group=0,
                )
            outcome = _outcome(*helper.communicate(), helper.returncode)
            if "bytes" in outcome and not self._is_there(number):
                outcome = {"error": "the helper says that it made one, and there is none"}
        except Exception as error:  # whatever it is, another helper must be able to begin
            outcome = {"error": f"{type(error).__name__}: {error}"}
        with self._lock:
            self._thread = self._helper = None
            self._is_asked = False
            if self._is_closed:
                return
            if "differs" in outcome:
                self.failed = f"a replay differs from the store at records {outcome['differs']}"
            elif "error" in outcome:
                self._put_off(outcome["error"])
            else:
                self._failures, self.last, self.made = 0, outcome, self.made + 1
                self._since = self._counted
        if self.failed:
            logger.critical("Journal %s: %s; nothing of it is deleted any more", self.directory.path, self.failed)
        elif "error" not in outcome:
            self.on_done()

    def _is_there(self, number: int) -> bool:
        """Whether there is a snapshot that goes up to a segment."""
        snapshots = self.directory.segments(SNAPSHOT)
        return bool(snapshots) and snapshots[-1][:2] >= (self.epoch, number)

    def _put_off(self, why: str) -> None:
        """No snapshot was made; the next try is after twice as much."""
        self._failures = min(self._failures + 1, MOST_FAILURES)
        logger.warning("Journal %s: no snapshot was made (%s); trying later", self.directory.path, why)

    def close(self) -> None:
        """End the helper, if there is one: what it has not finished does not count."""
        with self._lock:
            self._is_closed = True
            helper, thread = self._helper, self._thread
        if helper is not None:
            helper.kill()
        if thread is not None:
            thread.join()


def _outcome(told: bytes, errors: bytes, code: int) -> dict[str, Any]:
    """What came of a helper: what it said, and an error if it did not come to its end."""
    said = errors.decode(errors="replace").strip()[-2000:]
    if code < 0:
        number = -code
        name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
        hint = "; the system may be out of memory" if number == signal.SIGKILL else ""
        return {"error": f"the helper was ended by {name}{hint}{': ' + said if said else ''}"}
    try:
        outcome = json.loads(told.rstrip().rpartition(b"\n")[2])
    except ValueError:
        outcome = None
    if not isinstance(outcome, dict):
        return {"error": f"the helper ended with code {code} and said nothing of a snapshot. {said}".strip()}
    if code and not outcome.keys() & {"differs", "error"}:
        return {"error": f"the helper ended with code {code}. {said}".strip()}
    return outcome
