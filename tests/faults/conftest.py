"""What the rows of the fault suite share: how much is tried, and where the figure of each goes."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

IS_LONG = os.environ.get("FAULTS") == "long"
RESULTS = Path(__file__).parent.parent.parent / "runs" / "faults.jsonl"


@pytest.fixture
def amount() -> Callable[[int, int], int]:
    """So much in the short form, so much in `make faults`."""
    return lambda short, long: long if IS_LONG else short


@pytest.fixture
def report() -> Iterator[Callable[..., None]]:
    """Takes the figure of a row: prints it, adds a line to runs/faults.jsonl, and fails if it misses the bar."""
    started = time.time()
    found = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)

    def take(row: int, what: str, *, figure: Any, bar: str, met: bool, seed: Any = None, did: str = "") -> None:
        line = {
            "row": row, "what": what, "figure": figure, "bar": bar, "met": met, "seed": seed, "did": did,
            "form": "long" if IS_LONG else "short", "seconds": round(time.time() - started, 1),
            "commit": found.stdout.strip(),
            "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(started)),
        }  # fmt: skip
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"row {row}, {what}: {figure} (bar: {bar}; {did}; seed {seed})")
        assert met, f"row {row}, {what}: {figure}, and the bar is {bar} ({did}; seed {seed})"

    yield take
