"""The store as a Ray actor, and the way to it.

In the actor: `actor` holds a service, `endpoint` speaks the session protocol for it, `server_session` is one session
there. In a client: `session` is all operations of a process to one store, `session_state` what follows from each
answer, `store` the client object. `cluster` starts, finds and ends stores, `handshake` asks one who it is.
"""
