"""A simulated log with its catalogue, and the exact value of policies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from offtower.data.catalogue import Catalogue
from offtower.data.encoding import to_tensors
from offtower.data.log import TableLog
from offtower.models.items import ItemFeatures
from offtower.models.policy import TwoTowerPolicy

Array = NDArray[np.float64]

_BATCH_ROWS = 256


@dataclass(frozen=True)
class Truth:
    """Held-out contexts and the expected rewards of all items."""

    contexts: pa.Table
    """Context columns of t rounds that are not in the log."""
    expected: Callable[[int, int], Tensor]
    """(start, stop) -> (stop - start, N) expected rewards of a slice of the contexts."""


@dataclass(frozen=True)
class QualityWorld:
    """A world and its log. Methods read `log` and `catalogue`; `truth` is for evaluation only."""

    name: str
    log: TableLog
    catalogue: Catalogue
    truth: Truth
    baselines: dict[str, float] = field(default_factory=dict)
    """Values on the held-out contexts: logging, best_fixed, optimum and, for label sets, supervised
    (the greedy policy of a regression on all labels)."""


@dataclass(frozen=True)
class Value:
    """Means over the held-out contexts."""

    softmax: float
    """mean_i sum_a pi(a|x_i) q(x_i, a), the value of the policy."""
    greedy: float
    """mean_i q(x_i, argmax_a pi(a|x_i)), the value of its greedy policy."""


def value(world: QualityWorld, policy: TwoTowerPolicy, items: ItemFeatures) -> Value:
    """Return the exact value of a policy."""
    softmax = greedy = 0.0
    total = world.truth.contexts.num_rows
    policy.eval()
    with torch.no_grad():
        embedded = policy.embed_items(items)
        for start in range(0, total, _BATCH_ROWS):
            stop = min(start + _BATCH_ROWS, total)
            table = world.truth.contexts.slice(start, stop - start)
            context = policy.embed_contexts(to_tensors(policy.context_encoding.encode(table)))
            logit = (context @ embedded.embedding.T).double() / policy.temperature
            if embedded.bias is not None:
                logit += embedded.bias
            part = value_of_scores(logit, world.truth.expected(start, stop))
            softmax += part.softmax * (stop - start)
            greedy += part.greedy * (stop - start)
    return Value(softmax / total, greedy / total)


def value_of_scores(logit: Tensor, expected: Tensor) -> Value:
    """Return the values of softmax(logit) and its greedy policy; both arguments are (n, N)."""
    best = logit.argmax(dim=1, keepdim=True)
    return Value(
        float((torch.softmax(logit, dim=1) * expected).sum(dim=1).mean()),
        float(expected.gather(1, best).mean()),
    )
