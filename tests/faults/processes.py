"""Words of the rows that run programs, kill a store's process, and look for its successor."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import ray

ROOT = Path(__file__).parent.parent.parent


async def describe(store: Any) -> dict[str, Any]:
    """What the store's actor says of itself: pid, epoch and more."""
    known: dict[str, Any] = await store.actor.describe.remote()
    return known


async def kill(store: Any) -> dict[str, Any]:
    """SIGKILL the store's process; what it said of itself."""
    known = await describe(store)
    os.kill(known["pid"], signal.SIGKILL)
    return known


async def later(store: Any, epoch: int) -> dict[str, Any] | None:
    """What a process of a later epoch says, or None: the one before may answer for a moment after it was killed."""
    try:
        known = await describe(store)
    except ray.exceptions.ActorUnavailableError:
        return None
    return known if known["epoch"] > epoch else None


def program(name: str, *arguments: Any, python: str = sys.executable, timeout: float = 250) -> Any:
    """Run a program beside these tests, which has a Ray of its own; what it says as JSON."""
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    command = [python, "-m", f"tests.faults.{name}", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def broken(path: Path, code: str) -> dict[str, Any]:
    """Options of a store whose process runs this code first."""
    (path / "sitecustomize.py").write_text(code)
    return {"actor_options": {"runtime_env": {"env_vars": {"PYTHONPATH": f"{path}{os.pathsep}{ROOT}"}}}}
