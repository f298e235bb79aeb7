"""Findings are shown in words, with evidence and remedy; which there are, others decide."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from pydantic import BaseModel

from raystore.client.client import StoreClient
from tests.cli.commands import here, piped
from tests.cli.small_run import HOSTILE


class Found(BaseModel):
    """A finding, as `rs.Finding` has it."""

    kind: str
    text: str
    remedy: str
    evidence: dict[str, Any]


FINDINGS = [
    Found(kind="unserved_queue", text="Nobody serves queue gpu-only.", remedy="Start a pool.", evidence={"waiting": 1}),
    Found(kind="odd", text=f"Odd: {HOSTILE}", remedy="", evidence={}),
]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What `store.why` and the examination are asked; both find the same."""
    questions: list[dict[str, Any]] = []

    async def why(self: Any, **question: Any) -> list[Found]:
        questions.append(question)
        return FINDINGS if not question else []

    async def examine(store: Any, rollout_id: str | None = None) -> list[Found]:
        questions.append({"examined": rollout_id})
        return FINDINGS if rollout_id is None else []

    module: Any = ModuleType("raystore.cli.doctor")
    module.examine = examine
    monkeypatch.setattr(StoreClient, "why", why, raising=False)
    monkeypatch.setitem(sys.modules, "raystore.cli.doctor", module)
    return questions


@pytest.mark.parametrize("command", ["why", "doctor"])
def test_findings_are_told_in_words(asked: list[Any], killed: Path, command: str) -> None:
    """The first in bold, each with its remedy; nothing of a user's comes through."""
    shown = here(command, "--journal", killed)
    assert shown.code == 0 and "\x1b[1mNobody serves queue gpu-only." in shown.out
    assert shown.lines[1] == "   → Start a pool." and "unserved_queue: waiting=1" in shown.text
    assert r"\x1b]0;title" in shown.text
    told = json.loads(piped(command, "--json", "--journal", killed).out)
    assert [finding["kind"] for finding in told["findings"]] == ["unserved_queue", "odd"]


def test_why_asks_for_what_an_id_is(asked: list[dict[str, Any]], killed: Path) -> None:
    """A rollout, a group or a consumer; anything else is wrong use."""
    for id in ("stuck", "math-0-0", "trainer"):
        assert here("why", id, "--journal", killed).text == "nothing holds it up\n"
    assert asked == [{"rollout_id": "stuck"}, {"group_id": "math-0-0"}, {"consumer": "trainer"}]
    shown = here("why", "nobody", "--journal", killed)
    assert shown.code == 2 and "'nobody' is no rollout, group or consumer" in shown.err


def test_doctor_can_tell_by_its_exit_code(asked: list[dict[str, Any]], killed: Path) -> None:
    """With --check, for scripts."""
    assert here("doctor", "--check", "--journal", killed).code == 1
    assert here("doctor", "stuck", "--check", "--journal", killed).code == 0
    assert asked == [{"examined": None}, {"examined": "stuck"}]
    assert here("doctor", "nobody", "--journal", killed).code == 2
