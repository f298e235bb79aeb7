"""Writes docs/why.md, the kinds of findings of `store.why` and of the doctor, from the tables that the code uses.

Run `python -m tools.kinds` to write it; `tests/test_kinds.py` fails when it is not up to date.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from raystore.cli.doctor import CHECKS, COSTLY, ODD, TAKEN_OVER, WRONG
from raystore.core.findings import KINDS, Kind

PAGE = Path(__file__).parent.parent / "docs" / "why.md"

HEADER = """# Why does it not go on?

Written by `python -m tools.kinds` from the tables of the code; do not edit.

`await store.why()` says what holds a run up now: a list of `rs.Finding`, the binding constraint first, each with its
evidence in words and in plain values, and the next thing to do. `why(rollout_id=...)` says it of one rollout,
`why(group_id=...)` of a group, `why(consumer=...)` of a trainer, by the name of its consumer or feed. It costs the
store the same however many rollouts there are. `rs.recover(path).why()` says what was binding in a run that crashed.

What stops the whole store comes first; then what stops a trainer; then what holds up rollouts that wait: of several
constraints the one that holds up most of them; then what a trainer waits for, or lets others wait for; then that there
is nothing to do; and in the end what may bind soon. Constraints that weigh the same come in the order of this table.
"""

DOCTOR = """
## What the doctor looks for

In the rollouts that were enqueued last and have finished; each finding with counts, its share, and the id of a rollout
as an example, by severity and share. The findings {taken} are those of above.
"""

SEVERITIES = {
    WRONG: "what is trained on is wrong, or lacks something",
    COSTLY: "work is lost or held up",
    ODD: "to be looked at",
}


def page() -> str:
    """The text of docs/why.md."""
    why = _table("kind | meaning | what to do", ((f"`{name}`", *_shown(kind)) for name, kind in KINDS.items()))
    checks = (
        (f"`{name}`", SEVERITIES[check.severity], *_shown(check.kind))
        for name, check in sorted(CHECKS.items(), key=lambda item: item[1].severity)
    )
    doctor = _table("kind | severity | meaning | what to do", checks)
    return HEADER + why + DOCTOR.format(taken=", ".join(f"`{name}`" for name in TAKEN_OVER)) + doctor


def _shown(kind: Kind) -> tuple[str, str]:
    """Meaning and remedy, with names in place of what a finding says."""
    return kind.meaning, re.sub(r"\{(\w+)(!r)?\}", lambda found: f"*{found[1]}*", kind.remedy)


def _table(head: str, rows: Iterable[tuple[str, ...]]) -> str:
    lines = [f"| {head} |", f"|{'---|' * (head.count('|') + 1)}"]
    return "\n" + "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
