"""Members as one two-tower policy: their embeddings side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from offtower.config import PolicyConfig
from offtower.models.policy import TwoTowerPolicy


def join(members: Sequence[TwoTowerPolicy], factor: float) -> TwoTowerPolicy:
    """The policy softmax(factor x mean of the members' logits).

    Args:
        members: of one configuration, with temperature 1.
        factor: sharpness; its inverse over the number of members is the new temperature.
    """
    first, number = members[0], len(members)
    policy = TwoTowerPolicy(
        joined_config(first.config, number, factor), first.context_encoding, first.item_encoding
    )
    state = policy.state_dict()
    parts = [member.state_dict() for member in members]
    for name in state:
        side, dot, rest = name.partition(".body.members.")
        if dot:
            number_of_member, _, inner = rest.partition(".")
            part = parts[int(number_of_member)]
            # A member is a joined body of one, unless it is a user's module.
            own = f"{side}.body.members.0.{inner}"
            state[name] = part[own if own in part else f"{side}.body.{inner}"]
        elif name.startswith(("context_tower.", "item_tower.")):
            state[name] = parts[0][name]
    policy.load_state_dict({name: torch.clone(tensor) for name, tensor in state.items()})
    return policy.eval()


def joined_config(config: PolicyConfig, number: int, factor: float) -> PolicyConfig:
    """Sizes and temperature of the ensemble; item biases take the temperature's part too."""
    share = factor / number
    return replace(
        config,
        embedding_dim=config.embedding_dim * number,
        context_tower=replace(config.context_tower, members=number),
        item_tower=replace(config.item_tower, members=number, bias_scale=share),
        temperature=1.0 / share,
    )
