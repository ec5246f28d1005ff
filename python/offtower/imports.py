"""Classes named in a configuration: "package.module:Class"."""

from __future__ import annotations

import importlib
from typing import Any

from offtower.errors import ConfigError


def load_by_path(path: str, purpose: str) -> Any:
    """The object at `package.module:Name`.

    Raises:
        ConfigError: the text has no such form, the module does not import, or the name is absent.
    """
    module_name, colon, name = path.partition(":")
    if not colon or not module_name or not name:
        raise ConfigError(f"{purpose}: '{path}' must look like 'package.module:Name'")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(
            f"{purpose}: module '{module_name}' of '{path}' does not import ({error}). "
            "Is it installed, or its folder on PYTHONPATH?"
        ) from error
    try:
        return getattr(module, name)
    except AttributeError:
        raise ConfigError(f"{purpose}: module '{module_name}' has no '{name}'") from None
