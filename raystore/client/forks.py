"""Whether this process is a child that was forked, and what it must leave alone for that reason.

A fork copies neither the threads of a store nor Ray's: a lock that one of them held is held for ever, and an answer
never comes. So what was used before a fork raises in the child, at once.
Not here: agents' processes, which are forked from a process that uses neither (`runner.fork_server`).
"""

from __future__ import annotations

import os
import sys

#: of this process; asking the system with every operation would cost more than the operation's lock
pid: int = os.getpid()
_has_inherited_ray = False


def _in_child() -> None:
    global pid, _has_inherited_ray
    pid = os.getpid()
    _has_inherited_ray = _is_initialized()


def _is_initialized() -> bool:
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def ray_is_inherited() -> bool:
    """Whether Ray was connected before the fork that made this process, and was not shut down since."""
    global _has_inherited_ray
    if _has_inherited_ray and not _is_initialized():
        _has_inherited_ray = False
    return _has_inherited_ray


os.register_at_fork(after_in_child=_in_child)
