"""docs/cli.md shows what the commands print."""

from __future__ import annotations

import subprocess
import sys

from raystore.cli.program import FAMILIES
from tests.cli.commands import ROOT


def test_the_page_shows_what_commands_print() -> None:
    """`python docs/draw_cli.py` writes its blocks; every command is on the page."""
    subprocess.run([sys.executable, ROOT / "docs/draw_cli.py", "--check"], check=True)
    page = (ROOT / "docs/cli.md").read_text()
    missing = [name for family in FAMILIES.values() for name, _, _ in family if f"`{name}" not in page]
    assert missing == []
