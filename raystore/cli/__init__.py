"""The command line, and what it computes from what a store answers. Only this package may import rich or click."""
