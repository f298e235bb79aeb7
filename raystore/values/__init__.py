"""What a user's value is: numbers, arrays, pickles, large objects.

Stands on `core`; the models of `types` stand on it.
"""
