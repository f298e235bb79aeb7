"""Why work does not go on, in words: what holds it up now, with evidence and a remedy, the binding constraint first.

Pure functions of the state and of what the process of the store knows beside it. They look at indexes, at the lengths
of queues, at groups, consumers and feeds, and at bounded samples: never at all rollouts.
Not here: the kinds of findings and their remedies (`core.findings`), what has happened so far (`core.check.story`).
"""
