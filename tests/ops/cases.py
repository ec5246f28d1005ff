"""Operands for tests of a native core, its results, and the results of eager torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from offtower.ops import DenseReward, Eligibility, FactoredReward, policy_terms
from offtower.ops.types import Backend
from tests.ops.eligible_sets import draw_eligible

KINDS = ("none", "dense", "identity", "sigmoid")
NAMES = ("log_prob", "log_normalizer", "expected_reward", "entropy", "du", "dv", "db")


@dataclass(frozen=True)
class Variant:
    """Optional parts of a case: the entropy term, biases of logits and factored rewards, and forms
    of eligible items (`eligible_sets.FORMS`; "" for all items)."""

    entropy: bool = True
    bias: bool = True
    eligible: str = ""


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
        variant: Variant = Variant(),
    ) -> None:
        self.variant = variant
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
                draw(items) if variant.bias else None,
                kind,  # type: ignore[arg-type]
            )
        self.cotangents = torch.randn(4, rows, dtype=torch.float64, generator=g).to(device)
        self.eligible: Eligibility | None = None
        if variant.eligible:
            self.eligible, mask = draw_eligible(self.action.cpu(), items, variant.eligible, g)
            self.eligible, self.mask = self.eligible.to(device), mask.to(device)

    def _results(self, outputs: list[Tensor | None], leaves: list[Tensor]) -> dict[str, Tensor]:
        there = [(o, c) for o, c in zip(outputs, self.cotangents, strict=True) if o is not None]
        torch.stack([(o * c.to(o.dtype)).sum() for o, c in there]).sum().backward()
        gradients = [leaf.grad for leaf in leaves]
        names = NAMES[: len(outputs) + len(leaves)]
        return {
            name: value.detach().cpu().double()
            for name, value in zip(names, [*outputs, *gradients], strict=True)
            if value is not None
        }

    def _leaves(self, dtype: torch.dtype) -> list[Tensor]:
        """Copies of u, v and, unless the variant has none, the biases."""
        operands = (self.u, self.v, self.b) if self.variant.bias else (self.u, self.v)
        return [x.detach().clone().to(dtype).requires_grad_() for x in operands]

    def native(self, backend: Backend = "cpu") -> dict[str, Tensor]:
        leaves = self._leaves(self.u.dtype)
        t = policy_terms(
            leaves[0], leaves[1], self.action, temperature=0.7, item_bias=self._bias(leaves),
            reward_model=self.reward, entropy=self.variant.entropy, eligible=self.eligible,
            backend=backend,
        )  # fmt: skip
        return self._results([t.log_prob, t.log_normalizer, t.expected_reward, t.entropy], leaves)

    def torch(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Eager torch in `dtype`, with the whole matrix of logits."""
        leaves = self._leaves(dtype)
        bias = self._bias(leaves)
        s = leaves[0] @ leaves[1].T / 0.7
        if bias is not None:
            s = s + bias
        if self.eligible is not None:
            s = s.masked_fill(~self.mask, float("-inf"))
        shifted = s - s.detach().amax(1, keepdim=True)
        mass = shifted.exp()
        if self.eligible is not None:
            shifted = shifted.masked_fill(~self.mask, 0.0)
        total = mass.sum(1)
        pi = mass / total[:, None]
        lse = s.detach().amax(1) + total.log()
        log_prob = shifted.gather(1, self.action[:, None])[:, 0] - total.log()
        expected = None
        if self.reward is not None:
            expected = (pi * self._q(dtype)).sum(1)
        entropy = total.log() - (pi * shifted).sum(1) if self.variant.entropy else None
        return self._results([log_prob, lse, expected, entropy], leaves)

    @staticmethod
    def _bias(leaves: list[Tensor]) -> Tensor | None:
        return leaves[2] if len(leaves) == 3 else None

    def _q(self, dtype: torch.dtype) -> Tensor:
        if isinstance(self.reward, DenseReward):
            return self.reward.values.to(dtype)
        r = self.reward
        q = r.context.to(dtype) @ r.item.to(dtype).T
        if r.item_bias is not None:
            q = q + r.item_bias.to(dtype)
        return torch.sigmoid(q) if r.link == "sigmoid" else q


@lru_cache(maxsize=48)
def _with_references(
    shape: tuple[int, int, int],
    kind: str,
    dtype: torch.dtype,
    scale: float,
    seed: int,
    device: str,
    variant: Variant,
) -> tuple[Case, dict[str, Tensor], dict[str, Tensor]]:
    """A case, its results in float64, and those of torch in `dtype`; cores that are checked one
    after the other share them."""
    case = Case(*shape, kind, dtype, scale, seed, device, variant)
    return case, case.torch(torch.float64), case.torch(dtype)


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
    variant: Variant = Variant(),
) -> None:
    """Assert that root mean square errors are at most twice those of eager torch in that dtype.

    Errors are against float64, over rows and seeds. (The ratio of two maximum errors of a few
    roundings is noise.) Because torch is at times exact, the bound adds `roundings` roundings of
    the result, or of 1 where the result is smaller: log-probabilities are differences of such
    numbers.
    """
    errors: dict[str, list[list[Tensor]]] = {}
    size: dict[str, float] = {}
    for seed in seeds:
        case, exact, plain = _with_references(shape, kind, dtype, scale, seed, device, variant)
        ours = native(case)
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
