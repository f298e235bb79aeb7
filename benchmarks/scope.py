"""How much is measured: a result, a quick look, or the long form."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Scope:
    """Of one run."""

    quick: bool = False
    long: bool = False

    @property
    def rounds(self) -> int:
        """In which the parties take turns."""
        return 1 if self.quick else 5

    def amount(self, full: int) -> int:
        """So much work, or an eighth of it for a quick look."""
        return max(full // 8, 1) if self.quick else full
