"""Registration with torch: custom ops, fake kernels and autograd, in one visible place.

The schema holds a reward model as its parts, since an operator's arguments are tensors and numbers.
"""

from typing import Any

import torch
from torch import Tensor

from offtower.ops.backends import core_of
from offtower.ops.checks import check_action_range
from offtower.ops.reference import Cotangents, Inputs, backward, running_sums

# Real annotations (no string ones): torch infers the schema from them.
_ARGUMENTS = 10


@torch.library.custom_op("offtower::policy_terms", mutates_args=())
def policy_terms_op(
    u: Tensor,
    v: Tensor,
    action: Tensor,
    temperature: float,
    bias: Tensor | None,
    dense: Tensor | None,
    e: Tensor | None,
    t: Tensor | None,
    c: Tensor | None,
    sigmoid: bool,
    entropy: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> log_prob, log_normalizer, expected_reward, action_reward, entropy; absent ones empty.

    And what the backward pass needs: an anchor and the sum of exp(s - anchor) of each row. With the
    log-normalizer alone, near 14 at a million items, exp(s - lse) would be off by its rounding.
    """
    check_action_range(action, v.shape[0])
    x = Inputs(u, v, action, temperature, bias, dense, e, t, c, sigmoid)
    core = core_of(backend, x)
    if core is not None:
        return core.forward(x, entropy)
    sums = running_sums(x, entropy)
    nothing = sums.total.new_empty(0)
    log_normalizer = sums.log_normalizer
    expected, spread = sums.expected_reward, sums.entropy
    return (
        x.action_logit() - log_normalizer,
        log_normalizer,
        nothing if expected is None else expected,
        x.action_reward() if x.has_reward else nothing.clone(),
        nothing.clone() if spread is None else spread,
        sums.top,
        sums.total,
    )


@policy_terms_op.register_fake
def _(
    u: Tensor,
    v: Tensor,
    action: Tensor,
    temperature: float,
    bias: Tensor | None,
    dense: Tensor | None,
    e: Tensor | None,
    t: Tensor | None,
    c: Tensor | None,
    sigmoid: bool,
    entropy: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    rows = u.shape[0]
    has_reward = dense is not None or e is not None
    return (
        u.new_empty(rows, dtype=dtype),
        u.new_empty(rows, dtype=dtype),
        u.new_empty(rows if has_reward else 0, dtype=dtype),
        u.new_empty(rows if has_reward else 0, dtype=dtype),
        u.new_empty(rows if entropy else 0, dtype=dtype),
        u.new_empty(rows, dtype=dtype),
        u.new_empty(rows, dtype=dtype),
    )


@torch.library.custom_op("offtower::policy_terms_backward", mutates_args=())
def policy_terms_backward_op(
    u: Tensor,
    v: Tensor,
    action: Tensor,
    temperature: float,
    bias: Tensor | None,
    dense: Tensor | None,
    e: Tensor | None,
    t: Tensor | None,
    c: Tensor | None,
    sigmoid: bool,
    anchor: Tensor,
    total: Tensor,
    expected_reward: Tensor,
    entropy: Tensor,
    g_log_prob: Tensor | None,
    g_log_normalizer: Tensor | None,
    g_expected_reward: Tensor | None,
    g_entropy: Tensor | None,
    need_u: bool,
    need_v: bool,
    need_b: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> du, dv, dbias; those not needed are empty."""
    x = Inputs(u, v, action, temperature, bias, dense, e, t, c, sigmoid)
    core = core_of(backend, x)
    compute = backward if core is None else core.backward
    du, dv, db = compute(
        x,
        (anchor, total),
        expected_reward,
        entropy,
        Cotangents(g_log_prob, g_log_normalizer, g_expected_reward, g_entropy),
        (need_u, need_v, need_b),
    )
    return (
        u.new_empty(0) if du is None else du,
        v.new_empty(0) if dv is None else dv,
        u.new_empty(0) if db is None else db,
    )


@policy_terms_backward_op.register_fake
def _(
    u: Tensor,
    v: Tensor,
    action: Tensor,
    temperature: float,
    bias: Tensor | None,
    dense: Tensor | None,
    e: Tensor | None,
    t: Tensor | None,
    c: Tensor | None,
    sigmoid: bool,
    anchor: Tensor,
    total: Tensor,
    expected_reward: Tensor,
    entropy: Tensor,
    g_log_prob: Tensor | None,
    g_log_normalizer: Tensor | None,
    g_expected_reward: Tensor | None,
    g_entropy: Tensor | None,
    need_u: bool,
    need_v: bool,
    need_b: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(u, memory_format=torch.contiguous_format) if need_u else u.new_empty(0),
        torch.empty_like(v, memory_format=torch.contiguous_format) if need_v else v.new_empty(0),
        u.new_empty(v.shape[0]) if need_b else u.new_empty(0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    u, v, action, temperature, bias, dense, e, t, c, sigmoid, _entropy, backend = inputs
    _, _, expected, _, spread, anchor, total = output
    ctx.temperature, ctx.sigmoid, ctx.backend = temperature, sigmoid, backend
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(u, v, action, bias, dense, e, t, c, anchor, total, expected, spread)


def _backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    g_log_prob, g_log_normalizer, g_expected, _, g_entropy, _, _ = gradients
    u, v, action, bias, dense, e, t, c, anchor, total, expected, spread = ctx.saved_tensors
    needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[4])
    nothing: tuple[Tensor | None, ...] = (None,) * (_ARGUMENTS + 2)
    if expected.numel() == 0:
        g_expected = None
    if spread.numel() == 0:
        g_entropy = None
    if not any(needs) or all(
        g is None for g in (g_log_prob, g_log_normalizer, g_expected, g_entropy)
    ):
        return nothing
    du, dv, db = policy_terms_backward_op(
        u,
        v,
        action,
        ctx.temperature,
        bias,
        dense,
        e,
        t,
        c,
        ctx.sigmoid,
        anchor,
        total,
        expected,
        spread,
        g_log_prob,
        g_log_normalizer,
        g_expected,
        g_entropy,
        *needs,
        ctx.backend,
    )
    result = list(nothing)
    result[0] = du if needs[0] else None
    result[1] = dv if needs[1] else None
    result[4] = db if needs[2] else None
    return tuple(result)


policy_terms_op.register_autograd(_backward, setup_context=_setup_context)
