"""Which device a run learns on."""

from __future__ import annotations

import torch

from offtower.config import TrainingConfig
from offtower.errors import ConfigError
from offtower.ops import available_backends, backend_status
from offtower.prepare import PreparedData


def resolve_device(setting: str) -> torch.device:
    """The device that `training.device` names, with its number.

    Raises:
        ConfigError: a GPU is asked for, and torch has none of that number.
    """
    if setting == "cpu" or (setting == "auto" and "cuda" not in available_backends()):
        return torch.device("cpu")
    missing = _no_gpu()
    if missing:
        raise ConfigError(f"training.device={setting}, but {missing}; or set training.device=cpu")
    device = torch.device("cuda" if setting == "auto" else setting)
    if device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    count = torch.cuda.device_count()
    if device.index >= count:
        there = "cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}"
        raise ConfigError(f"training.device={setting}, but torch sees {there} only")
    return device


def place(data: PreparedData, settings: TrainingConfig) -> PreparedData:
    """The data for a policy on the configured device.

    Raises:
        ConfigError: see `resolve_device`.
    """
    most = settings.device_features_gib
    return data.on(resolve_device(settings.device), None if most is None else round(most * 2**30))


def describe(device: torch.device) -> str:
    """For people: the device, its name, and which operators serve it."""
    if device.type == "cpu":
        return f"cpu, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"
    operators = "fused" if "cuda" in available_backends() else "plain-torch"
    return f"{device} ({torch.cuda.get_device_name(device)}), {operators} operators"


def status() -> str:
    """What training.device=auto takes on this machine, and why."""
    device = resolve_device("auto")
    if device.type == "cuda":
        return f"auto takes {describe(device)}"
    missing = _no_gpu()
    if missing:
        return f"auto takes the cpu: {missing}"
    other = describe(torch.device("cuda", torch.cuda.current_device()))
    return (
        f"auto takes the cpu: CUDA operators {backend_status()['cuda']}. training.device=cuda "
        f"takes {other}"
    )


def _no_gpu() -> str:
    """Why torch has no GPU, or ""; a sentence's end."""
    if torch.cuda.is_available():
        return ""
    if torch.version.cuda is None and torch.version.hip is None:
        return (
            f"this torch ({torch.__version__}) is built without CUDA: install one that is (pip's "
            "default index on Linux, or the one that pytorch.org names for your driver)"
        )
    return "torch sees no NVIDIA GPU (nvidia-smi lists them; CUDA_VISIBLE_DEVICES may hide them)"
