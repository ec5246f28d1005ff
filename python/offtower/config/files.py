"""Read configurations from YAML and overrides, and write them."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from offtower.config.incremental import IncrementalConfig
from offtower.config.learning import HistoryConfig
from offtower.config.run import Config
from offtower.errors import ConfigError
from offtower.paths import redact

_ADAPTER: TypeAdapter[Config] = TypeAdapter(Config)
_NAMED = ("objective",)
"""Sections that their `name` alone may stand for."""
_MAX_NODES = 1_000_000
"""Limit of values in a YAML file: nested aliases of ten lines can stand for 10^9."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file and apply overrides such as `training.epochs=5`.

    Relative data paths are relative to the working folder.

    Raises:
        ConfigError: the file is missing or not YAML, a key is unknown, a value has a wrong type.
    """
    path = Path(path)
    content = read_yaml(path, "configuration")
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise ConfigError(
            f"'{path}' must hold keys and values, but its top level is a {type(content).__name__}"
        )
    return parse_config(apply_overrides(content, overrides, str(path)), str(path))


def read_yaml(path: Path, what: str) -> Any:
    """Read a YAML file of `what` (for messages).

    Raises:
        ConfigError: it is missing, cannot be read, or is not YAML.
    """
    try:
        return parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no {what} file at '{path}'") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"'{path}' cannot be read: {error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # PyYAML raises ValueError for dates and numbers that do not exist.
        raise ConfigError(f"'{path}' is not valid YAML: {error}") from error


def parse_yaml(text: str) -> Any:
    """Parse YAML with the safe loader, bounding what its aliases expand to.

    Raises:
        YAMLError, ValueError, RecursionError: it is not valid.
    """
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _expanded_size(node, {}) > _MAX_NODES:
            raise yaml.YAMLError(f"its aliases expand to more than {_MAX_NODES:,} values")
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _expanded_size(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Number of nodes with every alias replaced by what it names; one that contains itself is 1."""
    if id(node) not in sizes:
        sizes[id(node)] = 1
        children: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            children = node.value
        elif isinstance(node, yaml.MappingNode):
            children = [child for pair in node.value for child in pair]
        sizes[id(node)] = 1 + sum(_expanded_size(child, sizes) for child in children)
    return sizes[id(node)]


def parse_config(content: Mapping[str, Any], source: str = "configuration") -> Config:
    """Validate nested mappings; `source` is named in errors."""
    try:
        return _ADAPTER.validate_python(dict(content))
    except ValidationError as error:
        lines = [_explain(item) for item in error.errors()]
        raise ConfigError(f"{source}: " + "; ".join(lines)) from None


def apply_overrides(
    content: Mapping[str, Any], overrides: Iterable[str], source: str = "configuration"
) -> dict[str, Any]:
    """Copy `content` and set each `a.b=value`, the value read as YAML; errors name `source`."""
    try:
        result: dict[str, Any] = json.loads(json.dumps(content, default=str))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{source}: a key is not text, or a section contains itself ({error})"
        ) from error
    for override in overrides:
        key, sign, text = override.partition("=")
        if not sign or not key.strip():
            raise ConfigError(f"override '{override}' must look like section.key=value")
        try:
            value = parse_yaml(text) if text.strip() else None
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise ConfigError(f"override '{override}': the value is not YAML: {error}") from error
        parts = key.strip().split(".")
        place = result
        for part in parts[:-1]:
            inner = place.setdefault(part, {})
            if part in _NAMED and isinstance(inner, str):
                inner = place[part] = {"name": inner}
            if not isinstance(inner, dict):
                raise ConfigError(f"override '{override}': '{part}' is a value, not a section")
            place = inner
        place[parts[-1]] = value
    return result


def to_dict(config: Config) -> dict[str, Any]:
    """Return nested mappings that JSON and YAML can represent."""
    dumped: dict[str, Any] = _ADAPTER.dump_python(config, mode="json")
    return dumped


def to_stored_dict(config: Config) -> dict[str, Any]:
    """Return `to_dict` with credentials in addresses replaced by ***."""
    return {name: _redacted(value) for name, value in to_dict(config).items()}


def to_yaml(config: Config) -> str:
    """Return YAML for files, with credentials in addresses replaced by ***."""
    return yaml.safe_dump(to_stored_dict(config), sort_keys=False, allow_unicode=True)


def _redacted(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _redacted(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_redacted(item) for item in value]
    return redact(value) if isinstance(value, str) else value


def config_fingerprint(config: Config) -> str:
    """Return a hash of all settings that change the learned policy."""
    return _digest(_learning_settings(config))


def settings_fingerprint(config: Config) -> str:
    """Return a hash of the settings that change how a policy is learned from whichever log."""
    content = _learning_settings(config)
    for key in ("name", "seed", "data"):
        content.pop(key)
    return _digest(content)


def _learning_settings(config: Config) -> dict[str, Any]:
    content = to_stored_dict(config)
    content.pop("runs")
    # Fingerprints have the number, as those of runs written before null was possible.
    temperature = config.policy.softmax_temperature(config.objective.name)
    content["policy"]["temperature"] = temperature
    for machine_only in (
        *("threads", "device", "device_features_gib"),
        *("checkpoint_every_seconds", "checkpoints_kept"),
    ):
        content["training"].pop(machine_only)
    # These do not change the trained policy.
    for section in ("serving", "evaluation", "monitor", "tracking"):
        content.pop(section)
    content["data"].pop("test")
    content["data"].pop("cache_gib")
    # Fingerprints of runs written before these options existed lack them.
    if config.incremental == IncrementalConfig():
        del content["incremental"]
    default = asdict(HistoryConfig())
    policy, reward_model = content["policy"], content["reward_model"]
    for tower in (policy["context_tower"], policy["item_tower"], reward_model["tower"]):
        if tower["history"] == default:
            del tower["history"]
    return content


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _explain(item: Any) -> str:
    where = [str(part) for part in item["loc"] if part != "__root__"]
    dotted = ".".join(where) or "top level"
    if item["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = _known_keys(where[:-1])
        nearest = difflib.get_close_matches(where[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean '{nearest[0]}'?" if nearest else f"known: {', '.join(known)}"
        return f"unknown key '{dotted}'; {hint}"
    if item["type"] in ("missing", "missing_argument"):
        return f"'{dotted}' is required"
    given = item.get("input")
    if item["type"] == "dataclass_type":
        short = f"a name, such as {dotted}: auto, or " if dotted in _NAMED else ""
        keys = ", ".join(_known_keys(where))
        return f"'{dotted}' = {given!r}: must be {short}a section with some of the keys {keys}"
    message = "must be a list" if item["type"] == "tuple_type" else item["msg"].lower()
    return f"'{dotted}' = {given!r}: {message}"


def _known_keys(path: Sequence[str]) -> list[str]:
    kind: Any = Config
    for part in path:
        if part.isdigit():
            continue
        hints = get_type_hints(kind)
        kind = hints.get(part)
        options = [option for option in get_args(kind) if is_dataclass(option)]
        kind = options[0] if options else kind
        if not is_dataclass(kind):
            return []
    return [f.name for f in fields(kind)]
