"""A pseudo-terminal: what a program draws on it, what is typed, and a program that runs on it."""

from __future__ import annotations

import errno
import os
import pty
import subprocess
import sys
import termios
import textwrap
import threading
import time
from collections.abc import Mapping
from typing import Self

END = b"\x1c"  # written last, so that all that came before is known to be read


class Terminal:
    """A pseudo-terminal of some width, which keeps all that is written to it; `stream` is the program's end."""

    def __init__(self, columns: int = 120) -> None:
        self._ours, theirs = pty.openpty()
        modes = termios.tcgetattr(theirs)
        modes[1] &= ~termios.ONLCR  # a new line stays one character
        termios.tcsetattr(theirs, termios.TCSANOW, modes)
        termios.tcsetwinsize(theirs, (40, columns))
        self.stream = os.fdopen(theirs, "w", encoding="utf-8")
        self._written = b""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        try:
            while data := os.read(self._ours, 65536):
                self._written += data
        except OSError as error:
            if error.errno != errno.EIO:  # how Linux says that nobody has the other end any more
                raise
        finally:
            os.close(self._ours)  # by whoever reads, or another file of this number would be read

    @property
    def text(self) -> str:
        """What was written so far."""
        return self._written.removesuffix(END).decode(errors="replace")

    def type(self, keys: str) -> None:
        """Press keys."""
        os.write(self._ours, keys.encode())

    def until(self, part: str, within: float = 30.0) -> None:
        """Wait until this was written."""
        deadline = time.monotonic() + within
        while part not in self.text:
            assert time.monotonic() < deadline, f"{part!r} was not written: {self.text!r}"
            time.sleep(0.01)

    def close(self) -> None:
        """End it, once all is read."""
        self.stream.flush()
        os.write(self.stream.fileno(), END)
        deadline = time.monotonic() + 30
        while not self._written.endswith(END):
            assert time.monotonic() < deadline, f"the end of what was written has not come: {self.text!r}"
            time.sleep(0.001)
        self.stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def run_on_terminal(code: str, *, environment: Mapping[str, str] | None = None, seconds: float = 90) -> tuple[str, str]:
    """Run a program whose stderr is a terminal; what it printed, and what it drew."""
    kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    with Terminal(100) as terminal:
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, stderr=terminal.stream, text=True,
            timeout=seconds, check=True, env={**kept, "TERM": "xterm", **(environment or {})},
        )  # fmt: skip
    return done.stdout, terminal.text
