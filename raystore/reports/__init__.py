"""What the library tells people: log lines, progress on a terminal, pictures, the selection report."""
