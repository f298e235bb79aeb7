"""Writes the table of docs/reliability.md: `python -m tests.faults.table [FILE ...]`, by default runs/faults.jsonl.

Each row shows its long form if that was run, and its short form if not; of several runs, the newest, whatever it found.
Not here: the rows themselves, which report to `tests.conftest.report`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests.conftest import RESULTS

PAGE = RESULTS.parent.parent / "docs" / "reliability.md"
BEGIN, END = "<!-- rows -->\n", "<!-- end of rows -->\n"
HEAD = "| row | fault | form | bar | figure | amount | commit, date |\n|---|---|---|---|---|---|---|\n"


def newest(files: list[Path]) -> list[dict[str, Any]]:
    """What each row found last, in the longest form that was run."""
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    lines.sort(key=lambda line: (line["form"] == "long", line["date"]))
    found = {(line["row"], line["what"]): line for line in lines}
    return [found[key] for key in sorted(found)]


def row(line: dict[str, Any]) -> str:
    """A row of the table."""
    figure = line["figure"]
    shown = "; ".join(f"{name}: {value}" for name, value in figure.items()) if isinstance(figure, dict) else str(figure)
    if not line["met"]:
        shown += " (**missed**)"
    did = "; seed ".join(str(part) for part in (line["did"], line["seed"]) if part not in ("", None))
    cells = [line["row"], line["what"], line["form"], line["bar"], shown, did, f"{line['commit']}, {line['date'][:10]}"]
    return "| " + " | ".join(str(cell).replace("|", "/") for cell in cells) + " |\n"


def main() -> None:
    """Put the table into the page."""
    files = [Path(name) for name in sys.argv[1:]] or [RESULTS]
    before, _, rest = PAGE.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(before + BEGIN + "\n" + HEAD + "".join(map(row, newest(files))) + "\n" + END + after)


if __name__ == "__main__":
    main()
