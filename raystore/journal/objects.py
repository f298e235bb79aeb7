"""The large objects of a journal: which of its files are needed, and how a process proves that it sees them.

Whoever publishes an object writes its file, once the store has the version that refers to it; the file goes when no
version refers to it any more. What a crash left is cleared away when the next process begins.
Not here: the form of a file, reading and writing one (`raystore.values.objects`).
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Collection, Iterable
from typing import Any

from raystore.journal.files import Directory
from raystore.values.objects import TOKEN, ObjectFiles

OBJECTS = "objects"  #: the directory, in that of the journal


class JournalObjects:
    """The files of the objects of one journal, for the process that writes it."""

    def __init__(self, directory: Directory, *, needed: Collection[str], bound: int) -> None:
        """`needed` are the addresses of objects that some version refers to; `bound` is the size of the largest."""
        self.files: ObjectFiles = ObjectFiles(directory.path / OBJECTS)
        self.bound = bound
        self._clear_away(needed)

    def _clear_away(self, needed: Collection[str]) -> None:
        with contextlib.suppress(FileNotFoundError):
            for name in os.listdir(self.files.path):
                if name != TOKEN and name not in needed:
                    (self.files.path / name).unlink(missing_ok=True)

    def told(self) -> dict[str, Any]:
        """What a client is told: where the files are, and what stands in the token there."""
        try:
            token = self._token()
        except OSError:  # the directory is gone, which the writer of the journal finds out as well
            token = secrets.token_hex(16)  # that nobody finds
        return {"path": str(self.files.path), "token": token, "bound": self.bound}

    def _token(self) -> str:
        path = self.files.path
        path.mkdir(mode=0o700, exist_ok=True)
        token = path / TOKEN
        if not token.exists():
            new = path / f"{TOKEN}.{os.getpid()}"
            new.write_text(secrets.token_hex(16))
            new.rename(token)
        return token.read_text()

    def remove(self, addresses: Iterable[str]) -> None:
        """Forget objects that nobody needs."""
        for address in addresses:
            self.files.file(address).unlink(missing_ok=True)
