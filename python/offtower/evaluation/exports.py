"""Retrieval quality of the exports of evaluated runs."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from offtower.atomic import sha256_file
from offtower.data.log import ParquetLog
from offtower.evaluation.run import LogEvaluation
from offtower.prepare import log_schema
from offtower.progress import Progress
from offtower.retrieval import Retriever, retrieval_quality
from offtower.retrieval.quality import check_sizes
from offtower.run_directory import RunDirectory


def open_exports(
    runs: Sequence[Path], ks: Sequence[int], trust_code: Collection[str] = ()
) -> list[Retriever]:
    """Open the runs' exports and check that k items can be retrieved from each.

    Raises:
        RunError: a run has no usable export.
        ConfigError: a k is out of range.
    """
    exports = [Retriever.open(run, trust_code=trust_code) for run in runs]
    for export in exports:
        check_sizes(export, ks)
    return exports


def add_retrieval_quality(
    evaluation: LogEvaluation,
    runs: Sequence[Path],
    exports: Sequence[Retriever],
    ks: Sequence[int],
    progress: Progress,
    trust_code: Collection[str] = (),
) -> None:
    """Measure each export on the log of `evaluation`; note exports of an earlier policy."""
    served = [name for name in evaluation.objectives if name not in evaluation.also]
    for name, export, run in zip(served, exports, runs, strict=True):
        directory = RunDirectory(run)
        weights = sha256_file(directory.policy / "policy.safetensors")
        if export.manifest["policy"]["weights_sha256"] != weights:
            evaluation.notes.append(
                f"the export of '{run}' is of an earlier policy than the run's: its retrieval is "
                "not of what was evaluated; export again"
            )
        config = directory.load_config(trust_code=trust_code)
        if export.serving != config.serving:
            evaluation.notes.append(
                f"the export of '{run}' serves otherwise ({export.serving.text}) than the run that "
                f"was evaluated ({config.serving.text}): export again"
            )
        schema = log_schema(config)
        log = ParquetLog.open(evaluation.log["path"], schema)
        found = retrieval_quality(export, log, ks, progress=progress)
        evaluation.retrieval[name] = [one.to_dict() for one in found]
