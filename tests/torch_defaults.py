"""torch's process-wide defaults, changed for a test."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

DEFAULTS = ("float64", "bfloat16", "float16", "meta")
"""Names of default dtypes, and of a default device."""


@contextmanager
def torch_default(name: str) -> Iterator[None]:
    """Set torch's default dtype or device, one of DEFAULTS."""
    if name == "meta":
        torch.set_default_device(name)
    else:
        torch.set_default_dtype(getattr(torch, name))
    try:
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
