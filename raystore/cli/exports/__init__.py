"""Rollouts, spans and groups for other programs: JSON lines, Parquet, a trace for Perfetto, OTLP.

`source` reads a store page by page, `records` and the module of each format make rows of what it reads, `targets`
writes them and remembers how far, and `command` is the command. Nothing holds more than a page, and nothing is
unpickled.
"""
