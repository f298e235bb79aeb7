"""The client: the methods of a store, and the store within one process.

`client` has the methods, over a `transport`; `local` has the stores of this process. The transport to a store on Ray is
in `raystore.remote`.
"""
