"""The device that a run trains on."""

from __future__ import annotations

import torch

from offtower.config import TrainingConfig
from offtower.errors import ConfigError
from offtower.ops import available_backends, backend_status
from offtower.prepare import PreparedData


def resolve_device(setting: str) -> torch.device:
    """Return the device that `training.device` names, with its index.

    Raises:
        ConfigError: torch does not see that GPU.
    """
    if setting == "cpu" or (setting == "auto" and "cuda" not in available_backends()):
        return torch.device("cpu")
    missing = _why_no_gpu()
    if missing is not None:
        raise ConfigError(f"training.device={setting}, but {missing}; or set training.device=cpu")
    device = torch.device("cuda" if setting == "auto" else setting)
    if device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    count = torch.cuda.device_count()
    if device.index >= count:
        there = "cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}"
        raise ConfigError(f"training.device={setting}, but torch sees {there} only")
    return device


def to_configured_device(data: PreparedData, settings: TrainingConfig) -> PreparedData:
    """Return the data for a policy on the configured device.

    Raises:
        ConfigError: see `resolve_device`.
    """
    gib = settings.device_features_gib
    max_bytes = None if gib is None else round(gib * 2**30)
    return data.to_device(resolve_device(settings.device), max_bytes)


def describe_device(device: torch.device) -> str:
    """Return the device, its name and its operators, for logs and manifests."""
    if device.type == "cpu":
        return f"cpu, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"
    operators = "fused" if "cuda" in available_backends() else "plain-torch"
    return f"{device} ({torch.cuda.get_device_name(device)}), {operators} operators"


def auto_device_status() -> str:
    """Return the device that training.device=auto selects on this machine, and why."""
    device = resolve_device("auto")
    if device.type == "cuda":
        return f"auto selects {describe_device(device)}"
    missing = _why_no_gpu()
    if missing is not None:
        return f"auto selects the cpu: {missing}"
    other = describe_device(torch.device("cuda", torch.cuda.current_device()))
    return (
        f"auto selects the cpu: CUDA operators {backend_status()['cuda']}. training.device=cuda "
        f"selects {other}"
    )


def _why_no_gpu() -> str | None:
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None and torch.version.hip is None:
        return (
            f"this torch ({torch.__version__}) is built without CUDA: install one that is (pip's "
            "default index on Linux, or the one that pytorch.org names for your driver)"
        )
    return "torch sees no NVIDIA GPU (nvidia-smi lists them; CUDA_VISIBLE_DEVICES may hide them)"
