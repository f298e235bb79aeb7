"""Runs the commands of docs/cli.md, and writes down what they print.

A block that begins with `$ raystore ...` is what that command prints on a terminal of 100 columns, of a small run that
is made here (`tests/cli/small_run.py`). Its clock is manual and begins at a fixed time; ids that the store makes up are
replaced by others, in the order in which they appear.
Run `python docs/draw_cli.py` to write the blocks anew; `--check` says whether they are up to date, and a test asks.
"""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import raystore as rs  # noqa: E402
from tests.cli.commands import here  # noqa: E402
from tests.cli.small_run import fill  # noqa: E402

PAGE = ROOT / "docs" / "cli.md"
JOURNAL = "runs/small"
COLUMNS = 100
BEGIN = 1_800_000_000.0
_BLOCK = re.compile(r"```console\n\$ (raystore .*)\n(?:.*\n)*?```", re.MULTILINE)
_MADE_UP = re.compile(r"\b(ro|at|rs|group)-[0-9a-f]{8,12}\b")


def make_run(journal: str) -> None:
    """The small run, which begins at a fixed time."""
    with patch("time.time", return_value=BEGIN):
        store = rs.InMemoryLightningStore(journal=journal, clock="manual")
    asyncio.run(fill(store))
    store.close()


def stand_ins(text: str, known: dict[str, str]) -> str:
    """A text with other ids in place of those that are made up, the same for the same."""

    def other(found: re.Match[str]) -> str:
        own = found.group()
        length = len(own) - len(found[1]) - 1
        return known.setdefault(own, f"{found[1]}-{len(known) + 1:0{length}x}")

    return _MADE_UP.sub(other, text)


def drawn(text: str) -> str:
    """The page with its blocks drawn anew."""
    known: dict[str, str] = {}

    def block(found: re.Match[str]) -> str:
        command = found[1]
        shown = here(*shlex.split(command)[1:], columns=COLUMNS)
        assert not shown.err and shown.code in (0, 1), (command, shown)
        body = "\n".join(line.rstrip() for line in stand_ins(shown.text, known).splitlines()).strip("\n")
        return f"```console\n$ {command}\n{body}\n```"

    return _BLOCK.sub(block, text)


def main() -> None:
    os.environ["TZ"] = "UTC"
    time.tzset()
    before = PAGE.read_text()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        make_run(JOURNAL)
        after = drawn(before)
        os.chdir(ROOT)
    if "--check" in sys.argv:
        if after != before:
            sys.exit("docs/cli.md is not up to date: run python docs/draw_cli.py")
    else:
        PAGE.write_text(after)


if __name__ == "__main__":
    main()
