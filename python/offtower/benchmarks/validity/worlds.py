"""Worlds of finite contexts and items, in which every policy's value is a sum."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from offtower.evaluation import EvaluationRows

Array = NDArray[np.float64]

Tail = Literal["benign", "moderate", "heavy", "extreme"]

CONTEXTS, ITEMS, DIM = 200, 20, 5
BLOCK_ROWS = 1_000_000
"""Rows drawn at a time."""
FUTURE = 1.125
"""Middle of the week after the log, which lasts from 0 to 1."""
WEEKS, WEEK, MONDAY = 4, 7 * 86_400_000_000, 1_767_571_200_000_000
"""Length of a log with times, in weeks; microseconds of a week, and of its first moment."""
DOLLARS = 5000.0
"""Declared largest reward where rewards are log-normal."""

TILT = {"benign": 0.3, "moderate": 1.0, "heavy": 3.0}
"""Weight of the expected reward in the evaluated policies' logits, beside the logging policy's."""
MEAN_REWARD = {"rare": 0.01, "very_rare": 0.001, "hardly_any": 0.0002, "revenue": 0.01}
"""Mean reward, or share of rewarded rows, of logging policies; about .58 elsewhere."""


@dataclass(frozen=True)
class Cell:
    """One world, and how large its logs are.

    Attributes:
        tail: of the weights. benign, moderate and heavy tilt the logging policy; extreme has
            logging probabilities down to 1e-4.
        rows: of a log. users: of equal numbers of rows each; 0 for independent rows.
        loggers: behavior policies that each log an equal share; the second prefers low rewards.
        reward: binary (about .58), almost_sure (.99), rare (.01), very_rare (.001), hardly_any
            (.0002), graded (a beta distribution), lognormal (sigma 2), revenue (log-normal, of 1 %
            of the rows).
        model: of the expected reward: good (10 % off), shrunk (half way to the mean), poor (noise).
        drift: the share of the rewards that changes over the log. target: period asks for the
            values over the log, future for those of the week after it. Rows of these cells have
            times in WEEKS weeks.
    """

    tail: Tail = "moderate"
    rows: int = 2000
    users: int = 0
    loggers: int = 1
    reward: str = "binary"
    model: Literal["good", "shrunk", "poor"] = "shrunk"
    drift: float = 0.0
    target: Literal["period", "future"] = "period"

    @property
    def name(self) -> str:
        parts = [self.tail, f"n{self.rows}", self.reward, self.model]
        if self.users:
            parts.insert(2, f"u{self.users}")
        if self.loggers > 1:
            parts.append(f"loggers{self.loggers}")
        if self.drift:
            parts.append(f"drift{self.drift:g}-{self.target}")
        return "-".join(parts)


def softmax(logit: Array) -> Array:
    weight = np.exp(logit - logit.max(axis=1, keepdims=True))
    return np.asarray(weight / weight.sum(axis=1, keepdims=True))


@dataclass(frozen=True)
class World:
    """The tables of a cell, each (contexts, items) except `policies`."""

    cell: Cell
    logging: tuple[Array, ...]
    """By behavior policy."""
    start: Array
    end: Array
    predicted: Array
    policies: dict[str, Array]
    """"null" has exactly the logging policy's value, "better" 1.1 times it where that is possible,
    "value" is the policy whose value's interval is measured."""

    @classmethod
    def of(cls, cell: Cell) -> World:
        rng = np.random.default_rng(77)
        contexts, items = rng.normal(size=(CONTEXTS, DIM)), rng.normal(size=(ITEMS, DIM))
        score = contexts @ items.T / DIM**0.5 + 0.5 * rng.normal(size=ITEMS)
        expected = 1.0 / (1.0 + np.exp(0.5 - score))
        logging = softmax(0.8 * score + 0.8 * rng.normal(size=score.shape))
        if cell.tail == "extreme":
            uneven = softmax(5.0 * rng.normal(size=score.shape))
            logging = 0.998 * uneven + 0.002 / ITEMS
            up, down = (0.5 * logging + 0.5 * softmax(s * 2.0 * score) for s in (1.0, -1.0))
        else:
            tilt = TILT[cell.tail]
            up, down = (softmax(np.log(logging) + s * tilt * score) for s in (1.0, -1.0))
        behavior = (logging, softmax(np.log(logging) - score))[: cell.loggers]
        if cell.reward == "almost_sure":
            expected = 1.0 - 0.02 * (1.0 - expected)
        mean = MEAN_REWARD.get(cell.reward)
        if mean is not None:
            expected = expected * mean / value(logging, expected)
        other = rng.permutation(expected.ravel()).reshape(expected.shape)
        end = expected + cell.drift * (other - expected)
        target = expected
        if cell.drift:
            time = FUTURE if cell.target == "future" else 0.5
            target = expected + time * (end - expected)
        high, low = value(up, target), value(down, target)
        base = float(np.mean([value(p, target) for p in behavior]))
        share = (base - low) / (high - low)
        null = share * up + (1.0 - share) * down
        better = min(1.0, 0.1 * base / (high - base))
        noise = rng.normal(size=expected.shape)
        level = value(logging, expected)
        predicted = {
            "good": expected * (1.0 + 0.1 * noise),
            "shrunk": 0.5 * expected + 0.5 * level,
            "poor": level * (1.0 + 0.5 * noise),
        }[cell.model]
        top = 1.0 if cell.reward != "lognormal" else DOLLARS
        policies = {"null": null, "better": (1.0 - better) * null + better * up, "value": up}
        return cls(cell, behavior, expected, end, np.clip(predicted, 0.0, top), policies)

    @property
    def reward_range(self) -> tuple[float, float]:
        return (0.0, DOLLARS if self.cell.reward in ("lognormal", "revenue") else 1.0)

    @cached_property
    def target(self) -> Array:
        """Expected rewards of the asked time."""
        time = FUTURE if self.cell.target == "future" else 0.5
        return self.start + time * (self.end - self.start)

    def value(self, policy: str) -> float:
        """Value of a policy at the asked time."""
        return value(self.policies[policy], self.target)

    @property
    def logging_value(self) -> float:
        return float(np.mean([value(one, self.target) for one in self.logging]))

    def largest_weight(self, policy: str) -> float:
        return float(max((self.policies[policy] / one).max() for one in self.logging))

    def logs(self, count: int, seed: int) -> Iterator[dict[str, EvaluationRows]]:
        """Logs as each policy sees them; the same for the same count and seed."""
        block = max(1, BLOCK_ROWS // self.cell.rows)
        for start in range(0, count, block):
            rng = np.random.default_rng([seed, start])
            pair, reward = self._draw(min(block, count - start), rng)
            logger = np.arange(self.cell.rows) % self.cell.loggers
            for i in range(pair.shape[0]):
                yield self._rows(pair[i], reward[i], logger)

    def _draw(self, logs: int, rng: np.random.Generator) -> tuple[NDArray[np.int64], Array]:
        cell, shape = self.cell, (logs, self.cell.rows)
        each = cell.rows // cell.users if cell.users else 1
        context = np.repeat(rng.integers(0, CONTEXTS, (logs, cell.rows // each)), each, axis=1)
        # One search finds the item: cumulative probabilities of context c lie in [c, c + 1].
        pair, drawn = np.empty(shape, dtype=np.int64), context + rng.random(shape)
        for number, policy in enumerate(self.logging):
            cumulative = (policy.cumsum(axis=1) + np.arange(CONTEXTS)[:, None]).ravel()
            own = slice(number, None, cell.loggers)
            pair[:, own] = np.searchsorted(cumulative, drawn[:, own])
        pair = np.clip(pair, context * ITEMS, context * ITEMS + ITEMS - 1)
        mean = self.start.ravel()[pair]
        if cell.drift:
            time = (np.arange(cell.rows) + 0.5) / cell.rows
            mean = mean + time * (self.end - self.start).ravel()[pair]
        if cell.users:  # A user's effect of mean 0: up or down by .8 of the room.
            sign = np.repeat(rng.choice([-1.0, 1.0], size=(logs, cell.users)), each, axis=1)
            mean = mean + sign * 0.8 * np.minimum(mean, 1.0 - mean)
        if cell.reward == "graded":
            return pair, rng.beta(2.0 * mean + 1e-9, 2.0 * (1.0 - mean) + 1e-9)
        if cell.reward == "lognormal":
            return pair, np.minimum(mean * rng.lognormal(-2.0, 2.0, shape), DOLLARS)
        reward = (rng.random(shape) < mean).astype(np.float64)
        if cell.reward == "revenue":
            reward *= rng.lognormal(-0.5, 1.0, shape)  # Far below DOLLARS.
        return pair, reward

    def _rows(
        self, pair: NDArray[np.int64], reward: Array, logger: NDArray[np.int64]
    ) -> dict[str, EvaluationRows]:
        user = None
        if self.cell.users:
            user = np.repeat(np.arange(self.cell.users), self.cell.rows // self.cell.users)
        row, time = np.arange(pair.size), None
        if self.cell.drift:
            time = MONDAY + (WEEKS * WEEK // (2 * pair.size)) * (2 * row + 1)
        rows = EvaluationRows(reward, reward, row=row, user=user, time=time, logger=logger)
        return {
            name: replace(
                rows,
                importance_weight=table["weight"][logger, pair],
                action_reward=self.predicted.ravel()[pair],
                expected_reward=table["expected"][pair // ITEMS],
            )
            for name, table in self._tables.items()
        }

    @cached_property
    def _tables(self) -> dict[str, dict[str, Array]]:
        return {
            name: {
                "weight": np.stack([(policy / one).ravel() for one in self.logging]),
                "expected": (policy * self.predicted).sum(axis=1),
            }
            for name, policy in self.policies.items()
        }


def value(policy: Array, expected: Array) -> float:
    """Mean over the contexts of the policy's expected reward."""
    return float((policy * expected).sum(axis=1).mean())


def cells() -> tuple[Cell, ...]:
    """All cells, in the order of the table."""
    found: list[Cell] = []
    tails: tuple[Tail, ...] = ("benign", "moderate", "heavy")
    targets: tuple[Literal["period", "future"], ...] = ("period", "future")
    for tail in tails:
        found += [Cell(tail, rows) for rows in (200, 400, 2000, 10_000)]
        found += [Cell(tail, 20 * users, users) for users in (40, 100)]
    found += [Cell("extreme", 200), Cell("extreme", 2000), Cell("extreme", 2000, 100)]
    rewards = (
        "almost_sure", "rare", "very_rare", "hardly_any", "graded", "lognormal", "revenue"
    )  # fmt: skip
    for reward in rewards:
        found += [Cell(tail, 2000, reward=reward) for tail in tails[::2]]
    found += [
        Cell("moderate", 1000, reward="lognormal"),
        Cell("moderate", 20_000, reward="rare"),
        Cell("moderate", 2000, 100, reward="rare"),
    ]
    for tail in tails[1:]:
        found += [Cell(tail, model="good"), Cell(tail, model="poor"), Cell(tail, loggers=2)]
    for tail in tails[:2]:
        found += [Cell(tail, drift=0.5, target=target) for target in targets]
    return tuple(found)
