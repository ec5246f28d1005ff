"""A configuration from YAML and overrides, and back; what is wrong is told with its place."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from offtower.config.run import Config
from offtower.errors import ConfigError

_ADAPTER: TypeAdapter[Config] = TypeAdapter(Config)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file and apply overrides such as `training.epochs=5`.

    Relative data paths stay relative to the working folder, as on any command line.

    Raises:
        ConfigError: the file is missing or not YAML, a key is unknown, a value has a wrong type.
    """
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no configuration file at '{path}'") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"'{path}' cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"'{path}' is not valid YAML: {error}") from error
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise ConfigError(
            f"'{path}' must hold keys and values, but its top level is a {type(content).__name__}"
        )
    return parse_config(apply_overrides(content, overrides), source=str(path))


def parse_config(content: Mapping[str, Any], source: str = "configuration") -> Config:
    """Turn nested mappings into a `Config`; `source` is named in errors."""
    try:
        return _ADAPTER.validate_python(dict(content))
    except ValidationError as error:
        lines = [_explain(item) for item in error.errors()]
        raise ConfigError(f"{source}: " + "; ".join(lines)) from None


def apply_overrides(content: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of `content` with each `a.b=value` set; values are read as YAML."""
    result: dict[str, Any] = json.loads(json.dumps(content, default=str))
    for override in overrides:
        key, sign, text = override.partition("=")
        if not sign or not key.strip():
            raise ConfigError(f"override '{override}' must look like section.key=value")
        try:
            value = yaml.safe_load(text) if text.strip() else None
        except yaml.YAMLError as error:
            raise ConfigError(f"override '{override}': the value is not YAML: {error}") from error
        parts = key.strip().split(".")
        place = result
        for part in parts[:-1]:
            inner = place.setdefault(part, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"override '{override}': '{part}' is a value, not a section")
            place = inner
        place[parts[-1]] = value
    return result


def to_dict(config: Config) -> dict[str, Any]:
    """Plain nested mappings, JSON- and YAML-ready."""
    dumped: dict[str, Any] = _ADAPTER.dump_python(config, mode="json")
    return dumped


def to_yaml(config: Config) -> str:
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def config_fingerprint(config: Config) -> str:
    """Hash of all that changes what is learned (the place of the run directory does not)."""
    content = to_dict(config)
    content.pop("runs")
    for machine_only in (
        *("threads", "device", "device_features_gib"),
        *("checkpoint_every_seconds", "checkpoints_kept"),
    ):
        content["training"].pop(machine_only)
    # Runs of before there was a choice go on.
    if content["training"]["precision"] == "float32":
        content["training"].pop("precision")
    if content["objective"]["kl_policy"] is None:
        content["objective"].pop("kl_policy")
    if content["training"]["start"] == "random":
        content["training"].pop("start")
    if content["training"]["temperature_from"] is None:
        content["training"].pop("temperature_from")
        content["training"].pop("temperature_until")
    # How a policy is judged and who is told does not change the policy.
    content.pop("evaluation")
    content.pop("tracking")
    content["data"].pop("test")
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


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
    return f"'{dotted}' = {given!r}: {item['msg'].lower()}"


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
