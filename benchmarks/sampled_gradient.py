"""Error of the gradient of sampled terms for each proposal.

The gradients of log_prob (likelihood, IPS) and of expected_reward (the direct part of DR) in the
context embedding u are computed for R independent sets of draws. Reported are the relative root
mean squared error sqrt(E |g^ - g|^2) / |g| and the relative bias |E g^ - g| / |g|, pooled over
contexts. The variance of R repetitions is subtracted from the squared bias, so it can be 0.

    python benchmarks/sampled_gradient.py --items 2000 100000 1000000 --json sampled_gradient.json
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offtower.ops import FactoredReward, policy_terms, sampled_policy_terms, top_k
from offtower.sampling import ItemCounts, Proposal, make_proposal

CONTEXTS, EMBEDDING, ROWS = 64, 32, 100_000
TERMS = ("log_prob", "expected_reward")


class World:
    """A reward model, a log of `ROWS` rows, and a near-uniform or a peaked policy."""

    def __init__(self, items: int, dim: int, kind: str, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        e, t = normal(CONTEXTS, dim), normal(items, dim) / math.sqrt(dim)
        self.reward = FactoredReward(2 * e, t, torch.full((items,), -1.0), link="sigmoid")
        rng = np.random.default_rng(seed)
        popularity = rng.permutation(np.arange(1, items + 1) ** -0.7)
        logged = rng.choice(items, size=ROWS, p=popularity / popularity.sum())
        self.counts = ItemCounts.of(logged)
        self.logged = torch.from_numpy(logged)
        if kind == "near-uniform":
            self.u, self.v = 0.1 * normal(CONTEXTS, dim), normal(items, dim)
        else:
            # A trained policy: logits proportional to those of the reward, scaled to 20 effective
            # items per context.
            self.u, self.v = _scaled_to_entropy(e, t, math.log(20.0)), t
        self.action = self.logged[torch.randint(0, ROWS, (CONTEXTS,), generator=generator)]
        self.effective_items = float(
            policy_terms(self.u, self.v, self.action, entropy=True).entropy.mean().exp()
        )

    def gradients(self, terms: Any, u: Tensor) -> dict[str, Tensor]:
        return {
            name: torch.autograd.grad(getattr(terms, name).sum(), u, retain_graph=True)[0].double()
            for name in TERMS
        }

    def exact(self) -> dict[str, Tensor]:
        u = self.u.clone().requires_grad_()
        return self.gradients(policy_terms(u, self.v, self.action, reward_model=self.reward), u)

    def sampled(self, proposal: Proposal, seed: int, exact_item: Tensor | None) -> Any:
        rng = np.random.default_rng([seed, 1])
        # A batch of 1,024 with one of the contexts' rows. The rows of all contexts, the same in
        # every repetition, would appear as bias.
        others = torch.from_numpy(rng.integers(ROWS, size=1023))
        draws = proposal.draw(seed, torch.cat([self.action[:1], self.logged[others]]))
        u = self.u.clone().requires_grad_()
        parts = [draws.item]
        if exact_item is not None:
            parts.append(exact_item.reshape(-1))
        touched, index = torch.unique(torch.cat(parts), return_inverse=True)
        m = len(draws.item)
        terms = sampled_policy_terms(
            u,
            self.v[self.action],
            self.action,
            self.v[touched],
            draws.item,
            draws.log_proposal,
            reward_model=self.reward,
            sample_index=index[:m],
            exact_item=exact_item,
            exact_index=None if exact_item is None else index[m:].view(exact_item.shape),
        )
        return self.gradients(terms, u)


def _scaled_to_entropy(e: Tensor, t: Tensor, entropy: float) -> Tensor:
    """Return `e` times the factor at which the mean entropy is `entropy`, found by bisection."""
    low, high = 0.0, 200.0
    action = torch.zeros(len(e), dtype=torch.int64)
    for _ in range(18):
        middle = (low + high) / 2
        found = policy_terms(middle * e, t, action, entropy=True).entropy
        low, high = (middle, high) if float(found.mean()) > entropy else (low, middle)
    return high * e


def proposals(world: World, items: int, draws: int) -> dict[str, tuple[Proposal, Tensor | None]]:
    """Return proposals and exact items by name; in-batch proposals have 1,024 more draws."""
    k = min(256, draws, items)
    best = top_k(world.u, world.v, k)[1]
    made: dict[str, tuple[Proposal, Tensor | None]] = {
        name: (make_proposal(name, items, num_samples=draws, counts=world.counts), None)
        for name in ("uniform", "frequency", "in_batch", "mixed")
    }
    made[f"uniform + top {min(32, k)}"] = (made["uniform"][0], best[:, :32].contiguous())
    made[f"uniform + top {k}"] = (made["uniform"][0], best)
    return made


def measure(world: World, items: int, draws: int, repeats: int) -> list[dict[str, Any]]:
    exact = world.exact()
    lines = []
    for name, (proposal, exact_item) in proposals(world, items, draws).items():
        total = {term: torch.zeros_like(g) for term, g in exact.items()}
        square = dict.fromkeys(exact, 0.0)
        began = time.perf_counter()
        for seed in range(repeats):
            for term, g in world.sampled(proposal, seed, exact_item).items():
                total[term] += g - exact[term]
                square[term] += float((g - exact[term]).square().sum())
        seconds = (time.perf_counter() - began) / repeats
        line: dict[str, Any] = {"proposal": name, "draws": draws, "seconds": seconds}
        for term, g in exact.items():
            norm = float(g.square().sum())
            mse = square[term] / repeats
            of_mean = float((total[term] / repeats).square().sum())
            bias = max(0.0, of_mean - (mse - of_mean) / (repeats - 1))
            line[term] = {"rmse": math.sqrt(mse / norm), "bias": math.sqrt(bias / norm)}
        lines.append(line)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, nargs="+", default=[2000, 100_000, 1_000_000])
    parser.add_argument("--draws", type=int, nargs="+", default=[100, 1000, 10_000])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--dim", type=int, default=EMBEDDING)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results = []
    print("relative RMSE (relative bias) of a context's gradient")
    for items in arguments.items:
        for kind in ("near-uniform", "peaked"):
            world = World(items, arguments.dim, kind)
            print(f"\n{items:,} items, {kind}: {world.effective_items:,.0f} effective items")
            for draws in arguments.draws:
                for line in measure(world, items, draws, arguments.repeats):
                    parts = (f"{line[t]['rmse']:8.3f} ({line[t]['bias']:.3f})" for t in TERMS)
                    print(f"{draws:7,} {line['proposal']:<18}", "   ".join(parts), flush=True)
                    results.append({"items": items, "policy": kind, **line})
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
