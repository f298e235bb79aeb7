"""The ten answers of docs/debugging.md, given anew of a run that goes wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(300)
def test_each_question_is_answered_by_commands_alone() -> None:
    """`python docs/draw_debugging.py --check` raises if an answer does not name its cause."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_ADDRESS": "local"}
    command = [sys.executable, "docs/draw_debugging.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3_000:]


def test_the_page_asks_ten_questions() -> None:
    """Each with a command and what it printed."""
    page = (ROOT / "docs" / "debugging.md").read_text()
    assert page.count("\n## ") == 10
    assert page.count("\n```console\n$ raystore ") == 10
