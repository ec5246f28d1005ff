"""The tensors of checkpoints, of this run in a worker's layout and of another run as a whole."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
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
            return load_state(path, Layout(OwnedRows(), None), ())
        except (OSError, RunError, KeyError, TypeError):
            continue
    return None


def load_state(
    path: Path, layout: Layout, names: Iterable[str], group: dist.ProcessGroup | None = None
) -> dict[str, Tensor]:
    """Read a checkpoint's tensors, from the parts of however many workers wrote them.

    Args:
        path: folder of a checkpoint.
        layout: of this worker.
        names: of the tensors of which it has some rows.
        group: reads together; None for a single process.

    Returns:
        Tensors on the CPU, by their names in the checkpoint.
    """
    reader = dcp.HuggingFaceStorageReader(str(path))
    state: dict[str, Any] = layout.empty(reader.read_metadata().state_dict_metadata, names)
    # safetensors reads into torch's default device.
    with torch.device("cpu"):
        if group is None:
            with without_group():
                dcp.load(state, storage_reader=reader, no_dist=True)
        else:
            dcp.load(state, storage_reader=reader, process_group=group)
    return state


@contextmanager
def without_group() -> Iterator[None]:
    """torch warns that there is no process group; on one process there should be none."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
