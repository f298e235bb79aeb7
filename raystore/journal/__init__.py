"""What a store did, on disk: so that the process that follows it goes on exactly where it was.

`records` says what is written, `frames` how, `segments` where; a `log` commits groups on a thread of its own, `replay`
makes the state anew from what it finds, through the same core. Nothing here decides anything about rollouts.
"""
