"""What connects a store to libraries of others. Stands on the runner; nothing imports it."""
