"""Words that errors have in common.

Not here: the errors themselves.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

PART_LETTERS = 3  #: of a name that is meant by a longer one, or by a part of it


def meant(name: Any, known: Iterable[str]) -> str:
    """Which of the known names was probably meant, to end a sentence with; empty if none is like it."""
    if not isinstance(name, str) or not 0 < len(name) < 100:
        return ""
    names = [one for one in known if isinstance(one, str)]
    found = difflib.get_close_matches(name, names, n=1)
    if not found and len(name) >= PART_LETTERS:
        found = [one for one in names if len(one) >= PART_LETTERS and (one in name or name in one)]
    return f"; did you mean {found[0]!r}?" if found else ""


def either(names: Sequence[str]) -> str:
    """Names as a sentence has them: a, b or c."""
    return " or ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))
