"""The exact importance-fitting split: one multiplier per context, found in closed form plus Newton.

A split rho(x, a) in (0, 1) sends a logged row to the pseudo-target part with probability rho. With
E_{pi_b}[rho | x] = k imposed for every context, the pseudo weight is

    v = rho (1 - k) / ((1 - rho) k),        rho = k v / (1 - k + k v),

and importance fitting (Udagawa et al., AAAI 2023, eq. 8) asks for the v nearest to the true weight
w = pi_e / pi_b: minimize E_{pi_b}[(v - w)^2] subject to E_{pi_b}[rho] = k. Put u = 1 - k + k v and
b = 1 - k + k w, so that rho = 1 - (1 - k) / u. Stationarity is the cubic

    (u - b) u^2 = t,                        one t per context,

and the constraint is E_{pi_b}[1 / u] = 1. As E_{pi_b}[w] <= 1, Jensen's inequality gives
E[1 / b] >= 1, so t >= 0; then u >= b is the only positive root, the Lagrangian has one minimum, and
the solution is the global one although the problem is not convex. As u >= t^(1/3), t <= 1.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from offtower.errors import OfftowerError
from offtower.evaluation.rows import Array, IntArray

MIN_DRAWS = 100
"""Fewest draws per context of the Monte Carlo fit."""
_MAX_STEPS = 60
_TOLERANCE = 1e-14


class ContextMultiplier(NamedTuple):
    """Result of the root-find for each context; `apply` gives the rho of any weight.

    multiplier: (n,) t of the module's equations. scale: (n,) factor on the weights, 1 unless their
    mean over the given actions exceeds what E[rho] = k allows (noise of Monte Carlo draws).
    share: k.
    """

    multiplier: Array
    scale: Array
    share: float

    def apply(self, weight: Array) -> Array:
        """Rho for weights (n,) or (n, m); row i uses context i's multiplier."""
        t, scale = self.multiplier, self.scale
        if weight.ndim == 2:
            t, scale = t[:, None], scale[:, None]
        keep = 1.0 - self.share
        offset = keep + self.share * scale * weight
        return 1.0 - keep / _root(offset, t)


def _root(b: Array, t: Array) -> Array:
    """The root u >= b of (u - b) u^2 = t, for b > 0 and t >= 0, to rounding error."""
    z = 13.5 * t / (b * b * b)
    angle = np.log1p(z + np.sqrt(z * (z + 2.0))) / 3.0
    # u / b = (1 + 2 cosh(angle)) / 3, written so that nothing cancels for a tiny angle
    half = np.sinh(0.5 * angle)
    return b * (1.0 + 4.0 / 3.0 * half * half)


def solve_multiplier(weight: Array, mass: Array | None, share: float) -> ContextMultiplier:
    """One multiplier per row of `weight`.

    weight: (n, m) importance weights of m actions or draws. mass: (n, m) the behavior policy's
    probabilities of the same actions (rows sum to 1), or None for draws from the behavior policy,
    each of mass 1/m. share: k in (0, 1). Memory is a few arrays of the shape of `weight`.
    """
    keep = 1.0 - share
    scale = np.ones(weight.shape[0])
    excess = _mean(1.0 / (keep + share * weight), mass) - 1.0
    too_heavy = np.flatnonzero(excess < -1e-12)
    if too_heavy.size:
        scale[too_heavy] = _shrink_scale(weight[too_heavy], _rows(mass, too_heavy), share)
    b = keep + share * scale[:, None] * weight
    t = np.zeros(weight.shape[0])
    low, high = np.zeros_like(t), np.ones_like(t)
    active = np.flatnonzero(excess > 1e-15)
    for _ in range(_MAX_STEPS):
        if active.size == 0:
            break
        bi, ti, mi = b[active], t[active], _rows(mass, active)
        u = _root(bi, ti[:, None])
        value = _mean(1.0 / u, mi)
        slope = -_mean(1.0 / (u * u * u * (3.0 * u - 2.0 * bi)), mi)
        # value^-3 is nearly linear in t (u ~ t^(1/3) far out), so Newton runs on it
        cube = value**-3
        new = ti + (1.0 - cube) / (-3.0 * cube / value * slope)
        above = value > 1.0
        low[active] = np.where(above, ti, low[active])
        high[active] = np.where(above, high[active], ti)
        outside = ~((new > low[active]) & (new < high[active]))
        new = np.where(outside, 0.5 * (low[active] + high[active]), new)
        done = np.abs(value - 1.0) <= _TOLERANCE
        t[active] = np.where(done, ti, new)
        moved = np.abs(new - ti) > 1e-16 + 4e-16 * np.abs(new)
        active = active[~done & moved]
    return ContextMultiplier(t, scale, share)


def _shrink_scale(weight: Array, mass: Array | None, share: float) -> Array:
    """The factor s < 1 with E[rho(s w)] = k, where the raw weights overshoot k.

    E[1 / (1 - k + k s w)] is convex and decreasing in s, so Newton from s = 0 rises to the root.
    """
    keep = 1.0 - share
    scale = np.zeros(weight.shape[0])
    active = np.arange(weight.shape[0])
    for _ in range(_MAX_STEPS):
        w = share * weight[active]
        inverse = 1.0 / (keep + scale[active][:, None] * w)
        mi = _rows(mass, active)
        excess = _mean(inverse, mi) - 1.0
        scale[active] += excess / _mean(w * inverse * inverse, mi)
        active = active[excess > _TOLERANCE]
        if active.size == 0:
            break
    return scale


def fit_draws(weight: Array, draw_weight: ArrayLike, share: float) -> tuple[Array, Array]:
    """The exact split where the behavior policy can be sampled but not summed over.

    weight: (n,) target / behavior of the logged items. draw_weight: (n, S) the same ratio at S
    items drawn from the behavior policy in each row's context, independently of the logged item.
    share: k. Returns rho of the logged items (n,) and of the draws (n, S).
    Raises OfftowerError for fewer than 100 draws, and for weights that are no weights.
    """
    draws = _checked(draw_weight)
    if draws.shape[1] < MIN_DRAWS:
        raise OfftowerError(
            f"PAS-IF: {draws.shape[1]} draw(s) per context, at least {MIN_DRAWS} are needed. With "
            "few draws the constraint E[rho] = share fixes rho itself and the split ignores the "
            "target policy. Draw more from the behavior policy, or give logged propensities only."
        )
    multiplier = solve_multiplier(draws, None, share)
    return multiplier.apply(_checked(weight)), multiplier.apply(draws)


def fit_pooled(weight: ArrayLike, share: float) -> Array:
    """The exact split where only the logged propensity is known: one multiplier for the whole log.

    The constraint E_{pi_b}[rho | x] = k cannot be imposed per context then; only the mean of rho
    over the log is k, so p(x) varies and is unknown, and the two parts have different contexts.
    The joint ratio rho (1 - k) / ((1 - rho) k) still turns one part into the other, contexts
    included.

    weight: (n,) target / behavior of the logged items; share: k. Returns rho (n,).
    """
    one_context = _checked(weight)[None, :]
    rho: Array = solve_multiplier(one_context, None, share).apply(one_context)[0]
    return rho


def _checked(weight: ArrayLike) -> Array:
    array = np.ascontiguousarray(weight, dtype=np.float64)
    if not np.all(np.isfinite(array)) or array.min(initial=0.0) < 0.0:
        raise OfftowerError("PAS-IF: importance weights are negative or not finite.")
    return array


def _mean(values: Array, mass: Array | None) -> Array:
    mean = values.mean(axis=1) if mass is None else np.einsum("ij,ij->i", values, mass)
    return np.asarray(mean)


def _rows(mass: Array | None, index: IntArray) -> Array | None:
    return None if mass is None else mass[index]
