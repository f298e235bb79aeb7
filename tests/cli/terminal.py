"""A terminal for tests: commands write to a real pseudo-terminal, in this process or in one of their own."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raystore.cli.program import program

ROOT = Path(__file__).parents[2]
#: What a terminal may be sent: text, line ends, and colours. Anything else of a user's would have come through.
COLOURS = re.compile(r"\x1b\[[0-9;]*m")


_LEFT_OUT = ("RAY_ADDRESS", "RAY_AUTH_MODE", "NO_COLOR", "COLUMNS")  # of what a new process is given


@dataclass
class Shown:
    """What a command wrote, and its exit code."""

    code: int
    out: str
    err: str = ""

    @property
    def text(self) -> str:
        """Without colours."""
        return COLOURS.sub("", self.out)

    @property
    def lines(self) -> list[str]:
        """The same by line, without blanks at the ends."""
        return [line.rstrip() for line in self.text.splitlines()]


class Terminal:
    """A pseudo-terminal of some width, of which all that is written is kept."""

    def __init__(self, columns: int = 120) -> None:
        self.master, self.slave = pty.openpty()
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        self._written = bytearray()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # how Linux says that the other side is closed
            while data := os.read(self.master, 65536):
                self._written += data

    @property
    def text(self) -> str:
        """What was written so far."""
        return self._written.decode(errors="replace").replace("\r\n", "\n")

    def press(self, keys: str) -> None:
        """Type."""
        os.write(self.master, keys.encode())

    def until(self, part: str, within: float = 30.0) -> None:
        """Wait until this was written."""
        deadline = time.monotonic() + within
        while part not in self.text:
            assert time.monotonic() < deadline, f"{part!r} was not written: {self.text!r}"
            time.sleep(0.01)

    def close(self) -> None:
        """End it, once all is read."""
        os.close(self.slave)
        self._reader.join(5)
        os.close(self.master)


def here(*arguments: Any, columns: int = 120) -> Shown:
    """Run a command in this process, on a terminal."""
    terminal, err = Terminal(columns), io.StringIO()
    with (
        open(os.dup(terminal.slave), "w", encoding="utf-8") as out,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        code = _run(arguments)
    terminal.close()
    return Shown(code, terminal.text, err.getvalue())


def piped(*arguments: Any) -> Shown:
    """Run a command in this process, with its output going to no terminal."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = _run(arguments)
    return Shown(code, out.getvalue(), err.getvalue())


def _run(arguments: Any) -> int:
    try:
        program.main([str(argument) for argument in arguments], "raystore")
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 1


def process(*arguments: Any, stdout: Any = subprocess.PIPE, **environment: str) -> subprocess.Popen[str]:
    """Start the program in a process of its own."""
    command = [sys.executable, "-m", "raystore", *map(str, arguments)]
    kept = {name: value for name, value in os.environ.items() if name not in _LEFT_OUT}
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env=kept | {"PYTHONPATH": str(ROOT), "TERM": "xterm-256color"} | environment,
    )  # fmt: skip
