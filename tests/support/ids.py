"""Ids that are taken already: stores whose ids are so short that most of them are."""

from __future__ import annotations

from collections.abc import Container

import pytest

from raystore.core.state import Step


def mint_short_ids(monkeypatch: pytest.MonkeyPatch, digits: int) -> None:
    """Let steps mint ids of so few digits, and longer ones instead of those that are taken."""
    mint = Step.mint

    def mint_short(step: Step, prefix: str, all_digits: int, taken: Container[str]) -> str:
        short = mint(step, prefix, digits, ())
        return mint(step, prefix, all_digits, taken) if short in taken else short

    monkeypatch.setattr(Step, "mint", mint_short)
