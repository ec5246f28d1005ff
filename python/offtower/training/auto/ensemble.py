"""Join members into one two-tower policy with their embeddings side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from offtower.config import PolicyConfig
from offtower.models.policy import TwoTowerPolicy


def join(
    members: Sequence[TwoTowerPolicy], inverse_temperature: float, bias: float | None = None
) -> TwoTowerPolicy:
    """Return the policy softmax(inverse_temperature x mean of the members' logits).

    Args:
        members: of one configuration, with temperature 1.
        bias: factor of the mean of the members' item biases; None is `inverse_temperature`.
    """
    first, number = members[0], len(members)
    policy = TwoTowerPolicy(
        _joined_config(
            first.config, number, inverse_temperature, inverse_temperature if bias is None else bias
        ),
        first.context_encoding,
        first.item_encoding,
    )
    state = policy.state_dict()
    parts = [member.state_dict() for member in members]
    for name in state:
        side, dot, rest = name.partition(".body.members.")
        if dot:
            index, _, inner = rest.partition(".")
            part = parts[int(index)]
            # A member is a joined body of one, unless it is a user's module.
            source = f"{side}.body.members.0.{inner}"
            state[name] = part[source if source in part else f"{side}.body.{inner}"]
        elif name.startswith(("context_tower.", "item_tower.")):
            state[name] = parts[0][name]
    policy.load_state_dict({name: torch.clone(tensor) for name, tensor in state.items()})
    return policy.eval()


def _joined_config(
    config: PolicyConfig, number: int, inverse_temperature: float, bias: float
) -> PolicyConfig:
    """Sizes and temperature of the ensemble."""
    share = inverse_temperature / number
    return replace(
        config,
        embedding_dim=config.embedding_dim * number,
        context_tower=replace(config.context_tower, members=number),
        item_tower=replace(config.item_tower, members=number, bias_scale=bias / number),
        temperature=1.0 / share,
    )
