"""What spans say: model calls in every dialect, triplets and trajectories to train on, spans that are lost."""
