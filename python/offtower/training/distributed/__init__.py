"""Training on several processes: what spans them, and nothing of who started them."""

from offtower.training.distributed.workers import ALONE, TorchWorkers, Workers

__all__ = ["ALONE", "TorchWorkers", "Workers"]
