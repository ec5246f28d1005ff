"""A generalized linear mixed model of rewards, solved to its optimum.

    z(x, a) = <x, c + V v_a + sum_j t_j(a)>

with context features x (and a constant), numeric item features v_a, and effects t_j of the item's
value in category j, such as its id. Columns of V and the t_j have normal priors with one
covariance, up to a scale for each of them, which are fitted to the log too (empirical Bayes). Items
that were never rewarded stay near what their features show, so that few rewards suffice for large
catalogues.

Given the priors the problem is convex: Newton's method solves it in some tens of passes over the
rows, with conjugate gradients that are preconditioned by a block for each effect. Priors follow
MacKay's fixed point, with a Laplace approximation of the same blocks.

Source: Zhang et al. 2016, "GLMix: Generalized linear mixed models for large-scale response
prediction"; MacKay 1992, "Bayesian interpolation".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

_FIRST_STEPS, _UPDATES = 3, 3
"""Newton steps at the first priors, and updates of the priors with a step each. Values in simulated
worlds hardly change after that; more updates narrow the covariance slowly."""
_CONJUGATE_STEPS = 12
_TOLERANCE = 0.03
"""Preconditioned residual of a Newton step, over that at its begin."""
_HALVINGS = 10
"""Of a Newton step that raises the loss, at most."""
_VAGUE = 100.0
"""Prior variance of the constant effect."""
_PRIOR_STRENGTH = 4.0
"""Effective parameters with which the update of a covariance is weighed against the one before."""
_BLOCK_NUMBERS = 1 << 24
"""Of the covariances of a category's values, at most; the values with the most rows are used."""
_PRODUCTS = 1 << 23
"""Of features, in memory at a time."""


@dataclass(frozen=True)
class MixedRows:
    """n rows over k distinct items."""

    context: Tensor
    """(n, p) float32 features, with a constant."""
    item: Tensor
    """(n,) int64, which of the distinct items."""
    reward: Tensor
    """(n,) float32."""
    weight: Tensor | None
    """(n,) float32; None is 1."""
    numbers: Tensor
    """(k, q) float32 features of the items; q may be 0."""
    categories: Sequence[Tensor]
    """Of each category (k,) int64 values, from 0 and without gaps."""


@dataclass
class MixedEffects:
    """Effects in coordinates in which the prior covariance is the identity.

    The effect of an item in x is root @ its effect in these coordinates.
    """

    root: Tensor
    """(p, p)."""
    constant: Tensor
    """(p,)."""
    numbers: Tensor
    """(q, p)."""
    categories: list[Tensor]
    """Of each category (values, p)."""


def fit_mixed_model(rows: MixedRows, *, binary: bool) -> MixedEffects:
    """Fit the effects and their priors.

    Args:
        binary: whether rewards are 0 or 1 and z is a logit; else z is the mean reward.
    """
    return _Fit(rows, binary=binary).run()


@dataclass(frozen=True)
class _Curvature:
    """Second derivatives of the loss without prior by the effects of one kind."""

    used: Tensor
    """(m,) numbers of the effects; of others it is taken to be 0."""
    blocks: Tensor
    """(m, p, p), for effects in coordinates of x."""

    def within(self, root: Tensor, scale: float) -> Tensor:
        """(m, p, p) for effects in coordinates of a prior, with the prior."""
        return scale * (root.T @ self.blocks @ root) + torch.eye(len(root))


class _Fit:
    """State of a fit: effects in the coordinates of their priors, and these."""

    def __init__(self, rows: MixedRows, *, binary: bool) -> None:
        self._rows, self._binary = rows, binary
        width = rows.context.shape[1]
        kinds = [rows.numbers.shape[1], *(int(c.max()) + 1 for c in rows.categories)]
        self._root = torch.eye(width)
        # A variance of z of 1 by all effects of a kind together, for standardized features.
        self._scale = [_VAGUE, 1.0 / (width * max(kinds[0], 1)), *(1.0 / width for _ in kinds[1:])]
        self._noise = 1.0
        self._effects = [torch.zeros(m, width) for m in (1, *kinds)]
        mean = _mean(rows.reward, rows.weight)
        if binary:
            mean = float(torch.logit(torch.tensor(mean), 1e-6))
        self._effects[0][0, -1] = mean / self._scale[0] ** 0.5
        self._curvatures: list[_Curvature] = []

    def run(self) -> MixedEffects:
        for _ in range(_FIRST_STEPS):
            self._step()
        for _ in range(_UPDATES):
            self._update_priors()
            self._step()
        constant, numbers, *categories = self._scaled(self._effects)
        return MixedEffects(self._root, constant[0], numbers, categories)

    def _step(self) -> None:
        """Take a step of Newton's method, by conjugate gradients."""
        rows = self._rows
        context = rows.context @ self._root
        score = self._score(context, self._effects)
        slope, curvature = self._derivatives(score)
        self._curvatures = self._find_curvatures(curvature)
        inverses = [
            torch.linalg.inv(one.within(self._root, scale))
            for one, scale in zip(self._curvatures, self._scale, strict=True)
        ]

        def precondition(gradient: list[Tensor]) -> list[Tensor]:
            return [
                part.index_copy(0, one.used, (inverse @ part[one.used, :, None])[:, :, 0])
                for part, one, inverse in zip(gradient, self._curvatures, inverses, strict=True)
            ]

        def times(direction: list[Tensor]) -> list[Tensor]:
            found = self._adjoint(context, curvature * self._score(context, direction))
            return _sum(found, direction, 1.0)

        gradient = _sum(self._adjoint(context, slope), self._effects, 1.0)
        step = _conjugate_gradients(times, precondition, gradient)
        change = self._score(context, step)
        before = self._loss(score, self._effects)
        share = 1.0
        for _ in range(_HALVINGS):
            effects = _sum(self._effects, step, -share)
            if self._loss(score - share * change, effects) <= before:
                self._effects = effects
                return
            share /= 2.0

    def _derivatives(self, score: Tensor) -> tuple[Tensor, Tensor]:
        """First and second ones of the rows' losses by z."""
        rows = self._rows
        if self._binary:
            mean = torch.sigmoid(score)
            first, second = mean - rows.reward, mean * (1.0 - mean)
        else:
            residual = score - rows.reward
            self._noise = max(_mean(residual.square(), rows.weight), 1e-12)
            first, second = residual / self._noise, torch.full_like(score, 1.0 / self._noise)
        if rows.weight is None:
            return first, second
        return first * rows.weight, second * rows.weight

    def _loss(self, score: Tensor, effects: Sequence[Tensor]) -> float:
        rows = self._rows
        if self._binary:
            each = functional.binary_cross_entropy_with_logits(score, rows.reward, reduction="none")
        else:
            each = 0.5 * torch.square(score - rows.reward) / self._noise
        total = each.double().sum() if rows.weight is None else each.double() @ rows.weight.double()
        return float(total) + 0.5 * _dot(effects, effects)

    def _scaled(self, effects: Sequence[Tensor]) -> list[Tensor]:
        return [one * scale**0.5 for one, scale in zip(effects, self._scale, strict=True)]

    def _score(self, context: Tensor, effects: Sequence[Tensor]) -> Tensor:
        """(n,) z; `context` in the coordinates of the effects."""
        rows = self._rows
        constant, numbers, *categories = self._scaled(effects)
        effect = constant + rows.numbers @ numbers
        for value, table in zip(rows.categories, categories, strict=True):
            effect = effect + functional.embedding(value, table)
        found: Tensor = torch.linalg.vecdot(context, functional.embedding(rows.item, effect))
        return found

    def _adjoint(self, context: Tensor, slope: Tensor) -> list[Tensor]:
        """Derivatives by the effects of sum_i slope_i z_i."""
        rows = self._rows
        of_item = context.new_zeros(len(rows.numbers), context.shape[1])
        of_item.index_add_(0, rows.item, context * slope[:, None])
        found = [of_item.sum(dim=0, keepdim=True), rows.numbers.T @ of_item]
        for value, one in zip(rows.categories, self._effects[2:], strict=True):
            found.append(torch.zeros_like(one).index_add_(0, value, of_item))
        return self._scaled(found)

    def _update_priors(self) -> None:
        """MacKay's fixed point: the second moment of the effects over the number of parameters that
        the rows determine, in every direction."""
        width = len(self._root)
        identity = torch.eye(width)
        strength = _PRIOR_STRENGTH
        square, determined = torch.zeros(width, width), torch.zeros(width, width)
        for kind in range(1, len(self._effects)):
            effects, one = self._effects[kind], self._curvatures[kind]
            if len(effects) == 0:
                continue
            inverse = torch.linalg.inv(one.within(self._root, self._scale[kind]))
            known = (identity - inverse).sum(dim=0)
            moment = effects[one.used].T @ effects[one.used]
            # The scale takes the trace, the common covariance the rest.
            change = float((moment.trace() + strength) / (known.trace() + strength))
            self._scale[kind] *= change
            self._effects[kind] = effects / change**0.5
            square += moment / change
            determined += known
        share = strength / width * identity
        change_root = _ratio_root(square + share, determined + share)
        back = torch.linalg.inv(change_root).T
        self._effects = [one @ back for one in self._effects]
        self._root = self._root @ change_root

    def _find_curvatures(self, curvature: Tensor) -> list[_Curvature]:
        """`curvature` (n,) of the rows' losses."""
        rows = self._rows
        width = rows.context.shape[1]
        factors = torch.cat([torch.ones(len(rows.numbers), 1), rows.numbers], dim=1)
        dense = torch.zeros(factors.shape[1], width * width)
        most = max(1, _BLOCK_NUMBERS // width**2)
        tables = []
        for category in rows.categories:
            value = category[rows.item]
            count = torch.bincount(value)
            used = torch.argsort(count, descending=True, stable=True)[:most]
            block = torch.full((len(count),), len(used)).index_put_(
                (used,), torch.arange(len(used))
            )
            # The last block takes the rows of the values that are not used.
            tables.append((used, block[value], torch.zeros(len(used) + 1, width * width)))
        chunk = max(1, _PRODUCTS // width**2)
        for start in range(0, len(curvature), chunk):
            part = slice(start, start + chunk)
            context = rows.context[part]
            products = (context[:, :, None] * context[:, None, :]).flatten(1)
            products *= curvature[part, None]
            dense += factors[rows.item[part]].square().T @ products
            for _, block, blocks in tables:
                blocks.index_add_(0, block[part], products)
        dense = dense.view(-1, width, width)
        return [
            _Curvature(torch.zeros(1, dtype=torch.int64), dense[:1]),
            _Curvature(torch.arange(len(dense) - 1), dense[1:]),
            *(_Curvature(used, b[:-1].view(-1, width, width)) for used, _, b in tables),
        ]


def _conjugate_gradients(
    times: Callable[[list[Tensor]], list[Tensor]],
    precondition: Callable[[list[Tensor]], list[Tensor]],
    right: list[Tensor],
) -> list[Tensor]:
    """Solve times(solution) = right (Hestenes and Stiefel 1952)."""
    solution = [torch.zeros_like(one) for one in right]
    residual = right
    conditioned = precondition(residual)
    direction = conditioned
    size = first = _dot(residual, conditioned)
    for _ in range(_CONJUGATE_STEPS):
        if size <= _TOLERANCE**2 * first:
            break
        image = times(direction)
        share = size / _dot(direction, image)
        solution = _sum(solution, direction, share)
        residual = _sum(residual, image, -share)
        conditioned = precondition(residual)
        before, size = size, _dot(residual, conditioned)
        direction = _sum(conditioned, direction, size / before)
    return solution


def _sum(first: Sequence[Tensor], second: Sequence[Tensor], share: float) -> list[Tensor]:
    """first + share x second."""
    return [one.add(other, alpha=share) for one, other in zip(first, second, strict=True)]


def _dot(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    return sum(
        float((one * other).sum(dtype=torch.float64))
        for one, other in zip(first, second, strict=True)
    )


def _ratio_root(square: Tensor, determined: Tensor) -> Tensor:
    """R with R R' = determined^(-1/2) square determined^(-1/2)."""
    value, vector = torch.linalg.eigh(determined.double())
    inverse = (vector * value.clamp_min(1e-9).rsqrt()) @ vector.T
    value, vector = torch.linalg.eigh(inverse @ square.double() @ inverse)
    root: Tensor = vector * value.clamp_min(1e-9).sqrt()
    return root.float()


def _mean(values: Tensor, weight: Tensor | None) -> float:
    if weight is None:
        return float(values.mean(dtype=torch.float64))
    return float((values.double() @ weight.double()) / weight.double().sum())
