"""Named points at which a test lets this process die, fail or wait; without effect unless RAYSTORE_FAILPOINTS is set.

RAYSTORE_FAILPOINTS="writer.written=kill@3,writer.synced=sleep:0.2" kills the process when it comes to the first point
for the third time, and lets it wait each time at the second. "raise" is an error of the disk (EIO), "full" is no space.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections import Counter

_actions: dict[str, tuple[str, int]] = {}  # by point: what to do, and at which time (0: each)
_passed: Counter[str] = Counter()
_ERRORS = {"raise": errno.EIO, "full": errno.ENOSPC}

for _given in filter(None, os.environ.get("RAYSTORE_FAILPOINTS", "").split(",")):
    _name, _equals, _action = _given.strip().partition("=")
    _do, _sign, _at = _action.partition("@")
    _actions[_name] = (_do, int(_at or 0))


def failpoint(name: str) -> None:
    """Die, fail or wait here if a test has asked for it."""
    if _actions and name in _actions:
        _act(name)


def _act(name: str) -> None:
    what, at = _actions[name]
    _passed[name] += 1
    if at and _passed[name] != at:
        return
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)  # until it has arrived
    elif what in _ERRORS:
        raise OSError(_ERRORS[what], f"failpoint {name}")
    elif what.startswith("sleep:"):
        time.sleep(float(what.removeprefix("sleep:")))
    else:
        raise ValueError(f"RAYSTORE_FAILPOINTS: {what!r} is no action; expected kill, raise, full or sleep:SECONDS")
