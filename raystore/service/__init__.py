"""The store at work: the core behind one entry point, with a clock, a journal and calls that wait.

Stands on `core` and `journal`.
"""
