"""The small run, once on Ray and once as the journal of a process that was killed."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import raystore as rs
from tests.cli.commands import ROOT
from tests.cli.small_run import fill

KILLED = """
import asyncio, os, signal, sys
import raystore as rs
from tests.cli.small_run import fill

store = rs.InMemoryLightningStore(journal=sys.argv[1], clock="manual")
asyncio.run(fill(store))
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="session")
def live(cluster: None) -> Iterator[rs.RayLightningStore]:
    """The small run in a store on Ray."""
    with rs.start("small-run", clock="manual") as store:
        asyncio.run(fill(store))
        yield store


@pytest.fixture(scope="session")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The journal of the small run, whose process was killed."""
    journal = tmp_path_factory.mktemp("killed") / "journal"
    done = subprocess.run([sys.executable, "-c", KILLED, journal], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == -9, done.stderr
    return journal


@pytest.fixture(params=["ray", "journal"])
def where(request: pytest.FixtureRequest) -> list[Any]:
    """The options that find the small run."""
    if request.param == "ray":
        request.getfixturevalue("live")
        return ["--name", "small-run"]
    return ["--journal", request.getfixturevalue("killed")]
