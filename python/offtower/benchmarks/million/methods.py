"""The learners of the million-item benchmark; each trains for a number of seconds."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from offtower.benchmarks.million.clock import BudgetSpent, Clock
from offtower.benchmarks.million.oracle import oracle
from offtower.benchmarks.million.peers import implicit_als, torch_rechub, two_towers
from offtower.benchmarks.million.world import MillionWorld
from offtower.config import parse_config
from offtower.data.encoding import to_tensors
from offtower.models import TwoTowerPolicy
from offtower.progress import Progress
from offtower.training.auto import train_auto
from offtower.training.run import build_trainer


@dataclass(frozen=True)
class Learned:
    """A policy as embeddings, and what its training took.

    Attributes:
        context: (n, d) float32 of the world's fresh contexts, divided by the temperature.
        item: (N, d) float32.
        bias: (N,) float32.
        is_policy: the softmax is what the method learns; of others the greedy policy is scored.
        seconds: of training.
        facts: figures of the method.
    """

    context: Tensor
    item: Tensor
    bias: Tensor | None
    is_policy: bool
    seconds: float
    facts: dict[str, Any] = field(default_factory=dict)


Method = Callable[[MillionWorld, float, int], Learned]
"""Learns from (world, seconds, seed)."""


class _ClockProgress(Progress):
    """Counts rows; raises `BudgetSpent` when the clock is over."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def advance(self, amount: int, note: str = "") -> None:
        self._clock.rows += amount
        if self._clock.over:
            raise BudgetSpent


def auto(world: MillionWorld, seconds: float, seed: int) -> Learned:
    """`objective: auto` with default settings and this budget."""
    data = world.data
    config = parse_config(
        {
            "name": "auto",
            "seed": seed,
            "data": {"train": "memory", "catalogue": "memory"},
            "auto": {"budget": seconds / 60},
        }
    )
    began = time.perf_counter()
    found = train_auto(config, data)
    taken = time.perf_counter() - began
    facts = {key: found.report.get(key) for key in ("chosen", "value", "low", "stages")}
    return _embedded(world, found.policy, taken, facts, is_policy=True)


def objective(name: str, world: MillionWorld, seconds: float, seed: int) -> Learned:
    """A named objective with sampled terms, until the seconds are spent."""
    tower = {"hidden_layer_sizes": [64]}
    config = parse_config(
        {
            "name": name,
            "seed": seed,
            "data": {"train": "memory", "catalogue": "memory"},
            "policy": {"embedding_dim": 32, "context_tower": tower, "item_tower": tower},
            "objective": {"name": name},
            "training": {
                "terms": "exact" if name == "regression" else "sampled",
                "epochs": 1_000_000,
                "batch_size": 1024,
                "learning_rate": 3e-3,
                "measure_terms": False,
                "log_every_steps": None,
            },
        }
    )
    trainer = build_trainer(config, world.data, None)
    clock = Clock(seconds)
    trainer._progress = _ClockProgress(clock)
    with contextlib.suppress(BudgetSpent):
        trainer.fit()
    taken, facts = clock.spent, clock.facts()
    if trainer.step.proposal is not None:
        trainer.step.proposal.close()
    return _embedded(world, trainer.policy, taken, facts, is_policy=name != "regression")


@torch.no_grad()
def _embedded(
    world: MillionWorld,
    policy: TwoTowerPolicy,
    seconds: float,
    facts: dict[str, Any],
    *,
    is_policy: bool,
) -> Learned:
    policy.eval()
    items = policy.embed_items(world.data.items)
    features = to_tensors(policy.context_encoding.encode(world.contexts))
    context = policy.embed_contexts(features) / policy.temperature
    return Learned(context, items.embedding, items.bias, is_policy, seconds, facts)


def _scorer(
    learn: Callable[..., tuple[Tensor, Tensor, Tensor | None]],
    world: MillionWorld,
    seconds: float,
    seed: int,
) -> Learned:
    """A learner of embeddings whose largest inner product is shown."""
    arrays = world.arrays
    clock = Clock(seconds)
    context, item, bias = learn(arrays, world.contexts, clock, seed)
    return Learned(context, item, bias, False, clock.spent, clock.facts())


def _oracle(world: MillionWorld, seconds: float, seed: int) -> Learned:
    began = time.perf_counter()
    context, item, bias = oracle(world)
    return Learned(context, item, bias, False, time.perf_counter() - began)


ORACLE = "oracle"
METHODS: Mapping[str, Method] = {
    "auto": auto,
    "regression": partial(objective, "regression"),
    "weighted_likelihood": partial(objective, "weighted_likelihood"),
    "torch_regression": partial(_scorer, partial(two_towers, "regression")),
    "torch_in_batch": partial(_scorer, partial(two_towers, "in_batch")),
    "torch_log_q": partial(_scorer, partial(two_towers, "log_q")),
    "torch_rechub": partial(_scorer, torch_rechub),
    "implicit_als": partial(_scorer, implicit_als),
    ORACLE: _oracle,
}
