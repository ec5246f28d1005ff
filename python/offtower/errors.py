"""Errors meant for users: each says what was wrong, where, and what to do about it."""

from __future__ import annotations


class OfftowerError(ValueError):
    """Base of every error that offtower raises on bad input."""


class ConfigError(OfftowerError):
    """A configuration that cannot be run."""


class DataError(OfftowerError):
    """A log or catalogue that cannot be read or does not keep its schema."""


class NoEligibleItemsError(DataError):
    """A context that may be shown no item."""


class OperatorError(OfftowerError):
    """Tensors that an operator refuses: dtype, shape, device or index."""


class RunError(OfftowerError):
    """A run directory that is missing, incomplete or belongs to another configuration."""


class UntrustedCodeError(RunError):
    """A stored run, policy or export that names code which may not run."""


class UndefinedIntervalError(OfftowerError):
    """An interval that these rows do not define."""


class LeaseError(OfftowerError):
    """Another process writes to the folder, or has taken it over."""


class StoppedError(OfftowerError):
    """Training stopped on request, after its checkpoint was written."""


class ClusterError(RunError):
    """A Ray cluster that cannot be reached, or has no room for a job."""


class MissingExtraError(OfftowerError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package '{package}', which is not installed. "
            f'Install it with: pip install "offtower[{extra}]"'
        )
        self._given = (package, extra, purpose)

    def __reduce__(self) -> tuple[type[MissingExtraError], tuple[str, str, str]]:
        return MissingExtraError, self._given


class KeepLoggingWarning(UserWarning):
    """The default learner found nothing that may replace the logging policy."""
