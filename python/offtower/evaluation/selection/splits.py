"""Importance fitting: the probability of each logged row to go to the pseudo-target part."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from offtower.errors import OfftowerError
from offtower.evaluation.rows import Array
from offtower.evaluation.selection.exact import ContextMultiplier, solve_multiplier
from offtower.evaluation.selection.network import NetworkOptions, fit_network

MIN_DRAWS = 100
"""Fewest draws per context of the Monte Carlo fit."""


def fit_split(
    behavior: ArrayLike,
    target: ArrayLike,
    share: float = 0.2,
    method: str = "exact",
    *,
    context: ArrayLike | None = None,
    item_features: ArrayLike | None = None,
    action: ArrayLike | None = None,
    network: NetworkOptions | None = None,
    seed: int = 0,
) -> Array:
    """Split probabilities rho(x, a) whose pseudo weights imitate target / behavior (PAS-IF).

    Sending row (x, a) of a log of `behavior` to the pseudo-target part with probability rho makes
    that part a log of behavior * rho / p(x) and the rest one of behavior * (1 - rho) / (1 - p(x)),
    with p(x) = E_behavior[rho(x, .)] (`pseudo_weight` gives their ratio).

    behavior, target: (n, A) probabilities; rows of `behavior` sum to 1, rows of `target` to 1.
    share: k in (0, 1), the expected share of rows in the pseudo-target part.
    method: "exact" minimizes E_behavior[(w~ - w)^2] in every context subject to p(x) = k: the
    global minimum, deterministic, independent of item numbering, identical policies give k.
    "network" is the published recipe (Udagawa et al., AAAI 2023, section 4 and appendix): it needs
    `context` (n, d), `action` (n,) the logged items, and takes `item_features` (A, e), `network`
    and `seed`.
    Returns rho, (n, A) float64. Where `behavior` is 0 a row cannot occur, and rho is that of w = 0.
    Raises OfftowerError for shapes that differ, rows that are no distributions, or an unknown
    method.
    """
    pi_b, pi_e = check_policies(behavior, target)
    check_share(share)
    if method == "exact":
        weight = importance_weights(pi_b, pi_e)
        return solve_multiplier(weight, pi_b, share).apply(weight)
    if method == "network":
        if context is None or action is None:
            raise OfftowerError(
                "fit_split(method='network') needs context=(n, d) and action=(n,), the logged "
                "items; method='exact' needs neither."
            )
        return fit_network(
            pi_b,
            pi_e,
            np.asarray(action, dtype=np.int64),
            np.asarray(context, dtype=np.float64),
            None if item_features is None else np.asarray(item_features, dtype=np.float64),
            share=share,
            options=network or NetworkOptions(),
            seed=seed,
        ).rho
    raise OfftowerError(f"fit_split: unknown method {method!r}; use 'exact' or 'network'.")


def fit_split_draws(
    weight: ArrayLike,
    draw_weight: ArrayLike,
    share: float = 0.2,
    *,
    min_draws: int = MIN_DRAWS,
) -> tuple[Array, Array]:
    """The exact split where the behavior policy can be sampled but not summed over.

    weight: (n,) target / behavior of the logged items. draw_weight: (n, S) the same ratio at S
    items drawn from the behavior policy in each row's context, independently of the logged item.
    share: k. Returns rho of the logged items (n,) and of the draws (n, S).
    Raises OfftowerError for fewer than `min_draws` draws, and for one draw always: the constraint
    would then force rho = k, a random split.
    """
    w = _weights(weight, "weight", 1)
    draws = _weights(draw_weight, "draw_weight", 2)
    check_share(share)
    if draws.shape[0] != w.shape[0]:
        raise OfftowerError(
            f"fit_split_draws: weight has {w.shape[0]} rows and draw_weight {draws.shape[0]}."
        )
    needed = max(2, min_draws)
    if draws.shape[1] < needed:
        raise OfftowerError(
            f"fit_split_draws: {draws.shape[1]} draw(s) per context, at least {needed} are needed. "
            "With few draws the constraint E[rho] = share fixes rho itself and the split ignores "
            "the target policy. Draw more from the behavior policy, or use fit_split_pooled where "
            "only the logged propensity is known."
        )
    solution = solve_multiplier(draws, None, share)
    return solution.apply(w), solution.apply(draws)


def fit_split_pooled(weight: ArrayLike, share: float = 0.2) -> Array:
    """The exact split where only the logged propensity is known: one multiplier for the whole log.

    The constraint E_{pi_b}[rho | x] = k cannot be imposed per context then; only the mean of rho
    over the log is k, so p(x) varies and is unknown, and the two parts have different contexts.
    The joint ratio rho (1 - k) / ((1 - rho) k) still turns one part into the other, contexts
    included.

    weight: (n,) target / behavior of the logged items; share: k. Returns rho (n,).
    """
    w = _weights(weight, "weight", 1)
    check_share(share)
    solution = solve_multiplier(w[None, :], None, share)
    n = w.shape[0]
    spread = ContextMultiplier(
        np.broadcast_to(solution.multiplier, (n,)), np.broadcast_to(solution.scale, (n,)), share
    )
    return spread.apply(w)


def pseudo_weight(rho: ArrayLike, p: ArrayLike) -> Array:
    """w~ = rho (1 - p) / ((1 - rho) p); rho and p broadcast (rho (n, A) with p (n, 1), say)."""
    r, q = np.asarray(rho, dtype=np.float64), np.asarray(p, dtype=np.float64)
    return r * (1.0 - q) / ((1.0 - r) * q)


def importance_weights(behavior: Array, target: Array) -> Array:
    """target / behavior, 0 where behavior is 0 (such a pair cannot be in the log)."""
    return np.divide(target, behavior, out=np.zeros_like(target), where=behavior > 0.0)


def check_share(share: float) -> None:
    """Raise OfftowerError unless 0 < share < 1."""
    if not 0.0 < share < 1.0:
        raise OfftowerError(f"share is {share}, expected a number strictly between 0 and 1.")


def check_policies(behavior: ArrayLike, target: ArrayLike) -> tuple[Array, Array]:
    """The two policies as float64 (n, A); OfftowerError where they are not distributions."""
    pi_b = np.ascontiguousarray(behavior, dtype=np.float64)
    pi_e = np.ascontiguousarray(target, dtype=np.float64)
    for name, policy in (("behavior", pi_b), ("target", pi_e)):
        if policy.ndim != 2 or 0 in policy.shape:
            raise OfftowerError(f"{name} has shape {policy.shape}, expected (n, A) probabilities.")
        if not np.all(np.isfinite(policy)) or policy.min() < 0.0:
            raise OfftowerError(f"{name} holds negative or non-finite probabilities.")
        off = np.abs(policy.sum(axis=1) - 1.0)
        if off.max() > 1e-4:
            row = int(off.argmax())
            raise OfftowerError(
                f"{name} row {row} sums to {policy[row].sum():.6g}, expected 1: pass probabilities "
                "over all items."
            )
    if pi_b.shape != pi_e.shape:
        raise OfftowerError(f"behavior has shape {pi_b.shape} and target {pi_e.shape}.")
    return pi_b, pi_e


def _weights(values: ArrayLike, name: str, ndim: int) -> Array:
    array = np.ascontiguousarray(values, dtype=np.float64)
    if array.ndim != ndim or array.shape[0] == 0:
        raise OfftowerError(f"{name} has shape {array.shape}, expected {ndim} dimension(s).")
    if not np.all(np.isfinite(array)) or array.min(initial=0.0) < 0.0:
        raise OfftowerError(f"{name} holds negative or non-finite importance weights.")
    return array
