"""What tests and benchmarks share. Not here: words that only tests use (`tests.helpers`)."""
