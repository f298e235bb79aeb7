"""The command line `raystore`: it shows what a store holds, live or from a journal, and explains it.

It only reads, but for `start` and `stop`. It opens no pickle. It joins Ray clusters, and starts none but for `start`
and `demo`. What a user wrote is shown without control characters.
Not here: anything that a program needs; that is the API (`raystore.api`).
"""

from __future__ import annotations


def main() -> None:
    """Run the command line with the arguments of this process."""
    from raystore.cli.program import program  # which needs click; a program that imports raystore need not have it

    program(prog_name="raystore")
