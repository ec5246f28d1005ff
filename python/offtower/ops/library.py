"""Registration with torch: custom ops, fake kernels and autograd.

An operator's arguments are tensors and numbers, so operands are taken apart. POLICY_SCHEMA is the
one place that fixes their order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from offtower.ops import cores
from offtower.ops.checks import check_action_range
from offtower.ops.eligibility_checks import check_eligible_action
from offtower.ops.types import (
    Cotangents,
    Eligibility,
    ForwardResults,
    ForwardStatistics,
    Gradients,
    ItemLists,
    Needs,
    Operands,
    RewardOperands,
)

POLICY_SCHEMA = (
    "Tensor context, Tensor item, Tensor action, Tensor? item_bias, Tensor? reward_dense, "
    "Tensor? reward_context, Tensor? reward_item, Tensor? reward_bias, Tensor? group, "
    "Tensor? bitmap, Tensor? excluded_offsets, Tensor? excluded_items, "
    "Tensor? candidate_offsets, Tensor? candidate_items, bool sigmoid, float temperature"
)
_FORWARD_SCHEMA = f"bool entropy, str backend, {POLICY_SCHEMA}"
_BACKWARD_SCHEMA = (
    "Tensor reference_max, Tensor total, Tensor? expected_reward, Tensor? entropy, "
    "Tensor? g_log_prob, Tensor? g_log_normalizer, Tensor? g_expected_reward, Tensor? g_entropy, "
    f"bool need_context, bool need_item, bool need_item_bias, str backend, {POLICY_SCHEMA}"
)
_FORWARD_NAMES = [argument.split()[-1] for argument in _FORWARD_SCHEMA.split(", ")]

Fields = TypeVar("Fields", ForwardStatistics, Cotangents, Needs)


def policy_arguments(x: Operands) -> tuple[Any, ...]:
    """Operands in the order of POLICY_SCHEMA."""
    reward, eligible = x.reward or RewardOperands(), x.eligible or Eligibility()
    return (
        *(x.context, x.item, x.action, x.item_bias),
        *(reward.dense, reward.context, reward.item, reward.item_bias),
        *(eligible.group, eligible.bitmap),
        *_arrays(eligible.excluded),
        *_arrays(eligible.candidates),
        *(reward.sigmoid, x.temperature),
    )


def policy_terms_forward(x: Operands, entropy: bool, backend: str) -> ForwardResults:
    """All terms; differentiable in the embeddings and the item bias."""
    call: Callable[..., Any] = _EagerTerms.apply if _is_eager(x.context) else policy_terms_op
    return ForwardResults(*call(entropy, backend, *policy_arguments(x)))


def policy_terms_backward(
    x: Operands, forward: ForwardStatistics, g: Cotangents, needs: Needs, backend: str
) -> Gradients:
    """Gradients over the items of `x`, which may be a slice of those of `forward`."""
    if _is_eager(x.context):
        return cores.choose_core(backend, x).backward(x, forward, g, needs)
    found = policy_terms_backward_op(*forward, *g, *needs, backend, *policy_arguments(x))
    return Gradients(
        *(value if needed else None for value, needed in zip(found, needs, strict=True))
    )


@torch.library.custom_op(
    "offtower::policy_terms",
    mutates_args=(),
    schema=f"({_FORWARD_SCHEMA}) -> ({', '.join(['Tensor'] * len(ForwardResults._fields))})",
)
def policy_terms_op(entropy: bool, backend: str, *policy: Any) -> tuple[Tensor, ...]:
    """-> `ForwardResults`."""
    return _forward(entropy, backend, *policy)


def _forward(entropy: bool, backend: str, *policy: Any) -> tuple[Tensor, ...]:
    x = _operands(*policy)
    check_action_range(x.action, x.items)
    check_eligible_action(x.eligible, x.action, x.items)
    return tuple(cores.choose_core(backend, x).forward(x, entropy))


@policy_terms_op.register_fake
def _(entropy: bool, backend: str, *policy: Any) -> tuple[Tensor, ...]:
    x = _operands(*policy)
    rows, reward = x.rows, 0 if x.reward is None else x.rows
    lengths = (rows, rows, reward, reward, rows if entropy else 0, rows, rows)
    return tuple(x.context.new_empty(length, dtype=x.accumulation_dtype) for length in lengths)


@torch.library.custom_op(
    "offtower::policy_terms_backward",
    mutates_args=(),
    schema=f"({_BACKWARD_SCHEMA}) -> (Tensor, Tensor, Tensor)",
)
def policy_terms_backward_op(*arguments: Any) -> tuple[Tensor, ...]:
    """-> `Gradients`; those not needed are empty."""
    values = iter(arguments)
    forward, g = _take(ForwardStatistics, values), _take(Cotangents, values)
    needs, backend = _take(Needs, values), next(values)
    x = _operands(*values)
    found = cores.choose_core(backend, x).backward(x, forward, g, needs)
    return tuple(x.context.new_empty(0) if value is None else value for value in found)


@policy_terms_backward_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    values = iter(arguments)
    _take(ForwardStatistics, values), _take(Cotangents, values)
    needs, _ = _take(Needs, values), next(values)
    x = _operands(*values)
    shapes = (x.context.shape, x.item.shape, (x.items,))
    return tuple(
        x.context.new_empty(shape if needed else (0,))
        for shape, needed in zip(shapes, needs, strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, ctx.backend, *tensors, sigmoid, temperature = inputs
    ctx.numbers = (sigmoid, temperature)
    found = ForwardResults(*output)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        *(found.reference_max, found.total, found.expected_reward, found.entropy), *tensors
    )


def _backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    reference_max, total, expected_reward, entropy, *tensors = ctx.saved_tensors
    g_log_prob, g_log_normalizer, g_expected_reward, _, g_entropy, _, _ = gradients
    g = Cotangents(
        g_log_prob,
        g_log_normalizer,
        g_expected_reward if expected_reward.numel() else None,
        g_entropy if entropy.numel() else None,
    )
    asked = dict(zip(_FORWARD_NAMES, ctx.needs_input_grad, strict=True))
    needs = Needs(*(asked[name] for name in Needs._fields))
    found: dict[str, Tensor | None] = {}
    if any(needs) and any(cotangent is not None for cotangent in g):
        forward = ForwardStatistics(
            reference_max,
            total,
            None if g.expected_reward is None else expected_reward,
            None if g.entropy is None else entropy,
        )
        x = _operands(*tensors, *ctx.numbers)
        found = policy_terms_backward(x, forward, g, needs, ctx.backend)._asdict()
    return tuple(found.get(name) for name in _FORWARD_NAMES)


policy_terms_op.register_autograd(_backward, setup_context=_setup_context)


class _EagerTerms(torch.autograd.Function):
    """The operator past torch's dispatcher, which takes three times as long as the terms of a small
    batch and a few items."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        output = _forward(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return _backward(ctx, *gradients)


def _is_eager(context: Tensor) -> bool:
    """Whether nothing traces, transforms or intercepts operators."""
    return not (
        torch.compiler.is_compiling()
        or type(context) not in (Tensor, torch.nn.Parameter)
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def _operands(
    context: Tensor, item: Tensor, action: Tensor, item_bias: Tensor | None, *rest: Any
) -> Operands:
    *parts, sigmoid, temperature = rest
    dense, reward_context, reward_item, reward_bias, *sets = parts
    reward = RewardOperands(dense, reward_context, reward_item, reward_bias, sigmoid)
    group, bitmap, *lists = sets
    eligible = Eligibility(group, bitmap, _lists(*lists[:2]), _lists(*lists[2:]))
    return Operands(
        *(context, item, action, temperature, item_bias),
        None if reward.dense is None and reward.context is None else reward,
        None if all(part is None for part in sets) else eligible,
    )


def _arrays(lists: ItemLists | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if lists is None else (lists.offsets, lists.items)


def _lists(offsets: Tensor | None, items: Tensor | None) -> ItemLists | None:
    return None if offsets is None or items is None else ItemLists(offsets, items)


def _take(kind: type[Fields], values: Iterator[Any]) -> Fields:
    return kind(*islice(values, len(kind._fields)))
