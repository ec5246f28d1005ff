"""runs/<name>/: all that passes from one command to the next.

config.yaml  manifest.json  metrics.jsonl  encodings/  reward_model/  auto/  checkpoints/  policy/
report.json  report.html
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from offtower.atomic import remove_leftovers, write_text
from offtower.checksums import (
    check_text,
    checked_text,
    is_checked_text,
    read_checked_json,
    write_checked_json,
)
from offtower.config import (
    Config,
    config_fingerprint,
    load_config,
    to_dict,
    to_stored_dict,
    to_yaml,
)
from offtower.data.lease_files import FOLDER as LEASE
from offtower.errors import ConfigError, RunError
from offtower.imports import check_code

FETCHED = ".fetched"
"""Folder of a run that is being fetched from its copy; it is there until all of it has arrived."""


class RunDirectory:
    """The folder of one run; creating the object touches nothing."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def config_path(self) -> Path:
        return self.path / "config.yaml"

    @property
    def manifest_path(self) -> Path:
        return self.path / "manifest.json"

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def encodings(self) -> Path:
        return self.path / "encodings"

    @property
    def reward_model(self) -> Path:
        return self.path / "reward_model"

    @property
    def auto(self) -> Path:
        return self.path / "auto"

    @property
    def auto_reward_model(self) -> Path:
        """Two towers of the regression candidate, where objective=auto fitted one."""
        return self.auto / "reward_model"

    @property
    def policy(self) -> Path:
        return self.path / "policy"

    @property
    def quarantine(self) -> Path:
        return self.path / "quarantine"

    def check_owner(self) -> None:
        """Called before each write; raises where another process has taken over (`ClaimedRun`)."""

    def start(self, config: Config, *, resume: bool) -> None:
        """Write the configuration of a run that begins or is resumed.

        Raises:
            RunError: see `check`.
        """
        self.check(config, resume=resume)
        self.remove_half_fetched()
        self.path.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.path)
        write_text(self.config_path, checked_text(to_yaml(config)))

    def remove_half_fetched(self) -> None:
        """Remove what a killed process had fetched of the run's copy."""
        fetched = self.path / FETCHED
        if not fetched.exists():
            return
        if not self.config_path.exists():  # It comes last.
            for path in self.path.iterdir():
                if path.name in (LEASE, FETCHED):
                    continue
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()
        shutil.rmtree(fetched)

    def check(self, config: Config, *, resume: bool) -> None:
        """Whether the folder can be taken for a run of `config`; changes nothing.

        Raises:
            RunError: the folder holds a run of another configuration, or of this one while
                `resume` is false.
        """
        if self.config_path.exists():
            stored = self._stored_config()
            # Validation keeps the best epoch of the policy as it is served.
            changed = stored.serving != config.serving
            if changed or config_fingerprint(stored) != config_fingerprint(config):
                raise RunError(
                    f"'{self.path}' holds a run whose configuration differs in: "
                    f"{', '.join(differences(to_stored_dict(stored), to_stored_dict(config)))}. "
                    "Choose another name (--set name=...), or remove that folder"
                )
            if not resume:
                raise RunError(
                    f"'{self.path}' already holds a run of this configuration. "
                    "Pass --resume to go on from its newest checkpoint, or choose another name "
                    "(--set name=...)"
                )
        elif self.path.exists() and not self._is_unused():
            raise RunError(
                f"'{self.path}' is not empty and holds no run of offtower (no config.yaml); "
                "choose another name"
            )

    def _is_unused(self) -> bool:
        """Whether only a process that was killed before it wrote config.yaml can have been here."""
        names = [path.name for path in self.path.iterdir()]
        return FETCHED in names or all(
            name == LEASE or (name.startswith(".") and name.endswith(".partial")) for name in names
        )

    def load_config(self, *, trust_code: Collection[str] = ()) -> Config:
        """The configuration that the run was started with.

        Args:
            trust_code: import paths of code that the run may name, as in `load_policy`.

        Raises:
            RunError: it is missing or damaged.
            UntrustedCodeError: it names other code.
        """
        config = self._stored_config()
        check_code(to_dict(config), self.config_path, trust_code)
        return config

    def _stored_config(self) -> Config:
        """The stored configuration, to compare it: the code that it names was not checked."""
        if not self.config_path.exists():
            raise RunError(f"'{self.path}' is not a run: it has no config.yaml")
        try:
            check_text(self.config_path.read_text(encoding="utf-8"), self.config_path)
            return load_config(self.config_path)
        except (OSError, UnicodeDecodeError) as error:
            raise RunError(f"'{self.config_path}' cannot be read: {error}") from error
        except ConfigError as error:
            raise RunError(f"the stored configuration cannot be read: {error}") from error

    def check_finished(self) -> None:
        """Check that training has written a policy.

        Raises:
            RunError: there is none.
        """
        if not (self.policy / "policy.json").exists():
            raise RunError(
                f"no policy at '{self.policy}': policy.json is missing. Did training finish?"
            )

    def check_policy(self, config: Config, policy_facts: Mapping[str, Any]) -> None:
        """Compare configuration and manifest with what the policy was trained with.

        A configuration that the user edited, and so without its checksum line, is not compared.

        Raises:
            RunError: one of them belongs to another run.
        """
        of_policy = policy_facts.get("config_fingerprint")
        found = {self.manifest_path: self.manifest().get("config_fingerprint")}
        if is_checked_text(self.config_path.read_text(encoding="utf-8")):
            found[self.config_path] = config_fingerprint(config)
        for path, fingerprint in found.items():
            if None not in (of_policy, fingerprint) and fingerprint != of_policy:
                raise RunError(
                    f"'{path}' and '{self.policy}' belong to different runs: their configurations "
                    "differ. Copy the whole run directory from one place"
                )

    def update_manifest(self, facts: Mapping[str, Any]) -> None:
        """Merge `facts` into manifest.json."""
        self.check_owner()
        write_checked_json(self.manifest_path, {**self.manifest(), **facts})

    def manifest(self) -> dict[str, Any]:
        """What `update_manifest` wrote; empty where it was never called."""
        try:
            return read_checked_json(self.manifest_path)
        except FileNotFoundError:
            return {}


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys whose values differ, as 'key (old -> new)'."""
    found: list[str] = []
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            found.append(f"{prefix}{key} ({before!r} -> {after!r})")
    return found
