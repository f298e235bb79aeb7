"""docs/api.md has every public name, in its place, as it is now."""

from __future__ import annotations

import re
from pathlib import Path

import raystore as rs
from raystore.api import METHODS
from tools import reference

ROOT = Path(__file__).parent.parent

#: Of Python, Ray and others.
FOREIGN = {
    "AbstractContextManager", "Any", "AsyncIterator", "BaseException", "Callable", "False", "Iterable", "Literal",
    "Mapping", "NDArray", "None", "PathLike", "Sequence", "Set", "SpanProcessor", "T", "TextIO", "TracerProvider",
    "True",
}  # fmt: skip


def test_reference_is_up_to_date() -> None:
    """`make reference` writes docs/api.md."""
    assert reference.PAGE.read_text() == reference.page(), "run `make reference`"


def test_every_public_name_has_one_place_in_the_reference() -> None:
    """In one of its groups; and no group has what is no public name."""
    placed = reference.documented()
    assert sorted(placed) == sorted(set(placed))
    assert {*rs.__all__, *METHODS} - set(placed) == set()
    assert set(placed) - {*rs.__all__, *METHODS} == {*reference.OTHERS, *reference.ALIASES} - set(rs.__all__)


def test_every_public_name_is_in_the_readme_or_the_reference() -> None:
    """As a word of its own."""
    words = set(re.findall(r"\w+", (ROOT / "README.md").read_text() + reference.PAGE.read_text()))
    assert {*rs.__all__, *METHODS} - words == set()


def test_names_in_signatures_are_explained() -> None:
    """Each type that a signature names is in the reference, or a well-known one."""
    signatures = "\n".join(re.findall(r"```python\n(.*?)```", reference.PAGE.read_text(), re.DOTALL))
    without_texts = re.sub(r"#.*|\"[^\"]*\"|\w+Error\b", "", signatures)
    used = set(re.findall(r"\b[A-Z]\w*", without_texts))
    shown = {*reference.documented(), *re.findall(r"^class (\w+)", signatures, re.MULTILINE)}
    assert used - shown - FOREIGN == set()
