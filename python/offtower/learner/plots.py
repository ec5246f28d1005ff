"""The curves of a fit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_history(history: Sequence[Mapping[str, Any]], ax: Axes | None = None) -> Axes:
    """Draw the loss of each epoch, and its held-out value with the interval where there is one.

    The loss has the left axis, the value the right one.
    """
    if ax is None:
        import matplotlib.pyplot as plt

        _, ax = plt.subplots()
    epochs = [line["epoch"] + 1 for line in history]
    ax.plot(
        epochs, [float(line.get("loss", math.nan)) for line in history], color="C0", label="loss"
    )
    ax.set_xlabel("epoch")
    ax.set_ylabel("loss")
    validated = [line for line in history if isinstance(line.get("validation"), Mapping)]
    if validated:
        other = ax.twinx()
        at = [line["epoch"] + 1 for line in validated]
        held_out = [line["validation"] for line in validated]
        other.plot(at, [one["value"] for one in held_out], color="C1", label="held-out value")
        low, high = ([one[end] for one in held_out] for end in ("low", "high"))
        other.fill_between(at, low, high, color="C1", alpha=0.15)
        other.set_ylabel("held-out value, with its interval")
    return ax
