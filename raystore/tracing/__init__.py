"""What spans say: names, dialects, model calls, triplets and trajectories. Stands on `spans`."""
