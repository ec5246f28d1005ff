"""What a training step on several workers adds: gradient sums and item shards."""
