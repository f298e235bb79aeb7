"""Whether this process was forked, and what it must not use for that reason.

A fork copies neither the threads of a store nor Ray's: a lock that one of them held stays locked, and an answer never
comes. So stores that were used before the fork raise `ForkedError` in the child, at once.
"""

from __future__ import annotations

import os
import sys

#: of this process, kept here since the system takes longer to answer than a store to take its lock
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
