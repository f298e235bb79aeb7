"""Which process this is, and whether a process that was named so is still there.

A process id alone says nothing: it is used again, and in a container it may be another one. So a process is known by
the machine (this boot of its kernel, and the namespace in which its id counts), its id, and when it started there.
Whoever cannot say so much is not looked for. A process that is frozen is there.
Not here: what follows from it (`lifelines`).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import ray


class Process(NamedTuple):
    """A process of a Ray cluster, as it says itself."""

    node: str | None  #: id of its node
    machine: str  #: where its id counts; empty where that cannot be told
    pid: int
    started: int  #: by the clock of its machine
    job: str | None  #: id of the job that it works for
    is_driver: bool  #: of that job


def here() -> str:
    """The machine of this process."""
    try:
        if os.readlink("/proc/self") != str(os.getpid()):  # a /proc of another namespace
            return ""
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        spaces = [os.stat(f"/proc/self/ns/{name}").st_ino for name in ("pid", "time") if _has_namespace(name)]
    except OSError:  # no Linux, or one that hides it
        return ""
    return f"{boot}/{'/'.join(map(str, spaces))}" if spaces else ""


def _has_namespace(name: str) -> bool:
    return os.path.exists(f"/proc/self/ns/{name}")


def this_process() -> Process:
    """Who this process is."""
    pid = os.getpid()
    state = _look(pid)
    machine = here() if state is not None else ""
    node = job = None
    is_driver = False
    if ray.is_initialized():
        context = ray.get_runtime_context()
        node, job = context.get_node_id(), context.get_job_id()
        is_driver = context.worker.mode == ray.SCRIPT_MODE
    return Process(node, machine, pid, state[1] if state is not None else 0, job, is_driver)


def process_of(told: Any) -> Process | None:
    """A process as a peer says who it is; None if it says anything else."""
    match told:
        case [str() | None, str(), int(), int(), str() | None, bool()]:
            return Process(*told)
    return None


def is_gone(process: Process) -> bool:
    """Whether a process of this machine is certainly there no more."""
    state = _look(process.pid)
    if state is None:
        return not _exists(process.pid)  # processes of others may be hidden from us
    status, started = state
    if started != process.started:
        return True  # its id belongs to another one by now
    return status in "ZX" and not _has_threads(process.pid)


def _look(pid: int) -> tuple[str, int] | None:
    """The status of a process and when it started, None if there is none to be seen."""
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    fields = text[text.rindex(b")") + 1 :].split()  # behind its name, which may contain anything
    return fields[0].decode(), int(fields[19])


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is there, and is somebody else's
        return True
    return True


def _has_threads(pid: int) -> bool:
    """Whether a process goes on although its first thread has ended."""
    try:
        return len(os.listdir(f"/proc/{pid}/task")) > 1
    except OSError:
        return False
