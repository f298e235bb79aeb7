"""Keeping a journal short: when enough was written since the last snapshot, a helper process makes the next one.

The writer begins a new segment, and the helper reads the closed ones; the store's own process only starts the helper
and hears of its end. From time to time the digest of the rollouts that were touched longest ago is recorded, and every
replay must find the same. If a helper does not, that is logged as critical, and nothing more is deleted.
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
from subprocess import DEVNULL, PIPE
from typing import Any, cast

from raystore.core.snapshot import verify
from raystore.core.state import State
from raystore.journal.compaction import Outcome
from raystore.journal.files import SNAPSHOT, Directory
from raystore.journal.recorder import Recorder
from raystore.journal.writer import SEGMENT_BYTES

logger: logging.Logger = logging.getLogger("raystore.store")

VERIFY_LAG = 2_000  #: so many rollouts are touched before the first of them is verified: most have come to rest then
VERIFY_AT_ONCE = 64

OPERATIONS = 30_000  #: since the last snapshot; reading so many again takes one to two seconds
MOST_FAILURES = 8  #: each doubles the number of operations before the next try
SHARE = 10  #: and one operation for so many rollouts, since each is read and written again


class Snapshotter:
    """Lets helpers make snapshots for one writer of a journal."""

    def __init__(
        self, directory: Directory, epoch: int, operations: int, on_snapshot: Callable[[], None], *, failed: str = ""
    ) -> None:
        """`operations` is how many were replayed behind the last snapshot; `failed`, why there must be no more.

        `on_snapshot` is called on a thread of its own when a helper has replaced files.
        """
        self.directory = directory
        self.epoch = epoch
        self.snapshots_made: int = 0
        self.longest_seconds: float = 0.0  # that the store was held up by a digest
        self.failed: str = failed  # why there will be no more snapshots
        self.last: Outcome = {}  # of the last helper that made a snapshot
        self._on_snapshot = on_snapshot
        self._since = -operations  # number of the operation behind the last snapshot
        self._seen = 0  # operations of this writer
        self._counted = 0  # of them, up to the segment that is being replaced
        self._to_verify = 0  # rollouts before the segment may be closed
        self._is_asked = False  # a snapshot is due, and its helper has not ended
        self._bytes = 0  # closed since the last snapshot
        self._failures = 0
        self._lock = threading.Lock()
        self._is_closed = False
        self._helper: subprocess.Popen[bytes] | None = None
        self._thread: threading.Thread | None = None

    @property
    def operations(self) -> int:
        """How many were recorded since the last snapshot."""
        return self._seen - self._since

    def statistics(self) -> dict[str, Any]:
        """The part of `statistics()` about the journal."""
        return {
            "operations_since_snapshot": self.operations,
            "snapshots": self.snapshots_made,
            "snapshot_bytes": self.last.get("bytes", 0),
            "snapshot_seconds": self.last.get("seconds", 0.0),
            "helper_rss_bytes": self.last.get("rss", 0),
            "longest_pause_seconds": self.longest_seconds,
            "failed": self.failed,
        }

    def after_step(self, recorder: Recorder, state: State, now: float) -> None:
        """Do what is due after a step: record a digest, or close the segment so that a helper can replace it."""
        self._seen = recorder.operations
        touched = len(state.touched)
        if touched and (touched > VERIFY_LAG or self._to_verify > 0):
            started = time.perf_counter()
            recorder.verified(now, VERIFY_AT_ONCE, verify(state, VERIFY_AT_ONCE))
            self.longest_seconds = max(self.longest_seconds, time.perf_counter() - started)
        if self._to_verify > 0:
            self._to_verify -= VERIFY_AT_ONCE
            if self._to_verify <= 0:
                recorder.writer.rotate()
        elif not self._is_asked and self._is_due(len(state.entries)):
            self._is_asked = True
            self._to_verify = touched + 1

    def _is_due(self, rollouts: int) -> bool:
        return self.operations >= max(OPERATIONS, rollouts // SHARE) << self._failures and not self.failed

    def segment_closed(self, number: int, size: int, is_asked: bool) -> None:
        """Start a helper if it is time; called on the writer's thread (`writer.OnSegmentClosed`)."""
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
            name = "raystore-snapshotter"
            self._thread = threading.Thread(target=self._run_helper, args=(number,), name=name, daemon=True)
            try:
                self._thread.start()
            except RuntimeError as error:  # the system has no thread left; the journal itself can go on
                self._thread, self._is_asked = None, False
                self._put_off(str(error))

    def _run_helper(self, number: int) -> None:
        """Run a helper to its end, on a thread of its own."""
        command = [sys.executable, "-m", "raystore.journal.compaction"]
        command += [str(self.directory.path), str(self.epoch), str(number)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        outcome: Outcome
        try:
            with self._lock:
                if self._is_closed:
                    return
                # Ray ends a worker with its process group, and the helper is to finish. In a session of its own the
                # system would count it apart, and its low priority would have no effect.
                helper = self._helper = subprocess.Popen(
                    command, stdin=DEVNULL, stdout=PIPE, stderr=PIPE, env=environment, process_group=0
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
                self._failures, self.last, self.snapshots_made = 0, outcome, self.snapshots_made + 1
                self._since = self._counted
        if self.failed:
            logger.critical("Journal %s: %s; nothing of it is deleted any more", self.directory.path, self.failed)
        elif "error" not in outcome:
            self._on_snapshot()

    def _is_there(self, number: int) -> bool:
        """Whether there is a snapshot that goes up to a segment."""
        snapshots = self.directory.segments(SNAPSHOT)
        return bool(snapshots) and snapshots[-1][:2] >= (self.epoch, number)

    def _put_off(self, why: str) -> None:
        """No snapshot was made; wait twice as long for the next try."""
        self._failures = min(self._failures + 1, MOST_FAILURES)
        logger.warning("Journal %s: no snapshot was made (%s); trying later", self.directory.path, why)

    def close(self) -> None:
        """End the helper, if there is one: an unfinished snapshot does not count."""
        with self._lock:
            self._is_closed = True
            helper, thread = self._helper, self._thread
        if helper is not None:
            helper.kill()
        if thread is not None:
            thread.join()


def _outcome(stdout: bytes, stderr: bytes, code: int) -> Outcome:
    """The outcome that a helper printed, or an error if it did not come to its end."""
    said = stderr.decode(errors="replace").strip()[-2000:]
    if code < 0:
        number = -code
        name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
        hint = "; the system may be out of memory" if number == signal.SIGKILL else ""
        return {"error": f"the helper was ended by {name}{hint}{': ' + said if said else ''}"}
    try:
        outcome = json.loads(stdout.rstrip().rpartition(b"\n")[2])
    except ValueError:
        outcome = None
    if not isinstance(outcome, dict):
        return {"error": f"the helper ended with code {code} and said nothing of a snapshot. {said}".strip()}
    if code and not outcome.keys() & {"differs", "error"}:
        return {"error": f"the helper ended with code {code}. {said}".strip()}
    return cast(Outcome, outcome)
