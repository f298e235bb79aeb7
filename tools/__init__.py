"""Programs that write files of the repository from its source; run with `python -m tools.<name>`, or by make."""
