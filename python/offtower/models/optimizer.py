"""Optimisers by name."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn


def make_optimizer(
    name: Literal["adamw", "adam", "sgd"],
    module: nn.Module,
    learning_rate: float,
    weight_decay: float,
) -> torch.optim.Optimizer:
    """`adam` adds weight decay to the gradient (L2), `adamw` decouples it (Loshchilov 2019)."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=learning_rate, weight_decay=weight_decay)
    kind = torch.optim.AdamW if name == "adamw" else torch.optim.Adam
    return kind(parameters, lr=learning_rate, weight_decay=weight_decay, fused=True)
