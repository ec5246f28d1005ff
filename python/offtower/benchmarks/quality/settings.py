"""Settings of the quality suite, read from a YAML file such as configs/quality/small.yaml."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from offtower.benchmarks.quality.bilinear import bilinear
from offtower.benchmarks.quality.degenerate import degenerate
from offtower.benchmarks.quality.labels import (
    LabelSet,
    as_feedback,
    digits,
    load_label_set,
    long_tail,
)
from offtower.benchmarks.quality.simulated import simulated
from offtower.benchmarks.quality.topics import topical
from offtower.benchmarks.quality.world import QualityWorld
from offtower.config import read_yaml
from offtower.errors import ConfigError

_STRICT = ConfigDict(extra="forbid")


@dataclass(config=_STRICT, kw_only=True)
class Bilinear:
    """Settings of `bilinear`."""

    kind: Literal["bilinear"]
    actions: int = Field(ge=2)
    beta: float
    rounds: int = Field(ge=50)

    def make(self, seed: int, data: str | None) -> QualityWorld:
        return bilinear(self.actions, self.beta, self.rounds, seed)


@dataclass(config=_STRICT, kw_only=True)
class Labels:
    """Settings of `as_feedback` for files (--data), digits, or a simulated set of labels."""

    kind: Literal["label_set", "digits", "long_tail", "topics"]
    rounds: int = Field(ge=50)
    fraction: float = Field(default=0.1, gt=0.0, le=1.0)
    """Fraction of the training examples that the logging policy is fitted on."""
    temperature: float = Field(default=0.07, gt=0.0)
    epsilon: float = Field(default=0.1, gt=0.0, le=1.0)
    popularity: float | None = Field(default=None, ge=0.0)
    """Log labels by rank^-popularity in a random order instead of a fitted policy."""
    labels: int = Field(default=1000, ge=20)
    """topics: number of labels."""

    def make(self, seed: int, data: str | None) -> QualityWorld:
        if self.kind == "label_set":
            if data is None:
                raise ConfigError("a world of kind 'label_set' needs --data PREFIX")
            labels = load_label_set(data)
        else:
            made: dict[str, Callable[[], LabelSet]] = {
                "digits": lambda: digits(seed),
                "long_tail": lambda: long_tail(seed),
                "topics": lambda: topical(seed, labels=self.labels),
            }
            labels = made[self.kind]()
        return as_feedback(
            labels,
            self.rounds,
            seed,
            fraction=self.fraction,
            temperature=self.temperature,
            epsilon=self.epsilon,
            popularity=self.popularity,
        )


@dataclass(config=_STRICT, kw_only=True)
class Simulated:
    """Settings of `simulated`, for catalogues too large for (rounds, items) arrays."""

    kind: Literal["simulated"]
    items: int = Field(ge=2)
    rounds: int = Field(ge=50)

    def make(self, seed: int, data: str | None) -> QualityWorld:
        return simulated(self.items, self.rounds, seed)


@dataclass(config=_STRICT, kw_only=True)
class Degenerate:
    """A world of `degenerate.WORLDS`."""

    kind: Literal["degenerate"]
    world: str

    def make(self, seed: int, data: str | None) -> QualityWorld:
        return degenerate(self.world, seed)


WorldSettings = Annotated[Bilinear | Labels | Simulated | Degenerate, Field(discriminator="kind")]


@dataclass(config=_STRICT, kw_only=True)
class QualitySettings:
    """The worlds, methods and seeds of one table."""

    name: str
    worlds: list[WorldSettings]
    methods: list[str]
    seeds: int = Field(default=10, ge=1)
    """Number of seeds; each draws a world, its log and the initial weights."""
    first_seed: int = Field(default=0, ge=0)
    """Seeds from 1000 on are for development; results are reported on others."""
    starts: int = Field(default=1, ge=1)
    """Training seeds per world and log."""

    def cells(self) -> Iterator[tuple[int, int, int, str]]:
        """Yield (world index, seed, start, method), worlds in the order of the file."""
        for world in range(len(self.worlds)):
            for seed in range(self.first_seed, self.first_seed + self.seeds):
                for start in range(self.starts):
                    for method in self.methods:
                        yield world, seed, start, method


_ADAPTER: TypeAdapter[QualitySettings] = TypeAdapter(QualitySettings)


def load_settings(path: Path) -> QualitySettings:
    """Read a settings file. A list as a world's value expands to one world per element.

    Raises:
        ConfigError: The file cannot be read or has an invalid key or value.
    """
    content = read_yaml(path, "settings")
    if not isinstance(content, dict):
        raise ConfigError(f"'{path}' must contain a mapping at the top level")
    content["worlds"] = [one for world in content.get("worlds", []) for one in _expand(world)]
    try:
        return _ADAPTER.validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{path}: '{where}': {first['msg'].lower()}") from None


def to_dict(settings: QualitySettings) -> dict[str, Any]:
    result: dict[str, Any] = _ADAPTER.dump_python(settings, mode="json")
    return result


def _expand(world: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for key, given in world.items():
        if isinstance(given, list):
            for one in given:
                yield from _expand({**world, key: one})
            return
    yield world
