"""What may be wrong with a journal: each says what is there, the likely cause, and what to do.

Not here: errors of a store without one (the package itself).
"""

from __future__ import annotations

from raystore.errors.base import StoreError


class JournalError(StoreError):
    """The root of what may be wrong with a journal."""


class JournalDamagedError(JournalError, ValueError):
    """A journal cannot be read where it was once written; nothing of it was changed."""

    def __init__(self, where: str, offset: int, why: str) -> None:
        super().__init__(where, offset, why)

    def __str__(self) -> str:
        where, offset, why = self.args
        return (
            f"The journal is damaged in {where} at byte {offset}: {why}. The store does not start, since what follows "
            "would be built on a gap. Restore the file from a copy, or start in another directory."
        )


class JournalFormatError(JournalError, ValueError):
    """A journal was written by a newer raystore."""

    def __init__(self, where: str, theirs: int, ours: int) -> None:
        super().__init__(where, theirs, ours)

    def __str__(self) -> str:
        where, theirs, ours = self.args
        return (
            f"{where} is of journal format {theirs}, and this raystore reads up to format {ours}: install a newer one."
        )


class JournalMissingError(JournalError, LookupError):
    """A journal that should be there is not."""

    def __init__(self, path: str, why: str) -> None:
        super().__init__(path, why)

    def __str__(self) -> str:
        path, why = self.args
        return (
            f"There is no journal in {path}: {why}. The store does not start empty in its place; mount the directory "
            "that the run was written to, or start a new run with resume='never' in an empty one."
        )


class JournalInUseError(JournalError, ValueError):
    """A journal belongs to another run, or to a store that is running."""

    def __init__(self, path: str, why: str) -> None:
        super().__init__(path, why)

    def __str__(self) -> str:
        path, why = self.args
        return f"The journal in {path} is not to be used like this: {why}."


class JournalFullError(JournalError, OSError):
    """The disk of the journal is full: nothing was changed, and reads go on. Changes are taken again once it is not."""

    def __init__(self, path: str, retry_after_seconds: float) -> None:
        super().__init__(path, retry_after_seconds)
        self.retry_after_seconds = retry_after_seconds

    def __str__(self) -> str:
        path, retry_after = self.args
        return (
            f"The disk of the journal in {path} is full, so the store takes no changes; nothing was changed. Free some "
            f"space: the store goes on by itself. Try again in {retry_after:g} s."
        )


class JournalFailedError(JournalError, OSError):
    """The disk of the journal failed: what was not acknowledged may be lost, and nothing more is acknowledged."""

    def __init__(self, path: str, why: str) -> None:
        super().__init__(path, why)

    def __str__(self) -> str:
        path, why = self.args
        return f"The journal in {path} could not be written ({why}), so the store has ended; start it again to go on."


class ReadOnlyError(StoreError, RuntimeError):
    """A run that was recovered for reading takes no changes."""

    def __init__(self, path: str) -> None:
        super().__init__(path)

    def __str__(self) -> str:
        return (
            f"The run in {self.args[0]} was opened for reading. To go on with it, start a store there: "
            "rs.start(name, journal=...) or rs.InMemoryLightningStore(journal=...)."
        )


class JournalHeldError(ReadOnlyError):
    """A record of the journal ends every process that reads it; what was before it can be read."""

    def __init__(self, path: str, record: int, deaths: int) -> None:
        StoreError.__init__(self, path, record, deaths)

    def __str__(self) -> str:
        path, record, deaths = self.args
        return (
            f"Record {record} of the journal in {path} ended {deaths} processes in a row that read it, so the store "
            "goes no further: it serves what was before that record, and takes no changes. The process may have run "
            "out of memory, or raystore has a fault; the logs of those processes say more. resume='must' tries again."
        )


class FencedError(JournalError, RuntimeError):
    """Another process writes this journal now."""

    def __init__(self, path: str, epoch: int) -> None:
        super().__init__(path, epoch)

    def __str__(self) -> str:
        path, epoch = self.args
        return (
            f"The journal in {path} has a newer writer than epoch {epoch}, so this store has ended. Use the newer one."
        )
