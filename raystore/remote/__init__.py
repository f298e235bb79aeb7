"""The store as a Ray actor, and the way to it.

In the actor: `actor` holds a service, `server_session` has its clients' sessions. In a client: `session` connects
to Ray, asks a store for its description, and sends it all operations of a process; `session_state` decides what follows
from each answer; `store` is the client object, and starts, finds and ends stores.
"""
