"""What workers take over from the command's process."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import math
import os
import socket
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import offtower
from offtower.errors import ClusterError
from offtower.imports import TRUST_CODE


@dataclass(frozen=True)
class WorkerSettings:
    """What a worker takes over from the command's process.

    Attributes:
        folder: working folder; relative paths start there.
        threads: of the worker.
        trust_code: names of trusted code (`offtower.imports`).
        versions: of the packages that results depend on.
    """

    folder: str
    threads: int
    trust_code: str
    versions: dict[str, str]

    @classmethod
    def of(cls, cpus: float) -> WorkerSettings:
        """Settings of this process, for workers with `cpus` CPUs."""
        trusted = os.environ.get(TRUST_CODE, "")
        return cls(os.getcwd(), max(1, math.floor(cpus)), trusted, package_versions())

    def apply(self) -> None:
        """Set threads, working folder and trusted code of this worker.

        Raises:
            ClusterError: the node has other versions of packages than the command's process.
        """
        import torch

        self._check_versions(package_versions())
        os.environ[TRUST_CODE] = self.trust_code
        torch.set_num_threads(self.threads)  # Ray sets one thread, whatever the worker's CPUs.
        # Relative paths are the driver's. The working folder of a submitted job exists under
        # another path on each node, and the worker is in its copy already.
        with contextlib.suppress(OSError):
            os.chdir(self.folder)

    def _check_versions(self, here: dict[str, str]) -> None:
        differ = [
            f"{name} {here.get(name, 'missing')} instead of {wanted}"
            for name, wanted in self.versions.items()
            if here.get(name) != wanted
        ]
        if differ:
            raise ClusterError(
                f"node {socket.gethostname()} has {', '.join(differ)}. Install the versions of the "
                "command's machine on every node, or start all nodes from one image"
            )


def _version(package: str) -> str:
    # Without the build (+cu130): workers with GPUs may have another one than the command's process.
    return str(importlib.import_module(package).__version__).partition("+")[0]


@cache
def package_versions() -> dict[str, str]:
    """Versions of the packages that results depend on, and a digest of offtower's own modules."""
    names = ("offtower", "torch", "numpy", "pyarrow")
    sources = hashlib.sha256()
    root = Path(offtower.__file__).parent
    for path in sorted(root.rglob("*.py")):
        sources.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    versions = {name: _version(name) for name in names}
    return {**versions, "offtower's modules": sources.hexdigest()[:12]}
