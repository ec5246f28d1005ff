"""Load the runs that an evaluation compares."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from offtower.config import Config, ServingConfig, apply_overrides, parse_config, to_dict
from offtower.config.serving import changed_serving
from offtower.data.catalogue import Catalogue
from offtower.errors import ConfigError
from offtower.models.items import ItemFeatures
from offtower.models.policy import TwoTowerPolicy
from offtower.models.store import load_policy, policy_digest
from offtower.run_directory import RunDirectory


@dataclass
class OpenRun:
    """A finished run: its policy, and the catalogue that it is evaluated over."""

    directory: RunDirectory
    config: Config
    policy: TwoTowerPolicy
    catalogue: Catalogue
    trust_code: Collection[str] = ()
    """Import paths of code that stored files may name."""

    @property
    def name(self) -> str:
        """Of the run's folder, also where the path is "." as seen from there."""
        return self.directory.path.absolute().name

    @cached_property
    def items(self) -> ItemFeatures:
        """The catalogue in the policy's encoding."""
        return ItemFeatures.from_catalogue(self.catalogue, self.policy.item_encoding)

    @cached_property
    def policy_digest(self) -> str:
        """Of the stored policy."""
        return policy_digest(self.directory.policy)


def open_run(path: Path, catalogue: Catalogue, trust_code: Collection[str] = ()) -> OpenRun:
    """Load a run.

    Raises RunError where it is missing, not finished, or put together from several runs, or names
    code that may not run.
    """
    directory = RunDirectory(path)
    config = directory.load_config(trust_code=trust_code)
    policy, facts = load_policy(directory.policy, trust_code=trust_code)
    directory.check_policy(config, facts)
    return OpenRun(directory, config, policy, catalogue, trust_code)


def with_overrides(config: Config, overrides: Sequence[str], section: str = "evaluation") -> Config:
    """The configuration with changes to one of its sections.

    Raises ConfigError for an override of another section.
    """
    for override in overrides:
        if not override.startswith(f"{section}."):
            raise ConfigError(
                f"override '{override}' would change what the run is; only keys of '{section}' "
                "can be overridden here"
            )
    return parse_config(apply_overrides(to_dict(config), overrides), source="--set")


@dataclass(frozen=True)
class EvaluatedPolicy:
    """A run's policy, served in one way.

    also: how it is served instead, as given to --also; None is as the run serves it.
    """

    run: OpenRun
    serving: ServingConfig
    also: str | None = None


def evaluated_policies(runs: Sequence[OpenRun], also: Sequence[str]) -> dict[str, EvaluatedPolicy]:
    """By name: the policy of each run as it is served, then those that `also` asks for.

    also: each 'greedy', or changes of the section serving such as 'temperature=0.5'.
    Raises ConfigError for a wrong one, a policy that is already there, or a run named twice.
    """
    names = distinct_names(runs)
    found = {
        name: EvaluatedPolicy(run, run.config.serving)
        for name, run in zip(names, runs, strict=True)
    }
    for name, run in zip(names, runs, strict=True):
        for text in also:
            serving = changed_serving(run.config.serving, text)
            if any(one.run is run and one.serving == serving for one in found.values()):
                raise ConfigError(
                    f"--also {text}: '{name}' is evaluated in this way already; leave it out"
                )
            found[f"{name} {text}"] = EvaluatedPolicy(run, serving, text)
    return found


def distinct_names(runs: Sequence[OpenRun]) -> list[str]:
    """Folder names, or whole paths where two runs share one. Raises ConfigError for a run twice."""
    names = [run.name for run in runs]
    if len(set(names)) != len(names):
        names = [str(run.directory.path) for run in runs]
    if len(set(names)) != len(names):
        raise ConfigError(f"a run is named twice: {', '.join(names)}")
    return names
