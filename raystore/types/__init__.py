"""What users say and are told: the records of the contract, spans, feeds, and the options of a store.

Public classes only, with what they check of themselves. `raystore` has all their names.
Not here: the records that the core keeps (`core.records`), how these become one another (`wire.convert`).
"""
