"""Standard errors and power of a verdict at +10 %, by estimator, in six worlds.

python benchmarks/experiments/power.py [LOGS] [ROWS]

For each world: the mean standard error of V(new) - V(logging), and its root mean squared error over
the logs, as ratios to those of snips, which decides without a reward model; its bias; the ratio of
true to estimated standard deviation; and the share of logs whose gamma interval lies above 0.
`bound` is DR with the true expected rewards: the semiparametric efficiency bound. Reward models are
ridge regressions on products of context and item features, cross-fitted over two halves by user.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

import numpy as np

from offtower.evaluation import EvaluationRows
from offtower.evaluation import estimators as e
from offtower.evaluation.intervals.gamma import gamma_interval
from offtower.evaluation.intervals.statistics import collect, finish

DIM = 4
ESTIMATORS = {"snips": e.SNIPS(), "reg_ips": e.RegIPS(), "dr": e.DR(), "reg_dr": e.RegDR()}


@dataclass(frozen=True)
class World:
    """items: of the catalogue. level: logit of a reward. users: rows of each, 0 for independent
    rows. inverse_temperature: of the new policy. model_scale: factor of the reward model."""

    items: int = 10
    level: float = -1.0
    users: int = 0
    inverse_temperature: float = 1.0
    model_scale: float = 1.0


WORLDS = {
    "benign": World(),
    "1,000 items": World(items=1_000),
    "40 rows a user": World(users=40),
    "rewards .5 %": World(level=-5.3),
    "sharp policy": World(inverse_temperature=8.0),
    "model of twice the scale": World(level=0.5, model_scale=2.0),
}


def softmax(logit: np.ndarray) -> np.ndarray:
    mass = np.exp(logit - logit.max(axis=1, keepdims=True))
    return np.asarray(mass / mass.sum(axis=1, keepdims=True))


class Simulator:
    """Draws logs; the new policy's quality is set so that its value is 1.1 of the logging one."""

    def __init__(self, world: World) -> None:
        self.world, rng = world, np.random.default_rng(1)
        self.item = rng.normal(size=(world.items, DIM))
        self.taste = rng.normal(size=(DIM, DIM)) / DIM
        self.noise = rng.normal(size=(DIM, DIM)) / DIM
        self.logging = rng.normal(size=(DIM, DIM)) / DIM
        context = rng.normal(size=(2_000, DIM))
        low, high = -3.0, 3.0
        for _ in range(30):
            self.quality = (low + high) / 2.0
            new, old, q = self.policies(context)
            if (new * q).sum() < 1.1 * (old * q).sum():
                low = self.quality
            else:
                high = self.quality

    def policies(self, context: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """New and logging probabilities, and expected rewards: (n, items)."""
        logit = context @ self.taste @ self.item.T
        mix = self.quality * self.taste + self.noise
        new = softmax(self.world.inverse_temperature * (context @ mix @ self.item.T))
        old = softmax(context @ self.logging @ self.item.T)
        return new, 0.9 * old + 0.1 / self.world.items, 1.0 / (1.0 + np.exp(-logit - self.level))

    def truth(self) -> float:
        """V(new) - V(logging) over 20,000 contexts, with the users' shifts where there are any."""
        rng = np.random.default_rng(3)
        new, old, q = self.policies(rng.normal(size=(20_000, DIM)))
        if self.world.users:
            odds = q / (1.0 - q) * np.exp(rng.normal(size=(len(q), 1)))
            q = odds / (1.0 + odds)
        return float(((new - old) * q).sum() / len(q))

    @property
    def level(self) -> float:
        return self.world.level

    def log(self, n: int, rng: np.random.Generator) -> tuple[EvaluationRows, EvaluationRows]:
        """Rows with a cross-fitted model and with the true expected rewards."""
        user = np.arange(n) // self.world.users if self.world.users else np.arange(n)
        context = rng.normal(size=(n, DIM))
        shift = np.zeros(n)
        if self.world.users:
            context = 0.8 * rng.normal(size=(n, DIM))[user] + 0.6 * context
            shift = rng.normal(size=n)[user]
        new, old, q = self.policies(context)
        row = np.arange(n)
        action = np.minimum((old.cumsum(axis=1) < rng.random((n, 1))).sum(axis=1), q.shape[1] - 1)
        logit = np.log(q[row, action] / (1.0 - q[row, action])) + shift
        reward = (rng.random(n) < 1.0 / (1.0 + np.exp(-logit))) * 1.0
        at_action, mean = np.empty(n), np.empty(n)
        for half in (0, 1):
            here, there = user % 2 == half, user % 2 != half
            weight = ridge(features(context[there], self.item[action[there]]), reward[there])
            weight = self.world.model_scale * weight
            at_action[here] = features(context[here], self.item[action[here]]) @ weight
            # Features are linear in the item: the mean over the policy is that of the item.
            mean[here] = features(context[here], new[here] @ self.item) @ weight
        key = user if self.world.users else None
        rows = EvaluationRows(
            new[row, action] / old[row, action], reward, at_action, mean, key, row
        )
        truth = replace(rows, action_reward=q[row, action], expected_reward=(new * q).sum(axis=1))
        return rows, truth


def features(context: np.ndarray, item: np.ndarray) -> np.ndarray:
    product = (context[:, :, None] * item[:, None, :]).reshape(len(context), -1)
    return np.concatenate([np.ones((len(context), 1)), context, item, product], axis=1)


def ridge(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.asarray(np.linalg.solve(x.T @ x + 5.0 * np.eye(x.shape[1]), x.T @ y))


def main(logs: int = 100, n: int = 4_000) -> None:
    for name, world in WORLDS.items():
        simulator, rng = Simulator(world), np.random.default_rng(2)
        found: dict[str, list[tuple[float, float, bool]]] = {x: [] for x in (*ESTIMATORS, "bound")}
        top = 0.0
        for _ in range(logs):
            rows, truth = simulator.log(n, rng)
            top = max(top, float(rows.importance_weight.max()))
            for label in found:
                seen = truth if label == "bound" else rows
                difference = e.Difference(ESTIMATORS.get(label, e.DR()), e.MeanReward())
                statistics = collect(
                    difference.terms(seen, seen), seen, by_user=world.users > 0, grouped=True
                )
                one = finish(difference, statistics)
                interval = gamma_interval(difference, statistics)
                found[label].append((one.value, one.std_error, interval.low > 0.0))
        snips = np.array(found["snips"])
        target, base = simulator.truth(), snips[:, 1].mean()
        root = np.sqrt(np.mean((snips[:, 0] - target) ** 2))
        print(f"{name} (largest weight {top:.0f}, {logs} logs of {n} rows)")
        for label, results in found.items():
            value, error, go = np.array(results, dtype=float).T
            print(
                f"  {label:8s} error / snips {error.mean() / base:.3f}  "
                f"rmse / snips {np.sqrt(np.mean((value - target) ** 2)) / root:.2f}  "
                f"bias / sd {(value.mean() - target) / value.std(ddof=1):+.2f}  "
                f"sd / error {value.std(ddof=1) / error.mean():.2f}  "
                f"above 0 {go.mean():.2f} ± {np.sqrt(go.mean() * (1 - go.mean()) / logs):.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:3]))
