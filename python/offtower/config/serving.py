"""Configuration of the served policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Literal

from pydantic import Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from offtower.config.strict import STRICT
from offtower.errors import ConfigError

GREEDY = "greedy"


@dataclass(config=STRICT)
class NewItemsConfig:
    """Limits on the probability that a draw shows a new item, in every context.

    Within the limits nothing changes. Beyond them, the probabilities of the new items, and those of
    the others, are scaled by one factor each."""

    feature: str
    """Numeric feature of the catalogue that tells new items, such as their age in days."""
    below: float = Field(allow_inf_nan=False)
    """Items with a smaller number are new."""
    at_least: float = Field(default=0.0, ge=0.0, lt=1.0)
    at_most: float = Field(default=1.0, gt=0.0, le=1.0)

    @model_validator(mode="after")
    def _check(self) -> NewItemsConfig:
        if self.at_least > self.at_most:
            raise ValueError(
                f"new_items.at_least is {self.at_least:g}, above at_most, {self.at_most:g}"
            )
        return self

    def check_feature(self, numbers: Sequence[str]) -> None:
        """Raises ConfigError where the feature is none of the catalogue's numeric ones."""
        if self.feature not in numbers:
            raise ConfigError(
                f"serving.new_items.feature '{self.feature}' is no numeric feature of the "
                f"catalogue; it has {', '.join(numbers) or 'none'}"
            )


@dataclass(config=STRICT)
class ServingConfig:
    """How the policy is served, and so how it is validated, evaluated, exported and drawn from.

    pi_served(a|x) = (1 - uniform) softmax(s / temperature)_a + uniform / (number of eligible items)
    """

    k: int = Field(default=1, ge=1)
    """Items of a round."""
    mode: Literal["sample", "top_k"] = "sample"
    """sample: draw items, with propensities. top_k: show the k best items, the same ones each time;
    a log of that supports no other policy."""
    temperature: float = Field(default=1.0, gt=0.0, allow_inf_nan=False)
    """Divides the scores s of the trained policy, and so acts on top of policy.temperature."""
    uniform: float = Field(default=0.0, ge=0.0, le=1.0, allow_inf_nan=False)
    """Share of draws that are uniform over all eligible items; the others follow the softmax."""
    top: int | None = Field(default=None, ge=1)
    """Restrict the softmax to this many best items; uniform draws stay over all. null: no limit."""
    new_items: NewItemsConfig | None = None
    """Limits on the share of new items; null: none. Limits hold for each draw, and so for the first
    item of a slate."""

    @model_validator(mode="after")
    def _check(self) -> ServingConfig:
        if self.mode == "top_k" and (self.temperature, self.uniform, self.top) != (1.0, 0.0, None):
            raise ValueError(
                "mode top_k always shows the k best items, so temperature, uniform and top have no "
                "effect: unset them, or set mode to sample (top: 1 with a uniform share is "
                "epsilon-greedy)"
            )
        if self.new_items is not None and self.mode == "top_k":
            raise ValueError(
                "new_items limits the probability of new items, and mode top_k has none: set mode "
                "to sample, where top: 1 with a uniform share is epsilon-greedy"
            )
        if self.new_items is not None and self.top is not None and self.uniform == 0.0:
            raise ValueError(
                "new_items with top needs a uniform share: the best items may all be new, or none"
            )
        if self.top is not None and self.top < self.k and self.uniform == 0.0:
            raise ValueError(
                f"{self.k} items a round cannot be drawn from the {self.top} best: raise top, or "
                "set a uniform share"
            )
        return self

    @property
    def is_trained_policy(self) -> bool:
        """Whether an item is drawn from the very policy that was trained."""
        plain = (self.mode, self.temperature, self.uniform, self.top)
        return plain == ("sample", 1.0, 0.0, None) and self.new_items is None

    @property
    def is_softmax(self) -> bool:
        """Whether this is a softmax over all items, at any temperature, without uniform draws."""
        whole = self.uniform == 0.0 and self.top is None and self.new_items is None
        return self.mode == "sample" and whole

    @property
    def text(self) -> str:
        """The settings that differ from the defaults, as `changed_serving` reads them."""
        default = asdict(ServingConfig())
        changed = {name: v for name, v in asdict(self).items() if v != default[name]}
        return ", ".join(f"{name}={value}" for name, value in changed.items()) or "as trained"


_ADAPTER: TypeAdapter[ServingConfig] = TypeAdapter(ServingConfig)


def parse_serving(content: dict[str, object], source: str) -> ServingConfig:
    """Validate a mapping. Raises ConfigError, which names `source`."""
    try:
        return _ADAPTER.validate_python(content)
    except ValidationError as error:
        message = "; ".join(
            ".".join(map(str, item["loc"])) + (": " if item["loc"] else "") + item["msg"]
            for item in error.errors()
        )
        raise ConfigError(f"{source}: {message}") from None


def changed_serving(serving: ServingConfig, text: str) -> ServingConfig:
    """Another way to serve a policy: 'greedy', or changes like 'temperature=.5,uniform=.1'.

    greedy is mode top_k with the same k.
    Raises ConfigError for an unknown key or a wrong value.
    """
    source = f"serving '{text}'"
    if text.strip() == GREEDY:
        return ServingConfig(k=serving.k, mode="top_k")
    content = asdict(serving)
    for part in text.split(","):
        name, sign, value = (piece.strip() for piece in part.partition("="))
        if not sign or name not in content:
            raise ConfigError(
                f"{source} must be 'greedy', or changes of {', '.join(content)} such as "
                "temperature=0.5,uniform=0.1"
            )
        content[name] = None if value in ("null", "none") else value
    return parse_serving(content, source)
