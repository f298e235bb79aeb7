"""docs/why.md has the kinds of findings as the code has them."""

from __future__ import annotations

from raystore.cli.doctor import CHECKS
from raystore.core.findings import KINDS
from tools import kinds


def test_the_page_is_up_to_date() -> None:
    """`python -m tools.kinds` writes docs/why.md."""
    assert kinds.PAGE.read_text() == kinds.page(), "run `python -m tools.kinds`"


def test_each_kind_is_one_line_of_it() -> None:
    """Also for those that both tables might have: no name means two things."""
    text = kinds.page()
    assert not KINDS.keys() & CHECKS.keys()
    for name in (*KINDS, *CHECKS):
        assert text.count(f"\n| `{name}` |") == 1
    assert "{" not in text
