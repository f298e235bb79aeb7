"""The store as a Ray actor, and the way to it.

In the actor: `actor` holds a service, `inbox` is one session there. In a client: `session` is all operations of a
process, `outgoing` what waits to leave, `retries` what is sent again, `ledger` the claims that must be acknowledged,
`parked` the calls that wait, `timer` its one thread, `transport` what shares it, `store` the client object. Between
them: `wire`. `cluster` starts, finds and ends stores, `handshake` asks one who it is.
Not here: what operations mean (`raystore.core`, `raystore.client`).
"""
