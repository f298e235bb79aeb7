"""What the store costs, measured against a plain Ray actor, a peer, and the machine's limit: `make bench`.

`table` knows lines, goals and rounds; `parties` starts what is compared; `tests.support.shapes` is the work, the same
code for every party; `peer` runs the shapes in the environment of agentlightning. The rows stand by theme:
`lifecycles`, `ingest`, `bulk`, `latency`, `scale`, `memory`. Alone run `accounting`, `ray_calls` (what Ray costs by
itself), `paths` (functions that an operation runs through) and `profile`.
Not here: assertions. A machine that is busy must not fail a test, so what is timed is measured and shown.
"""
