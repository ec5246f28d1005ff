"""Sums of embeddings over the values of bags, for training on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def bag_sums(weight: Tensor, values: Tensor, offsets: Tensor) -> Tensor:
    """Sum the rows values[offsets[i]:offsets[i + 1]] of `weight` for each i; dense gradient.

    Computed as a product with a sparse matrix of counts, and with its transpose in the backward
    pass. torch's `embedding_bag` sorts the values in its backward, which takes most of a training
    step for bags of tens of values.

    Args:
        weight: (V, d) float32 table on the CPU.
        values: (k,) int64 in [0, V).
        offsets: (n + 1,) int64, from 0 to k.

    Returns:
        (n, d) float32.
    """
    total: Tensor = _BagSums.apply(weight, values, offsets)  # type: ignore[no-untyped-call]
    return total


class _BagSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, values: Tensor, offsets: Tensor) -> Tensor:
        # Imported here, since only training on bags needs it.
        from scipy import sparse

        ones = np.ones(len(values), dtype=np.float32)
        shape = len(offsets) - 1, weight.shape[0]
        counts = sparse.csr_matrix((ones, values.numpy(), offsets.numpy()), shape=shape)
        ctx.counts = counts
        return torch.from_numpy(counts @ weight.detach().numpy())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return torch.from_numpy(ctx.counts.T @ gradients[0].contiguous().numpy()), None, None
