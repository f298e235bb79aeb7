"""While the demo runs, commands in another terminal tell the truth about it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.cli.commands import ROOT, process

AT_LEAST = 64  #: rollouts that have finished before anybody looks


def told(*arguments: str, at: str) -> str:
    """What a command prints in a process of its own, which is told where the cluster is (others may run here)."""
    command = process(*arguments, "--address", at)
    out, err = command.communicate(timeout=60)
    assert command.returncode == 0, (arguments, err)
    return str(out)


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[str]:
    """The demo while it runs; gives the address of its cluster."""
    environment = os.environ | {"RAY_ADDRESS": "local"}
    command: list[Any] = [
        sys.executable,
        ROOT / "examples" / "01_prompt_bandit.py",
        "--steps",
        "100000",
        "--runners",
        "2",
    ]
    with (tmp_path / "log").open("w") as log:
        running = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 90
        while "step" not in (tmp_path / "log").read_text():
            assert running.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.2)
        yield address_of(running.pid)
    finally:
        running.send_signal(signal.SIGINT)
        running.wait(60)


def address_of(pid: int) -> str:
    """The address of the cluster that a process has started."""
    lines = [one.cmdline() for one in psutil.Process(pid).children(recursive=True) if one.name() == "raylet"]
    (address,) = {part.partition("=")[2] for line in lines for part in line if part.startswith("--gcs-address=")}
    return address


@pytest.mark.timeout(300)
def test_commands_tell_the_truth_about_the_demo(demo: str) -> None:
    """Rates, rewards, a rollout of it, no failures, and nothing that holds it up for long."""
    page: Any = json.loads(told("top", "--json", at=demo))
    finished = page["statistics"]["rollouts_by_status"].get("succeeded", 0)
    assert finished >= AT_LEAST and page["metrics"]["total"]["finished"].keys() == {"ok"}
    assert page["statistics"]["total_workers"] == 2
    shown = told("top", at=demo)
    assert re.search(r"finished +\d+\.\d+ a second", shown) and "reward" in shown
    (one,) = json.loads(told("rollouts", "--status", "succeeded", "--limit", "1", "--json", at=demo))["rollouts"]
    rollout = told("show", one["rollout_id"], at=demo)
    assert "succeeded" in rollout and "chat" in rollout and re.search(r"reward +[01]", rollout)
    assert re.search(r"[\d,]+ attempts? ended", told("errors", at=demo))
    assert "train" in told("curve", at=demo)
    kinds = {finding["kind"] for finding in json.loads(told("why", "--json", at=demo))["findings"]}
    assert not kinds & {"unserved_queue", "pool_failed", "memory_full", "store_failed", "paused"}
    later: Any = json.loads(told("top", "--json", at=demo))
    assert later["statistics"]["rollouts_by_status"]["succeeded"] > finished
