"""Renders the kustomizations of `cluster/kubernetes`: the parts of kustomize that they use.

A test compares the result with kubectl's where that is installed.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import yaml

KNOWN = {"apiVersion", "kind", "namespace", "resources", "components", "images", "patches"}


class StrictLoader(yaml.SafeLoader):
    """Refuses duplicate keys, which YAML readers otherwise accept silently."""


def _mapping(loader: StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key) for key, _ in node.value]
    duplicates = {key for key in keys if keys.count(key) > 1}
    if duplicates:
        raise yaml.YAMLError(f"{node.start_mark}: duplicate keys: {sorted(duplicates)}")
    return loader.construct_mapping(node, deep=True)


StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def documents(path: Path) -> list[dict[str, Any]]:
    """The documents of a file, without anchors that they share."""
    found = list(yaml.load_all(path.read_text(encoding="utf-8"), Loader=StrictLoader))
    assert found and all(isinstance(one, dict) for one in found), path
    return [_own(one) for one in found]


def render(folder: Path) -> list[dict[str, Any]]:
    """The documents of a kustomization, by kind and name."""
    content = _content(folder)
    found: list[dict[str, Any]] = []
    for name in content["resources"]:
        path = folder / name
        found += render(path) if path.is_dir() else documents(path)
    for name in content.get("components", []):
        _transform(found, folder / name, _content(folder / name))
    for one in found:
        one["metadata"]["namespace"] = content["namespace"]
    _transform(found, folder, content)
    return sorted(found, key=lambda one: (one["kind"], one["metadata"]["name"]))


def _content(folder: Path) -> dict[str, Any]:
    (content,) = documents(folder / "kustomization.yaml")
    assert set(content) <= KNOWN, f"{folder}: {set(content) - KNOWN}"
    return content


def _transform(found: list[dict[str, Any]], folder: Path, content: dict[str, Any]) -> None:
    """Apply patches, then rename images."""
    for patch in content.get("patches", []):
        text = (folder / patch["path"]).read_text() if "path" in patch else patch["patch"]
        target = patch["target"]
        chosen = [
            one
            for one in found
            if one["kind"] == target["kind"]
            and target.get("name", one["metadata"]["name"]) == one["metadata"]["name"]
        ]
        assert chosen, f"{folder}: {target} is not there"
        for one in chosen:
            for change in yaml.load(text, Loader=StrictLoader):
                _apply(one, change)
    for image in content.get("images", []):
        assert set(image) == {"name", "newName"}
        for one in found:
            _rename(one, image["name"], image["newName"])


def _own(value: Any) -> Any:
    """A copy in which nothing is shared, unlike `copy.deepcopy`."""
    if isinstance(value, dict):
        return {key: _own(inner) for key, inner in value.items()}
    return [_own(inner) for inner in value] if isinstance(value, list) else value


def _apply(document: dict[str, Any], change: dict[str, Any]) -> None:
    """One operation of RFC 6902."""
    *path, last = (
        part.replace("~1", "/").replace("~0", "~") for part in change["path"].split("/")[1:]
    )
    inside: Any = document
    for part in path:
        inside = inside[int(part)] if isinstance(inside, list) else inside[part]
    value = copy.deepcopy(change.get("value"))
    if isinstance(inside, list) and change["op"] == "add":
        inside.insert(len(inside) if last == "-" else int(last), value)
        return
    key = int(last) if isinstance(inside, list) else last
    if change["op"] == "remove":
        del inside[key]
        return
    assert change["op"] in ("add", "replace")
    if change["op"] == "replace":
        _ = inside[key]
    inside[key] = value


def _rename(value: Any, name: str, new: str) -> None:
    """Rename an image in all lists of containers."""
    if isinstance(value, list):
        for inner in value:
            _rename(inner, name, new)
        return
    if not isinstance(value, dict):
        return
    for key, inner in value.items():
        if key in ("containers", "initContainers"):
            for container in inner:
                image, _, tag = container["image"].rpartition(":")
                if image == name:
                    container["image"] = f"{new}:{tag}"
        else:
            _rename(inner, name, new)
