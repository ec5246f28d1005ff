"""The loop, its checkpoints and its metrics."""
