"""How far reading a journal has come, in a file that survives whoever reads.

So a record that ends its reader again and again is found.

Not here: reading (`opening`).
"""

from __future__ import annotations

import mmap
import os
import struct
from pathlib import Path

NAME = "progress"
_FORM = struct.Struct("<QQ")  # the record that is being read (0: none), how often that has ended a process before


class Progress:
    """Marks each record while it is read."""

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
