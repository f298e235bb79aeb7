"""The command line `raystore`."""
