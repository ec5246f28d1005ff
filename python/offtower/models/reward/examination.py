"""Examination by position: how a reward of the same item falls along a slate.

The position-based model r ~ theta_k q(x, a) (Richardson, Dominowska, Ragno, WWW 2007): theta_k is
the examination of position k relative to the reference position 0, and q the reward model at the
reference position. A click at position 9 and one at 0 are then not the same evidence on the item.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from offtower.data.columns import as_float_array
from offtower.data.log import Log


class Examination(nn.Module):
    """Learned factors theta_0 = 1, theta_1, ...

    initial: (K,) positive first values of all positions; that of position 0 is 1.
    """

    def __init__(self, initial: NDArray[np.float64]) -> None:
        super().__init__()
        self.log_factor = nn.Parameter(torch.from_numpy(np.log(initial[1:])).float())

    def at(self, position: Tensor) -> Tensor:
        """(B,) log theta of positions (B,); those beyond the last one have its factor."""
        first = self.log_factor.new_zeros(1)
        every = torch.cat([first, self.log_factor])
        return every[position.clamp(max=len(every) - 1)]

    def loss(self, logit: Tensor, reward: Tensor, position: Tensor, *, binary: bool) -> Tensor:
        """(B,) cross-entropy of theta sigmoid(s) or squared error of theta s."""
        log_factor = self.at(position)
        if not binary:
            return torch.square(log_factor.exp() * logit - reward)
        log_prob = (log_factor + functional.logsigmoid(logit)).clamp(max=-1e-6)
        return -(reward * log_prob + (1.0 - reward) * torch.log(-torch.expm1(log_prob)))


def reward_by_position(log: Log) -> NDArray[np.float64] | None:
    """(K,) mean reward of each position relative to position 0, where learning begins.

    None for a log that has no slates of several positions.
    """
    schema = log.schema
    if not schema.slates or schema.position is None:
        return None
    count, total = np.zeros(0), np.zeros(0)
    columns = [schema.position, schema.reward]
    for table in log.read_row_groups(range(len(log.row_group_sizes)), columns):
        position = table.column(schema.position).to_numpy()
        reward = np.nan_to_num(as_float_array(table.column(schema.reward)))
        size = max(count.size, int(position.max(initial=-1)) + 1)
        count = np.pad(count, (0, size - count.size)) + np.bincount(position, minlength=size)
        total = np.pad(total, (0, size - total.size))
        total += np.bincount(position, reward, minlength=size)
    if count.size < 2:
        return None
    mean = total / np.maximum(count, 1.0)
    if not mean[0] > 0.0:
        return np.ones(count.size)
    relative: NDArray[np.float64] = np.clip(mean / mean[0], 0.01, 10.0)
    return relative
