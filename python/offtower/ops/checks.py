"""Checks of an operator's arguments."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from offtower.errors import OperatorError
from offtower.ops.types import DenseReward, FactoredReward, RewardTerms, reward_in

FLOATS = (torch.float32, torch.bfloat16, torch.float64)


def check_embeddings(
    context_embedding: Tensor,
    item_embedding: Tensor,
    temperature: float,
    item_bias: Tensor | None,
) -> None:
    """Check u (B, d), v (N, d) and bias (N,): shapes, dtypes, device, temperature."""
    _check_matrix("context_embedding", context_embedding, "(B, d)")
    _check_matrix("item_embedding", item_embedding, "(N, d)")
    if context_embedding.shape[1] != item_embedding.shape[1]:
        raise OperatorError(
            f"context_embedding has width {context_embedding.shape[1]} and item_embedding "
            f"{item_embedding.shape[1]}; both towers must give embeddings of one width"
        )
    if item_embedding.shape[0] == 0:
        raise OperatorError("item_embedding has no rows; a policy needs at least one item")
    if context_embedding.shape[1] == 0:
        raise OperatorError("embeddings have width 0")
    _check_like("item_embedding", item_embedding, context_embedding)
    if item_bias is not None:
        _check_like("item_bias", item_bias, context_embedding)
        if item_bias.shape != (item_embedding.shape[0],):
            raise OperatorError(
                f"item_bias must have shape ({item_embedding.shape[0]},), one entry an item, "
                f"but has {tuple(item_bias.shape)}"
            )
    if not (math.isfinite(temperature) and temperature > 0):
        raise OperatorError(f"temperature must be a positive finite number, got {temperature}")
    smallest, largest = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
    if context_embedding.dtype != torch.float64 and not smallest <= temperature <= largest:
        raise OperatorError(f"temperature {temperature} is beyond float32's range")


def check_action(action: Tensor, rows: int, items: int, device: torch.device) -> None:
    """Check that actions are (B,) int64 in [0, N)."""
    if action.dtype != torch.int64:
        raise OperatorError(f"action must be int64, but is {action.dtype}")
    if action.shape != (rows,):
        raise OperatorError(f"action must have shape ({rows},), but has {tuple(action.shape)}")
    if action.device != device:
        raise OperatorError(f"action is on {action.device}, but the embeddings are on {device}")
    if torch.compiler.is_compiling():
        return  # Reading values would break the graph; the operator checks them at run time.
    check_action_range(action, items)


def check_action_range(action: Tensor, items: int) -> None:
    """Check that actions on the CPU are in [0, N). Elsewhere this would wait for the device."""
    if action.numel() and action.device.type == "cpu":
        low, high = torch.aminmax(action)
        if int(low) < 0 or int(high) >= items:
            row = int(((action < 0) | (action >= items)).nonzero()[0])
            raise OperatorError(
                f"action {int(action[row])} in row {row} is out of range: there are {items} items, "
                f"0 to {items - 1}"
            )


def check_reward(reward_model: RewardTerms, rows: int, items: int, like: Tensor) -> None:
    """Check shapes and dtypes of a reward model's parts."""
    if isinstance(reward_model, DenseReward):
        _check_like("DenseReward.values", reward_model.values, like)
        if reward_model.values.shape != (rows, items):
            raise OperatorError(
                f"DenseReward.values must have shape ({rows}, {items}), but has "
                f"{tuple(reward_model.values.shape)}"
            )
        return
    if not isinstance(reward_model, FactoredReward):
        raise OperatorError(
            f"reward_model must be a DenseReward or a FactoredReward, not {type(reward_model)}"
        )
    if reward_model.link not in ("identity", "sigmoid"):
        raise OperatorError(
            f"FactoredReward.link must be 'identity' or 'sigmoid', got {reward_model.link!r}"
        )
    for name, tensor, length in (
        ("context", reward_model.context, rows),
        ("item", reward_model.item, items),
    ):
        _check_matrix(f"FactoredReward.{name}", tensor, "(rows, e)")
        _check_like(f"FactoredReward.{name}", tensor, like)
        if tensor.shape[0] != length:
            raise OperatorError(
                f"FactoredReward.{name} must have {length} rows, but has {tensor.shape[0]}"
            )
    if reward_model.context.shape[1] != reward_model.item.shape[1]:
        raise OperatorError(
            f"FactoredReward.context has width {reward_model.context.shape[1]} and item "
            f"{reward_model.item.shape[1]}"
        )
    bias = reward_model.item_bias
    if bias is not None:
        _check_like("FactoredReward.item_bias", bias, like)
        if bias.shape != (items,):
            raise OperatorError(
                f"FactoredReward.item_bias must have shape ({items},), but has {tuple(bias.shape)}"
            )


def under_autocast(
    context_embedding: Tensor,
    item_embedding: Tensor,
    item_bias: Tensor | None,
    reward_model: RewardTerms | None,
) -> tuple[Tensor, Tensor, Tensor | None, RewardTerms | None]:
    """Under torch.autocast, bring operands of mixed dtypes to float32; leave all others unchanged.

    Towers give bfloat16 there while tables stay float32. The operator itself rounds nothing.
    """
    if not isinstance(context_embedding, Tensor) or not torch.is_autocast_enabled(
        context_embedding.device.type
    ):
        return context_embedding, item_embedding, item_bias, reward_model
    parts = [] if reward_model is None else list(vars(reward_model).values())
    given = [context_embedding, item_embedding, item_bias, *parts]
    dtypes = {x.dtype for x in given if isinstance(x, Tensor)}
    if len(dtypes) == 1:
        return context_embedding, item_embedding, item_bias, reward_model
    if reward_model is not None:
        reward_model = reward_in(reward_model, torch.float32)
    bias = None if item_bias is None else item_bias.float()
    return context_embedding.float(), item_embedding.float(), bias, reward_model


def _check_matrix(name: str, tensor: Tensor, shape: str) -> None:
    if not isinstance(tensor, Tensor):
        raise OperatorError(f"{name} must be a torch tensor, not {type(tensor).__name__}")
    if tensor.dim() != 2:
        raise OperatorError(f"{name} must have shape {shape}, but has {tuple(tensor.shape)}")
    if tensor.dtype not in FLOATS:
        raise OperatorError(
            f"{name} is {tensor.dtype}; the operators take float32, bfloat16 and float64"
        )


def _check_like(name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.dtype != like.dtype:
        raise OperatorError(
            f"{name} is {tensor.dtype} but context_embedding is {like.dtype}; give both one dtype"
        )
    if tensor.device != like.device:
        raise OperatorError(f"{name} is on {tensor.device} but context_embedding on {like.device}")
