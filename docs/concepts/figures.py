"""Draw the figures of the concept pages: `python docs/concepts/figures.py`.

Every number in them is computed here, from one small world: six items, one context.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

OUT = Path(__file__).parent
ITEMS = ["news", "sport", "music", "film", "book", "game"]
LOGGING = np.array([0.45, 0.25, 0.15, 0.10, 0.04, 0.01])
REWARD = np.array([0.10, 0.12, 0.15, 0.20, 0.25, 0.40])
TARGET = np.array([0.05, 0.10, 0.15, 0.25, 0.30, 0.15])
GRAY, BLUE, ORANGE = "#9aa5b1", "#2563a8", "#d97706"


def main() -> None:
    plt.rcParams.update({"font.family": "DejaVu Sans", "font.size": 10, "svg.hashsalt": "offtower"})
    clicks_mislead()
    weights()
    errors()
    support()


def clicks_mislead() -> None:
    """Clicks by item in the log, beside the click rate of each item."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.5, 2.6))
    left.bar(ITEMS, 10_000 * LOGGING * REWARD, color=GRAY)
    left.set_title("clicks in a log of 10,000 rows")
    right.bar(ITEMS, REWARD, color=BLUE)
    right.set_title("click rate when shown")
    save(figure, "clicks.svg")


def weights() -> None:
    """Both policies, and the weight that turns one into the other."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.5, 2.6))
    x = np.arange(len(ITEMS))
    left.bar(x - 0.2, LOGGING, 0.4, color=GRAY, label="logging policy")
    left.bar(x + 0.2, TARGET, 0.4, color=BLUE, label="target policy")
    left.set_xticks(x, ITEMS)
    left.set_title("probability of showing an item")
    left.legend(frameon=False)
    right.bar(ITEMS, TARGET / LOGGING, color=ORANGE)
    right.axhline(1, color="black", linewidth=0.8)
    right.set_title("importance weight")
    save(figure, "weights.svg")


def errors() -> None:
    """Distribution of three estimators over 2,000 simulated logs of 500 rows."""
    rng = np.random.default_rng(0)
    model = 0.7 * REWARD + 0.3 * REWARD.mean()  # too flat: it misses part of the differences
    w = TARGET / LOGGING
    estimates: dict[str, list[float]] = {"IPS": [], "DM": [], "DR": []}
    for _ in range(2000):
        action = rng.choice(6, 500, p=LOGGING)
        reward = rng.random(500) < REWARD[action]
        direct = float(TARGET @ model)
        estimates["IPS"].append(float(np.mean(w[action] * reward)))
        estimates["DM"].append(direct)
        estimates["DR"].append(direct + float(np.mean(w[action] * (reward - model[action]))))
    figure, axis = plt.subplots(figsize=(7.5, 2.6))
    bins = np.linspace(0.05, 0.4, 71)
    axis.hist(estimates["IPS"], bins, color=ORANGE, alpha=0.6, label="IPS")
    axis.hist(estimates["DR"], bins, color=BLUE, alpha=0.6, label="DR")
    axis.axvline(estimates["DM"][0], color=GRAY, linewidth=3, label="DM (this model)")
    axis.axvline(float(TARGET @ REWARD), color="black", linestyle="--", label="true value")
    axis.set_xlabel("estimated value of the target policy")
    axis.set_yticks([])
    axis.legend(frameon=False)
    save(figure, "estimators.svg")


def support() -> None:
    """A target policy that shows an item which the log never shows."""
    logging = np.array([0.5, 0.3, 0.2, 0.0, 0.0, 0.0])
    target = np.array([0.1, 0.1, 0.2, 0.1, 0.2, 0.3])
    figure, axis = plt.subplots(figsize=(7.5, 2.6))
    x = np.arange(len(ITEMS))
    axis.bar(x - 0.2, logging, 0.4, color=GRAY, label="logging policy")
    colors = [BLUE if p > 0 else ORANGE for p in logging]
    axis.bar(x + 0.2, target, 0.4, color=colors, label="target policy (orange: no support)")
    axis.set_xticks(x, ITEMS)
    axis.set_ylabel("probability")
    axis.legend(frameon=False)
    save(figure, "support.svg")


def save(figure: plt.Figure, name: str) -> None:
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(OUT / name, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
