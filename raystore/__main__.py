"""`python -m raystore`: the command line."""

from __future__ import annotations

from raystore.cli import main

if __name__ == "__main__":
    main()
