"""Initial weights of a policy: random, uniform, or those of a stored policy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from offtower.errors import ConfigError
from offtower.imports import code_paths
from offtower.models.policy import TwoTowerPolicy
from offtower.models.store import load_policy
from offtower.models.towers import MLPBody, Tower


def warm_start(policy: TwoTowerPolicy, folder: Path) -> None:
    """Load the weights of a stored policy into `policy`.

    Raises:
        RunError: there is no policy.
        ConfigError: it has other sizes or encodings.
    """
    stored = load_compatible_policy(folder, policy, "training.warm_start")
    try:
        policy.load_state_dict(stored.state_dict())
    except RuntimeError as error:
        raise ConfigError(
            f"training.warm_start: the policy at '{folder}' does not fit the configured one "
            f"({error}); use its 'policy' settings"
        ) from None


def load_compatible_policy(folder: Path, policy: TwoTowerPolicy, setting: str) -> TwoTowerPolicy:
    """Load a policy with the encodings of `policy`, in evaluation mode on the CPU.

    Args:
        setting: names the folder, for messages.

    Raises:
        RunError: there is no policy.
        ConfigError: it has other encodings.
    """
    # A stored policy may run the code that `policy` already runs.
    own = code_paths(asdict(policy.config))
    stored, _ = load_policy(folder, trust_code=own)
    for side in ("context_encoding", "item_encoding"):
        if getattr(stored, side).to_dict() != getattr(policy, side).to_dict():
            raise ConfigError(
                f"{setting}: the policy at '{folder}' was trained with another "
                f"{side.replace('_', ' ')}; use one of a run on the same log and catalogue"
            )
    return stored


@torch.no_grad()
def initialize_uniform(policy: TwoTowerPolicy) -> None:
    """Set u = 0 and b = 0, so that all items are equally likely in every context.

    The item tower stays random, so the context tower has a gradient from the first step on and the
    item tower from the second. `training.checks` refuses towers without a known last layer.
    """
    for weight in _output_weights(policy.context_tower):
        weight.zero_()
    if policy.item_tower.has_bias:
        for weight in _output_weights(policy.item_tower):
            weight[-1].zero_()


def _output_weights(tower: Tower) -> Iterator[torch.Tensor]:
    """Views of the weights that map to the outputs of each body, with one row per output."""
    for body in tower.bodies:
        assert isinstance(body, MLPBody), "see offtower.training.checks"
        if len(body.layers):
            last = body.layers[-1]
            assert isinstance(last, nn.Linear)
            yield last.weight
            yield last.bias
        if body.adds_tables:
            for table in body.encoder.pooled_tables.values():
                yield table.weight.T
