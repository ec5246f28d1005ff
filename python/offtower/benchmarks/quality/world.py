"""What every world of the benchmark offers: a log, a catalogue, and the exact value of policies."""

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

_ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class Truth:
    """Held-out contexts and the expected reward of every item in each."""

    contexts: pa.Table
    """(t rows) context columns of rounds that no log holds."""
    expected: Callable[[int, int], Tensor]
    """(start, stop) -> (stop - start, N) expected rewards of a slice of them."""


@dataclass(frozen=True)
class QualityWorld:
    """One draw of a world with its log. Nothing of the truth reaches a learner."""

    name: str
    log: TableLog
    catalogue: Catalogue
    truth: Truth
    landmarks: dict[str, float] = field(default_factory=dict)
    """Values over the held-out contexts: logging, best_fixed, optimum, and supervised where labels
    are known (a model that sees all of them, acting greedily)."""


@dataclass(frozen=True)
class Value:
    """Over the world's held-out contexts."""

    softmax: float
    """mean_i sum_a pi(a|x_i) q(x_i, a): of the policy as it is."""
    greedy: float
    """mean_i q(x_i, argmax_a pi(a|x_i)): of its most likely item."""


def value(world: QualityWorld, policy: TwoTowerPolicy, items: ItemFeatures) -> Value:
    """The exact value of a policy."""
    softmax = greedy = 0.0
    total = world.truth.contexts.num_rows
    policy.eval()
    with torch.no_grad():
        embedded = policy.embed_items(items)
        for start in range(0, total, _ROWS_AT_ONCE):
            stop = min(start + _ROWS_AT_ONCE, total)
            table = world.truth.contexts.slice(start, stop - start)
            context = policy.embed_contexts(to_tensors(policy.context_encoding.encode(table)))
            logit = (context @ embedded.embedding.T).double() / policy.temperature
            if embedded.bias is not None:
                logit += embedded.bias
            part = of_scores(logit, world.truth.expected(start, stop))
            softmax += part.softmax * (stop - start)
            greedy += part.greedy * (stop - start)
    return Value(softmax / total, greedy / total)


def of_scores(logit: Tensor, expected: Tensor) -> Value:
    """Value of softmax(logit), and of its most likely item, where (n, N) rewards are expected."""
    best = logit.argmax(dim=1, keepdim=True)
    return Value(
        float((torch.softmax(logit, dim=1) * expected).sum(dim=1).mean()),
        float(expected.gather(1, best).mean()),
    )
