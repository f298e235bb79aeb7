"""How much code a lone operation runs through, as `benchmarks/paths.py` counts it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
FUNCTIONS, MODULES = 60, 15
TIMER = 5  #: functions of the session's timer, which may look just then


def test_the_way_of_an_operation_is_short() -> None:
    """Client and store together."""
    counted = subprocess.run(
        [sys.executable, "-m", "benchmarks.paths"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    found = {name: (int(a), int(b)) for name, a, b in re.findall(r"\| (\w+) \| (\d+) \| (\d+) \|", counted.stdout)}
    assert found.keys() == {"add_span", "dequeue_rollout"}
    for name, (functions, modules) in found.items():
        assert functions <= FUNCTIONS + TIMER and modules <= MODULES, (name, functions, modules)
