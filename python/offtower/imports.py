"""Classes that a configuration names as "package.module:Class".

A configuration that its user wrote may name any class. One that comes from a stored run, policy or
export may come from a stranger: `check_code` refuses what it names before anything is imported.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from offtower.errors import ConfigError, UntrustedCodeError

TRUST_CODE = "OFFTOWER_TRUST_CODE"
"""Environment variable: import paths that may run, separated by commas or spaces."""

_BUILT_IN = {"module": "offtower.models.", "estimator": "sklearn."}
"""Settings that name code, and the modules whose classes need no trust there."""
_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


def check_code(content: Mapping[str, Any], file: Path, trust_code: Collection[str] = ()) -> None:
    """Refuse code that `content` names and that may not run, before it is imported.

    Towers of offtower and scikit-learn's estimators may run, and what is trusted by name.

    Args:
        content: a configuration as nested mappings, read from `file`.
        trust_code: import paths that may run; those in OFFTOWER_TRUST_CODE are added.

    Raises:
        UntrustedCodeError: other code is named.
        ConfigError: a trusted name has not the form "package.module:Class".
    """
    trusted = trusted_names(trust_code)
    for setting, name in named_code(content):
        is_path = _PATH.fullmatch(name) is not None
        built_in = _BUILT_IN[setting.rpartition(".")[2]]
        if name in trusted or (is_path and name.startswith(built_in)):
            continue
        how = "it is no import path"
        if is_path:
            how = (
                f"if you trust it, allow it with --trust-code {name} (in Python trust_code=[...], "
                f"for every command {TRUST_CODE}={name} in the environment)"
            )
        raise UntrustedCodeError(
            f"'{file}' asks for the code {name!r} ({setting}), which is neither a tower of "
            f"offtower nor an estimator of scikit-learn; it was not imported; {how}"
        )


def trusted_names(trust_code: Collection[str] = ()) -> frozenset[str]:
    """`trust_code` and the names in the environment variable OFFTOWER_TRUST_CODE.

    Raises:
        ConfigError: a name has not the form "package.module:Class".
    """
    if isinstance(trust_code, str):
        trust_code = [trust_code]
    names = frozenset([*trust_code, *os.environ.get(TRUST_CODE, "").replace(",", " ").split()])
    for name in names:
        if _PATH.fullmatch(name) is None:
            raise ConfigError(
                f"--trust-code or {TRUST_CODE}: {name!r} must look like 'package.module:Class'"
            )
    return names


def code_paths(content: Mapping[str, Any]) -> list[str]:
    """The import paths that a configuration names, as nested mappings."""
    return [name for _, name in named_code(content) if _PATH.fullmatch(name)]


def named_code(content: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """(dotted setting, import path) of the code that nested mappings and lists name."""
    if isinstance(content, Mapping):
        for key, value in content.items():
            below = f"{place}.{key}" if place else str(key)
            if key in _BUILT_IN and isinstance(value, str) and ":" in value:
                yield below, value
            else:
                yield from named_code(value, below)
    elif isinstance(content, list | tuple):
        for number, value in enumerate(content):
            yield from named_code(value, f"{place}.{number}")


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


def load_class(path: str, purpose: str, base: type, base_name: str) -> type[Any]:
    """The class at `package.module:Name`, which must derive from `base`, known as `base_name`.

    A path into offtower or scikit-learn must name a class that is declared there.

    Raises:
        ConfigError: see `load_by_path`; or the object is no such class. It is not called.
    """
    kind = load_by_path(path, purpose)
    if not (inspect.isclass(kind) and issubclass(kind, base)):
        raise ConfigError(f"{purpose}: '{path}' is not a subclass of {base_name}")
    root = path.partition(".")[0]
    if root in ("offtower", "sklearn") and kind.__module__.partition(".")[0] != root:
        raise ConfigError(
            f"{purpose}: '{path}' is declared in '{kind.__module__}'; name it from there"
        )
    return kind
