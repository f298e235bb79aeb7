"""Every decision of the store: synchronous, standard library only, time and ids as arguments.

Start with `lifecycle` (the status tables), then `state` (what is kept) and `verbs` (what can be asked).
Not here: clocks, event loops, threads, pydantic, Ray. A test holds this package to it.
"""
