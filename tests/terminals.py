"""A pseudo-terminal: what a program draws on it, and a program that runs on it."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import termios
import textwrap
import threading
from collections.abc import Mapping
from typing import Self

COLUMNS = 100


class Terminal:
    """A pseudo-terminal of this process; `stream` writes to it, `read` says what was written so far."""

    def __init__(self, *, columns: int = COLUMNS) -> None:
        self._ours, theirs = pty.openpty()
        modes = termios.tcgetattr(theirs)
        modes[1] &= ~termios.ONLCR  # a new line stays one character
        termios.tcsetattr(theirs, termios.TCSANOW, modes)
        termios.tcsetwinsize(theirs, (40, columns))
        self.stream = os.fdopen(theirs, "w")
        self._data = b""
        self._thread = threading.Thread(target=self._collect, daemon=True)
        self._thread.start()

    def _collect(self) -> None:
        while True:
            try:
                part = os.read(self._ours, 65536)
            except OSError:  # the other end is closed
                return
            if not part:
                return
            self._data += part

    def read(self) -> str:
        """Everything that was written; ends the terminal."""
        self.stream.close()
        self._thread.join(10)
        return self._data.decode()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if not self.stream.closed:
            self.stream.close()
        self._thread.join(10)
        os.close(self._ours)


def run_on_terminal(code: str, *, environment: Mapping[str, str] | None = None, seconds: float = 90) -> tuple[str, str]:
    """Run a program whose stderr is a terminal; what it printed, and what it drew."""
    kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    with Terminal() as terminal:
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, stderr=terminal.stream, text=True,
            timeout=seconds, check=True, env={**kept, "TERM": "xterm", **(environment or {})},
        )  # fmt: skip
        return done.stdout, terminal.read()
