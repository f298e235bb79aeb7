"""How far reading a journal has come: in a file that survives whoever reads, and for whoever waits for it.

So a record that ends its reader again and again is found, and a long reading is told from one that stands still.

Not here: reading (`opening`), waiting (`remote.handshake`).
"""

from __future__ import annotations

import logging
import mmap
import os
import struct
import time
from pathlib import Path
from typing import Any

logger: logging.Logger = logging.getLogger("raystore.store")

NAME = "progress"
TOLD_SECONDS = 10.0  #: between two lines of the log on a reading that takes long
_FORM = struct.Struct("<QQ")  # the record that is being read (0: none), how often that has ended a process before


class Progress:
    """Marks each record while it is read."""

    died_at: Any

    def __init__(self, path: Path) -> None:
        fd = os.open(path / NAME, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            if os.fstat(fd).st_size < _FORM.size:
                os.ftruncate(fd, _FORM.size)
            self._map = mmap.mmap(fd, _FORM.size)
        finally:
            os.close(fd)
        #: The record at which the process before ended, 0 if it did not; and how many have ended there in a row.
        self.died_at, before = _FORM.unpack_from(self._map)
        self.deaths = before + 1 if self.died_at else 0

    def at(self, record: int) -> None:
        """A record is about to be read; if that ends the process, the next one knows."""
        _FORM.pack_into(self._map, 0, record, self.deaths if record == self.died_at else 0)

    def done(self) -> None:
        """Everything has been read, or reading ended with an error that somebody is told."""
        _FORM.pack_into(self._map, 0, 0, 0)
        self._map.close()


class Watch:
    """What other threads see of a reading, and a line in the log now and then."""

    def __init__(self) -> None:
        self.steps: int = 0  #: grows as long as there is progress
        self.record: int = 0  #: that is being read; 0 before
        self.least = 0  #: the journal goes at least up to this record
        self._told_at = time.monotonic()

    def step(self, record: int | None = None) -> None:
        """Something was read: a part of a snapshot, or a record that comes next."""
        self.steps += 1
        if record is not None:
            self.record = record
        if (now := time.monotonic()) > self._told_at + TOLD_SECONDS:
            self._told_at = now
            logger.info("Reading the journal: %s", self)

    def __str__(self) -> str:
        return f"at record {self.record} of {max(self.record, self.least)} or more"
