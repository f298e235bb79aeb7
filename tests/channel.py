"""What a child process says to the test that started it: on a descriptor of its own, the pipe that was its stdout.

Whatever else prints to stdout, Ray above all, goes to stderr from then on.
"""

from __future__ import annotations

import os
from typing import TextIO

#: The same, for the beginning of a program that is passed by `-c`: `print(..., file=channel)`.
CODE = "import os; channel = os.fdopen(os.dup(1), 'w', buffering=1); os.dup2(2, 1)\n"


def take_stdout() -> TextIO:
    """The channel; each line that is written to it leaves at once."""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return channel
