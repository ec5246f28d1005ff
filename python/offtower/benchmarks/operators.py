"""Milliseconds per call of the fused operators, the reference and other implementations."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from offtower import ops
from offtower.benchmarks import Settings
from offtower.benchmarks.peers import EAGER_CELLS, Unavailable, obp_learner
from offtower.benchmarks.train import report_skipped

Call = Callable[[], object]

CELLS = 2e10
"""Most logits of all calls of one measurement; limits the number of calls."""

REFERENCE_CELLS = 5e8
"""Most logits of one call of the reference, which would take minutes beyond."""


class Operands:
    """Random embeddings whose logits have variance 1, and a factored reward of the same width."""

    def __init__(self, batch: int, items: int, dim: int) -> None:
        generator = torch.Generator().manual_seed(0)
        scale: float = dim**-0.25

        def normal(rows: int) -> Tensor:
            return torch.randn(rows, dim, generator=generator) * scale

        self.u, self.v = normal(batch).requires_grad_(), normal(items).requires_grad_()
        self.action = torch.randint(0, items, (batch,), generator=generator)
        self.reward = ops.FactoredReward(normal(batch), normal(items), link="sigmoid")


def fused(x: Operands, backend: Any) -> Mapping[str, Call]:
    """Return the measured calls of one backend."""

    def forward() -> None:
        with torch.no_grad():
            ops.policy_terms(x.u, x.v, x.action, backend=backend)

    def backward() -> None:
        ops.policy_terms(x.u, x.v, x.action, backend=backend).log_prob.mean().backward()

    def doubly_robust() -> None:
        found = ops.policy_terms(x.u, x.v, x.action, reward_model=x.reward, backend=backend)
        assert found.expected_reward is not None
        (found.log_prob + found.expected_reward).mean().backward()

    def draw() -> None:
        ops.sample_softmax(x.u, x.v, backend=backend)

    return {
        "log_prob": forward,
        "with gradient": backward,
        "DR with gradient": doubly_robust,
        "one draw": draw,
    }


def eager(x: Operands) -> Mapping[str, Call]:
    """Return the calls in plain torch, which materialize all logits."""

    def log_prob() -> Tensor:
        return torch.log_softmax(x.u @ x.v.T, 1).gather(1, x.action[:, None]).mean()

    def forward() -> None:
        with torch.no_grad():
            log_prob()

    def doubly_robust() -> None:
        log_policy = torch.log_softmax(x.u @ x.v.T, 1)
        q = torch.sigmoid(x.reward.context @ x.reward.item.T)
        expected = (log_policy.exp() * q).sum(1)
        (log_policy.gather(1, x.action[:, None])[:, 0] + expected).mean().backward()

    @torch.no_grad()
    def draw() -> None:
        torch.multinomial(torch.softmax(x.u @ x.v.T, 1), 1)

    return {
        "log_prob": forward,
        "with gradient": lambda: log_prob().backward(),
        "DR with gradient": doubly_robust,
        "one draw": draw,
    }


def run(settings: Settings) -> dict[str, Any]:
    """Measure every implementation at every catalogue size, interleaved."""
    results: list[dict[str, Any]] = []
    settings.say(
        f"milliseconds per call, {settings.batch} rows, d = {settings.dim}, "
        f"{torch.get_num_threads()} threads; x is times the fastest"
    )
    for items in settings.items:
        x = Operands(settings.batch, items, settings.dim)
        cells = settings.batch * items
        ways: dict[str, Mapping[str, Call]] = {}
        for name in reversed(ops.available_backends()):
            why = ""
            if name == "reference" and cells > REFERENCE_CELLS:
                why = f"{settings.batch} x {items:,} logits are too many for it"
            results += _skipped(settings, items, f"offtower {name}", why)
            if not why:
                ways[f"offtower {name}"] = fused(x, name)
        # DR materializes three arrays of logits, and autograd saves more.
        why = "" if 2 * cells <= EAGER_CELLS else f"arrays of {settings.batch} x {items:,} logits"
        results += _skipped(settings, items, "plain torch", why)
        if not why:
            ways["plain torch"] = eager(x)
        results += _measured(settings, items, x, ways)
        if settings.peers:
            results.append(_obp(settings, items))
    return {
        "suite": "ops",
        "batch": settings.batch,
        "dim": settings.dim,
        "threads": torch.get_num_threads(),
        "results": results,
    }


def _measured(
    settings: Settings, items: int, x: Operands, ways: Mapping[str, Mapping[str, Call]]
) -> Iterator[dict[str, Any]]:
    calls = max(1, min(settings.steps, int(CELLS / (settings.batch * items))))
    for what in next(iter(ways.values())):
        times: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(calls + 1):
            for name, way in ways.items():
                x.u.grad = x.v.grad = None
                began = time.perf_counter()
                way[what]()
                # The first call of each warms up.
                if turn:
                    times[name].append(time.perf_counter() - began)
        medians = {name: 1e3 * statistics.median(taken) for name, taken in times.items()}
        for name, median in medians.items():
            ratio = median / min(medians.values())
            settings.say(f"{items:>12,}  {what:<18}{name:<26}{median:12,.2f}{ratio:9.1f} x")
            yield {"items": items, "terms": what, "way": name, "ms": median, "times": ratio}


def _obp(settings: Settings, items: int) -> dict[str, Any]:
    """Measure a training step of OBP's learner; OBP has no such operator."""
    line = {"items": items, "terms": "a training step", "way": "OBP NNPolicyLearner"}
    try:
        rate = obp_learner(items, settings.dim, settings.batch, settings.steps)
    except Unavailable as reason:
        line["skipped"] = str(reason)
        report_skipped(settings, items, "OBP NNPolicyLearner", str(reason))
        return line
    line["ms"] = 1e3 * settings.batch / rate
    settings.say(f"{items:>12,}  {line['terms']:<18}{line['way']:<26}{line['ms']:12,.2f}")
    return line


def _skipped(settings: Settings, items: int, way: str, why: str) -> list[dict[str, Any]]:
    if not why:
        return []
    report_skipped(settings, items, way, why)
    return [{"items": items, "way": way, "skipped": why}]
