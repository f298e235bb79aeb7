"""The machine: how much memory there is, whatever says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from raystore.types import options


def test_capacity_is_capped_by_the_cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container's limit counts, by either cgroup version; "max", nothing, or more than the machine has does not."""
    machine = options.memory_capacity()
    v2, v1 = tmp_path / "memory.max", tmp_path / "memory.limit_in_bytes"
    monkeypatch.setattr(options, "CGROUP_LIMIT_FILES", (v2, v1))
    assert options.memory_capacity() >= machine
    v2.write_text("max\n")
    v1.write_text("9223372036854771712\n")
    assert options.memory_capacity() >= machine
    v2.write_text("1000000\n")
    assert options.memory_capacity() == 1_000_000
    v1.write_text("500000\n")
    assert options.memory_capacity(object_store_bytes=100_000) == 400_000


def test_capacity_must_be_positive() -> None:
    """In the reference's words."""
    with pytest.raises(ValueError, match="Detected memory capacity must be positive"):
        options.resolve_thresholds(options.StoreConfig(), 0)
