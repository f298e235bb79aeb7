"""Commands for tests, in this process, on a real pseudo-terminal or not, or in a process of their own."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raystore.cli.program import program
from tests.terminals import Terminal

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


def here(*arguments: Any, columns: int = 120) -> Shown:
    """Run a command in this process, on a terminal."""
    err = io.StringIO()
    with Terminal(columns) as terminal, contextlib.redirect_stdout(terminal.stream), contextlib.redirect_stderr(err):
        code = _run(arguments)
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
