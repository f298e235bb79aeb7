"""A few histories of the fuzzer of all verbs; `make fuzz` runs ten thousand."""

from __future__ import annotations

from pathlib import Path

import pytest

from raystore.core.verbs import VERBS
from raystore.service.service import PROCESS_VERBS
from tests.journal.fuzz import ARGUMENTS, run


def test_the_fuzzer_knows_every_verb() -> None:
    """Whoever adds a verb says which arguments it takes."""
    assert ARGUMENTS.keys() == VERBS.keys() | PROCESS_VERBS.keys()


@pytest.mark.parametrize("seed", range(12))
async def test_random_operations_of_all_verbs(seed: int, tmp_path: Path) -> None:
    """Invariants hold, what is refused changes nothing, and a replay is the same state, with a snapshot and without."""
    await run(seed, tmp_path / "journal", batches=40)
