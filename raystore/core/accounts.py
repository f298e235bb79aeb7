"""How many bytes of a user's values a record holds, so that memory thresholds and `statistics()` know of all of them.

Counted are the values, which a user makes as long as he likes, and for a rollout what it takes beside them. Spans and
resources count their own.
Not here: adding up (`State` keeps the sum), what happens above a threshold (`eviction`).
"""

from __future__ import annotations

from typing import Any

from raystore.core.payload import Opaque, size_of

ROLLOUT_OVERHEAD_BYTES = 1_500  #: record, entry and index entries of one rollout with an attempt, beside its payloads

ERROR_BYTES = 64 * 1024  #: of the error of an attempt; of a longer one its beginning and its end are kept
ERROR_HEAD_BYTES = 16 * 1024


def text_bytes(text: str) -> int:
    """Bytes of a text."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def bounded_error(error: str) -> str:
    """An error as it is kept: a long one without its middle, of which it says how long it was.

    The end stays, since a traceback says there what it was.
    """
    if len(error) <= ERROR_BYTES and text_bytes(error) <= ERROR_BYTES:
        return error
    data = error.encode("utf-8", "surrogatepass")
    cut = len(data) - ERROR_BYTES + 128  # room for the marker
    head = data[:ERROR_HEAD_BYTES].decode("utf-8", "ignore")
    tail = data[ERROR_HEAD_BYTES + cut :].decode("utf-8", "ignore")
    return f"{head}\n[... {cut} of {len(data)} bytes left out: an error keeps {ERROR_BYTES} ...]\n{tail}"


def of_attempt(metadata: Opaque, error: str | None) -> int:
    """Bytes that the values of an attempt count for."""
    return size_of(metadata) + (text_bytes(error) if error is not None else 0)


def of_rollout(input: Opaque, metadata: Opaque, tags: dict[str, Any]) -> int:
    """Bytes that a rollout counts for without its attempts."""
    size = size_of(input) + size_of(metadata) + ROLLOUT_OVERHEAD_BYTES
    for name, value in tags.items():
        size += text_bytes(name) + (text_bytes(value) if type(value) is str else 8)
    return size
