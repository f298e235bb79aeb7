"""Kill a process together with everything that it started."""

from __future__ import annotations

import contextlib
import os
import signal

import psutil


def kill_tree(pid: int) -> None:
    """Kill the leader of a process group and all its descendants; it may be the calling process."""
    try:
        descendants = psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        descendants = []
    for process in descendants:  # some may have left the group
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    kill_group(pid)


def kill_group(pid: int) -> None:
    """Kill a process and the group that it leads."""
    # macOS answers PermissionError for a group in which all processes have ended.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):  # a fork that has not become the leader of its group yet
        os.kill(pid, signal.SIGKILL)
