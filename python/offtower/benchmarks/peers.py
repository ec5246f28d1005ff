"""Other packages' trainers on the same data, if they are installed.

Each takes (items, dim, batch, steps) and returns rows per second.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from offtower.benchmarks import world

Peer = Callable[[int, int, int, int], float]

EAGER_CELLS = 3e8
"""Most logits per step for plain torch: a few GB including what autograd saves."""

OBP_CELLS = 3e7
"""Most rows x actions for OBP, which holds several float64 arrays of that size."""


class Unavailable(Exception):
    """The peer is not installed or cannot handle the size; the message gives the reason."""


def plain_torch(items: int, dim: int, batch: int, steps: int) -> float:
    """The same model and loss in eager torch, with log_softmax over all items."""
    if batch * items > EAGER_CELLS:
        raise Unavailable(f"a (batch, items) array of {batch} x {items:,} logits, and its gradient")
    context, action, weight, features = _tensors(items, batch)
    towers = nn.ModuleList([_tower(dim), _tower(dim)])
    optimizer = torch.optim.AdamW(towers.parameters(), lr=1e-3, fused=True)

    def step() -> None:
        u, v = towers[0](context), towers[1](features)
        log_prob = torch.log_softmax(u @ v.T, dim=1)[torch.arange(batch), action]
        optimizer.zero_grad()
        (-(weight * log_prob).mean()).backward()
        optimizer.step()

    return _rate(step, batch, min(steps, 5))


def obp_learner(items: int, dim: int, batch: int, steps: int) -> float:
    """Open Bandit Pipeline's NNPolicyLearner (IPS), with one output per item and no item tower."""
    if batch * items > OBP_CELLS:
        raise Unavailable(f"needs several arrays of rounds x actions, {batch} x {items:,} each")
    policy = _import("obp.policy", "obp")
    estimators = _import("obp.ope", "obp")
    rng = np.random.default_rng(0)
    learner = policy.NNPolicyLearner(
        n_actions=items,
        dim_context=world.WIDTH,
        off_policy_objective=estimators.InverseProbabilityWeighting().estimate_policy_value_tensor,
        hidden_layer_size=(world.HIDDEN, dim),
        batch_size=batch,
        max_iter=4,
        solver="adam",
    )
    began = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        learner.fit(
            context=rng.standard_normal((batch, world.WIDTH)),
            action=rng.integers(items, size=batch),
            reward=(rng.random(batch) < 0.3).astype(float),
            pscore=np.full(batch, 1.0 / items),
        )
    # One batch per epoch, four epochs.
    return 4 * batch / (time.perf_counter() - began)


def torch_rechub(items: int, dim: int, batch: int, steps: int) -> float:
    """torch-rechub's DSSM and trainer, with in-batch sampled softmax without logQ correction."""
    models = _import("torch_rechub.models.matching", "torch-rechub")
    features = _import("torch_rechub.basic.features", "torch-rechub")
    trainers = _import("torch_rechub.trainers", "torch-rechub")
    tower = {"dims": [world.HIDDEN, dim], "activation": "relu"}
    sides = {
        side: [features.DenseFeature(f"{side}{i}") for i in range(world.WIDTH)]
        for side in ("user", "item")
    }
    model = models.DSSM(sides["user"], sides["item"], tower, tower)
    trainer = trainers.MatchTrainer(model, mode=0, in_batch_neg=True, n_epoch=1)
    context, action, _, vectors = _tensors(items, batch)
    loader = [_rechub_batch(context, vectors[action])] * steps
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        trainer.train_one_epoch(loader[:1])
        began = time.perf_counter()
        trainer.train_one_epoch(loader)
    return steps * batch / (time.perf_counter() - began)


PEERS: dict[str, Peer] = {
    "plain torch, full softmax": plain_torch,
    "OBP NNPolicyLearner": obp_learner,
    "torch-rechub DSSM in-batch": torch_rechub,
}


def _rechub_batch(context: Tensor, item: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    columns = {f"user{i}": context[:, i] for i in range(world.WIDTH)}
    columns |= {f"item{i}": item[:, i] for i in range(world.WIDTH)}
    return columns, torch.ones(len(context))


def _tensors(items: int, batch: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(batch, world.WIDTH, generator=generator),
        torch.randint(0, items, (batch,), generator=generator),
        torch.rand(batch, generator=generator),
        torch.randn(items, world.WIDTH, generator=generator),
    )


def _tower(dim: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(world.WIDTH, world.HIDDEN), nn.ELU(), nn.Linear(world.HIDDEN, dim)
    )


def _rate(step: Callable[[], None], batch: int, steps: int) -> float:
    step()
    return batch / statistics.median(_times(step, steps))


def _times(step: Callable[[], None], steps: int) -> Iterator[float]:
    for _ in range(steps):
        began = time.perf_counter()
        step()
        yield time.perf_counter() - began


def _import(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Unavailable(f"package '{package}' is not installed ({error})") from None
