"""Operands for tests of a native core, its results, and those of eager torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from offtower.ops import DenseReward, FactoredReward, policy_terms
from offtower.ops.types import Backend

KINDS = ("none", "dense", "identity", "sigmoid")
NAMES = ("log_prob", "log_normalizer", "expected_reward", "entropy", "du", "dv", "db")


class Case:
    """Operands rounded to `dtype` once, so that only the computation differs."""

    def __init__(
        self,
        rows: int,
        items: int,
        dim: int,
        kind: str,
        dtype: torch.dtype,
        scale: float = 1.0,
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        g = torch.Generator().manual_seed(rows * 7919 + items * 31 + dim + seed * 1_000_003)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64, generator=g).to(device, dtype)

        self.u = draw(rows, dim) * scale
        self.v, self.b = draw(items, dim) * scale / math.sqrt(dim), draw(items)
        self.action = torch.randint(0, items, (rows,), generator=g).to(device)
        self.reward: Any = None
        if kind == "dense":
            self.reward = DenseReward(draw(rows, items))
        elif kind != "none":
            width = min(dim, 24)
            self.reward = FactoredReward(
                draw(rows, width) / math.sqrt(width),
                draw(items, width),
                draw(items),
                kind,  # type: ignore[arg-type]
            )
        self.cotangents = torch.randn(4, rows, dtype=torch.float64, generator=g).to(device)

    def _results(self, outputs: list[Tensor | None], leaves: list[Tensor]) -> dict[str, Tensor]:
        there = [(o, c) for o, c in zip(outputs, self.cotangents, strict=True) if o is not None]
        torch.stack([(o * c.to(o.dtype)).sum() for o, c in there]).sum().backward()
        gradients = [leaf.grad for leaf in leaves]
        return {
            name: value.detach().cpu().double()
            for name, value in zip(NAMES, [*outputs, *gradients], strict=True)
            if value is not None
        }

    def native(self, backend: Backend = "cpu") -> dict[str, Tensor]:
        leaves = [x.clone().requires_grad_() for x in (self.u, self.v, self.b)]
        t = policy_terms(
            leaves[0], leaves[1], self.action, temperature=0.7, item_bias=leaves[2],
            reward_model=self.reward, entropy=True, backend=backend,
        )  # fmt: skip
        return self._results([t.log_prob, t.log_normalizer, t.expected_reward, t.entropy], leaves)

    def torch(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Eager torch in `dtype`, with the whole matrix of logits."""
        leaves = [x.to(dtype).requires_grad_() for x in (self.u, self.v, self.b)]
        u, v, b = leaves
        s = u @ v.T / 0.7 + b
        shifted = s - s.detach().amax(1, keepdim=True)
        mass = shifted.exp()
        total = mass.sum(1)
        pi = mass / total[:, None]
        lse = s.detach().amax(1) + total.log()
        log_prob = shifted.gather(1, self.action[:, None])[:, 0] - total.log()
        expected = None
        if self.reward is not None:
            expected = (pi * self._q(dtype)).sum(1)
        entropy = total.log() - (pi * shifted).sum(1)
        return self._results([log_prob, lse, expected, entropy], leaves)

    def _q(self, dtype: torch.dtype) -> Tensor:
        if isinstance(self.reward, DenseReward):
            return self.reward.values.to(dtype)
        r = self.reward
        q = r.context.to(dtype) @ r.item.to(dtype).T + r.item_bias.to(dtype)
        return torch.sigmoid(q) if r.link == "sigmoid" else q


def check_errors(
    shape: tuple[int, int, int],
    kind: str,
    dtype: torch.dtype,
    scale: float,
    native: Callable[[Case], dict[str, Tensor]],
    *,
    seeds: Sequence[int] = range(4),
    device: str = "cpu",
    roundings: int = 1,
) -> None:
    """Root mean squares over rows and seeds are within twice those of eager torch in that dtype.

    Single errors are a few roundings, and the ratio of two largest ones says little. On top of
    twice torch's there is one rounding of the result (of 1, where it is smaller: log-probabilities
    are differences of such numbers), or `roundings` of them, since torch is at times exact.
    """
    errors: dict[str, list[list[Tensor]]] = {}
    size: dict[str, float] = {}
    for seed in seeds:
        case = Case(*shape, kind, dtype, scale, seed, device)
        exact, ours, plain = case.torch(torch.float64), native(case), case.torch(dtype)
        assert ours.keys() == exact.keys()
        for name, wanted in exact.items():
            pair = errors.setdefault(name, [[], []])
            pair[0].append((ours[name] - wanted).flatten())
            pair[1].append((plain[name] - wanted).flatten())
            size[name] = max(size.get(name, 0.0), float(wanted.abs().max()))
    for name, (mine, torchs) in errors.items():
        gradient = name in ("du", "dv", "db")
        rounded_to = dtype if gradient else torch.float32
        unit = size[name] if gradient else max(1, size[name])
        floor = roundings * torch.finfo(rounded_to).eps / 2 * unit
        error, bar = rms(mine), 2 * rms(torchs) + floor
        assert error <= bar, (name, shape, error, bar)


def rms(parts: list[Tensor]) -> float:
    return float(torch.cat(parts).square().mean().sqrt())
