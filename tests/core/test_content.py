"""What is compared when a caller-given id comes again: digests that requests bring, or bytes if they bring none."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from raystore.core import format1
from raystore.core.payload import BY_BYTES, CANONICAL, Payload
from raystore.errors import ConflictError
from tests.core.conftest import Core


def digests(*names: Any) -> list[Any]:
    return [bytes((CANONICAL,)) + name * 16 for name in names]


def test_digests_decide_over_bytes(core: Core) -> None:
    """Whatever the bytes are: the same digests are the same content, others are not."""
    first = core.enqueue("one", rollout_id="mine", digests=digests(b"a", b"b"))
    assert core.enqueue("other bytes", rollout_id="mine", digests=digests(b"a", b"b")) == first
    with pytest.raises(ConflictError, match=r"\(input differ\)"):
        core.enqueue("one", rollout_id="mine", digests=digests(b"c", b"b"))
    with pytest.raises(ConflictError, match=r"\(metadata differ\)"):
        core.enqueue("one", rollout_id="mine", digests=digests(b"a", b"c"))


def test_without_digests_the_bytes_decide(core: Core) -> None:
    """Of a client that sends none, also of large values, and of those with references."""
    for number, (one, other) in enumerate(itertools.combinations([b"\x01a", b"\x01b", b"\x02a", None], 2)):
        assert one is not None
        ask = {"rollout_id": f"{number}", "metadata": other}
        core.run("enqueue", requests=[{"input": one, **ask}])
        core.run("enqueue", requests=[{"input": Payload(one, ()), **ask}])
        with pytest.raises(ConflictError, match=r"\(input, metadata differ\)"):
            core.run("enqueue", requests=[{"input": other, "rollout_id": f"{number}", "metadata": one}])
    kept = core.state.entries["0"].given
    assert kept is not None
    assert [kept[0][0], kept[4][0], len(kept[0])] == [BY_BYTES, BY_BYTES, 17]


def test_what_is_kept_does_not_grow_with_the_value(core: Core) -> None:
    """Digests are kept, and not the value a second time when its rollout has got another input."""
    rollout_id = core.enqueue("x" * 100_000, rollout_id="mine")
    core.run("update_rollout", rollout_id=rollout_id, changes={"input": b"\x01"})
    kept = core.state.entries[rollout_id].given
    assert kept is not None and sum(len(part) for part in kept if isinstance(part, bytes)) < 100


def test_an_entry_of_format_1_goes_by_its_rule(core: Core) -> None:
    """It kept the values: plain ones are compared as bytes, and a pickled one counts as the same."""
    for name, value in (("plain", b"\x01a"), ("pickled", b"\x02a")):
        request = {"input": value, "metadata": None, "rollout_id": name}
        format1.VERBS["enqueue"].run(core.state, core.step(), requests=[request])
        kept = core.state.entries[name].given
        assert kept is not None and kept[0] == value
    new = {"metadata": None, "digests": digests(b"a", b"b")}
    core.run("enqueue", requests=[{"input": b"\x01a", "rollout_id": "plain", **new}])
    core.run("enqueue", requests=[{"input": b"\x02b", "rollout_id": "pickled", **new}])
    with pytest.raises(ConflictError):
        core.run("enqueue", requests=[{"input": b"\x01b", "rollout_id": "plain", **new}])
