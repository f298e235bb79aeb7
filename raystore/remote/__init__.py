"""The store as a Ray actor, and the way to it.

In the actor: `actor` holds a service, `server_session` has its clients' sessions. In a client: `session` sends all
operations of a process to one store, `session_state` decides what follows from each answer, `store` is the client
object, and starts, finds and ends stores. `handshake` connects to Ray and asks a store for its description.
"""
