"""The store as a Ray actor, and the way to it.

In the actor: `actor` holds a service, `inbox` is one session there. In a client: `session` is all operations of a
process, `outgoing` what waits to leave, `ledger` the claims that must be acknowledged, `timer` its one thread, `store`
the client object. Between them: `wire`. `cluster` starts, finds and ends stores.
Not here: what operations mean (`raystore.core`, `raystore.client`).
"""
