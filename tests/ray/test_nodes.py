"""More than one node: where the store and the runners are, and what the death of a node does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.long
@pytest.mark.timeout(200)
def test_three_nodes_one_killed() -> None:
    """The store is on the driver's node, runners are spread, and a killed node costs no work."""
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.ray.three_nodes"], capture_output=True, text=True, timeout=190, env=environment,
        cwd=Path(__file__).parent.parent.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 nodes" in done.stdout and "nothing lost" in done.stdout
