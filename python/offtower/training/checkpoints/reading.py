"""Checkpoints of another run, read whole and without its policy."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from offtower.atomic import sha256_file
from offtower.checksums import read_checked_json
from offtower.errors import RunError
from offtower.training.checkpoints.folder import CheckpointFolder
from offtower.training.checkpoints.state import Layout, OwnedRows


def newest_tensors(directory: Path) -> dict[str, Tensor] | None:
    """The tensors of the newest whole checkpoint, by their names in `checkpoints.state`.

    Args:
        directory: the `checkpoints` folder of a run.

    Returns:
        Tensors on the CPU; None where no checkpoint is whole.
    """
    if not directory.is_dir():
        return None
    for path in reversed(CheckpointFolder(directory, 1).steps()):
        try:
            files = read_checked_json(path / "state.json")["files"]
            if any(sha256_file(path / name) != digest for name, digest in files.items()):
                continue
            return _read(path)
        except (OSError, RunError, KeyError, TypeError):
            continue
    return None


def _read(path: Path) -> dict[str, Tensor]:
    reader = dcp.HuggingFaceStorageReader(str(path))
    entries = reader.read_metadata().state_dict_metadata
    state: dict[str, Any] = Layout(OwnedRows(), None).empty(entries, ())
    with torch.device("cpu"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(state, storage_reader=reader, no_dist=True)
    return state
