"""Policies on disk: architecture and encodings as JSON and Parquet, weights as safetensors."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import safetensors.torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from offtower.atomic import sha256_file
from offtower.checksums import (
    checked_directory,
    read_checked_json,
    verify_directory,
    write_checked_json,
)
from offtower.config import PolicyConfig
from offtower.data.encoding import FeatureEncoding
from offtower.errors import RunError
from offtower.imports import check_code
from offtower.models.policy import TwoTowerPolicy

_FORMAT = 1
_CONFIG: TypeAdapter[PolicyConfig] = TypeAdapter(PolicyConfig)


def save_policy(directory: Path, policy: TwoTowerPolicy, facts: dict[str, Any]) -> None:
    """Write a policy so that it can be loaded without the code or the data that trained it.

    Args:
        directory: replaced as a whole once all is written.
        facts: what else readers should know (fingerprints, version of the writer); JSON.
    """
    with checked_directory(directory) as temporary:
        policy.context_encoding.save(temporary / "context_encoding")
        policy.item_encoding.save(temporary / "item_encoding")
        save_weights(temporary / "policy.safetensors", policy)
        content = {
            "format": _FORMAT,
            "policy": _CONFIG.dump_python(policy.config, mode="json"),
            "facts": facts,
        }
        write_checked_json(temporary / "policy.json", content)


def load_policy(
    directory: Path, *, trust_code: Collection[str] = ()
) -> tuple[TwoTowerPolicy, dict[str, Any]]:
    """The policy and the facts stored with it, in evaluation mode.

    Args:
        trust_code: import paths "package.module:Class" of towers that may run, besides those of
            offtower and of the environment variable OFFTOWER_TRUST_CODE.

    Raises:
        RunError: a file is missing, damaged, or of another format.
        UntrustedCodeError: the policy names another tower.
    """
    config, facts = _read(directory, trust_code, verify=True)
    encodings = (
        FeatureEncoding.load(directory / "context_encoding"),
        FeatureEncoding.load(directory / "item_encoding"),
    )
    try:
        policy = TwoTowerPolicy(config, *encodings)
    except (RuntimeError, MemoryError) as error:
        path = directory / "policy.json"
        raise RunError(f"the policy that '{path}' describes cannot be built: {error}") from error
    load_weights(directory / "policy.safetensors", policy)
    policy.eval()
    return policy, facts


def stored_config(directory: Path, *, trust_code: Collection[str] = ()) -> PolicyConfig:
    """The sizes of a stored policy, without its weights; arguments and errors of `load_policy`."""
    return _read(directory, trust_code, verify=False)[0]


def _read(
    directory: Path, trust_code: Collection[str], *, verify: bool
) -> tuple[PolicyConfig, dict[str, Any]]:
    """Sizes and facts of a policy. verify: compare all its files with their checksums."""
    path = directory / "policy.json"
    try:
        content = read_checked_json(path)
        if verify:
            verify_directory(directory, "restore the folder from a copy, or train again")
        if content["format"] != _FORMAT:
            raise RunError(
                f"'{path}' has format {content['format']}, this offtower reads {_FORMAT}"
            )
        check_code(content["policy"], path, trust_code)
        return _CONFIG.validate_python(content["policy"]), content["facts"]
    except FileNotFoundError:
        raise RunError(
            f"no policy at '{directory}': policy.json is missing. Did training finish?"
        ) from None
    except RunError:
        raise
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise RunError(f"'{path}' is damaged: {error}") from error


def policy_digest(directory: Path) -> str:
    """Of a stored policy's weights, sizes and facts: another one in the same place has another."""
    return "-".join(sha256_file(directory / name) for name in ("policy.json", "policy.safetensors"))


def save_weights(path: Path, module: nn.Module) -> None:
    state = {
        name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()
    }
    safetensors.torch.save_file(state, path)


def load_weights(path: Path, module: nn.Module) -> None:
    """Fill a module from a safetensors file; every tensor must be there, with its shape."""
    try:
        module.load_state_dict(safetensors.torch.load_file(path))
    except (OSError, safetensors.SafetensorError, RuntimeError) as error:
        raise RunError(f"weights at '{path}' cannot be loaded: {error}") from error
