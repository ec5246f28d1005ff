"""Export a trained policy for retrieval: item vectors, index, context tower, manifest.

Writes RUN/export/<version> and makes it current; a failed export leaves the earlier one.

\b
Example:
  offtower export runs/mine --index ivf_flat --recall 0.98
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from offtower.cli.cluster import IN_PROCESS, RayOptions
from offtower.cli.common import AsJson, DrawnProgress, TrustCode, escape, messages, print_json, verb
from offtower.jsonable import finite


@verb
def export(
    run: Annotated[Path, typer.Argument(help="Run directory.", metavar="RUN")],
    index: Annotated[
        Literal["auto", "none", "flat", "ivf_flat", "ivf_sq8", "ivf_pq", "hnsw"],
        typer.Option(help="Approximate index (extra 'ann'); auto: ivf_flat for large catalogues."),
    ] = "auto",
    recall: Annotated[float, typer.Option(help="Recall@K that the index must reach.")] = 0.98,
    k: Annotated[int, typer.Option("-k", help="K of that recall.")] = 100,
    shard_rows: Annotated[
        int | None, typer.Option(help="Build ivf_* in shards of this many items, merged on disk.")
    ] = None,
    rebuild_index: Annotated[
        bool,
        typer.Option(
            "--rebuild-index",
            help="Cluster the items anew; otherwise an ivf_* index takes over the clusters of the "
            "earlier export until its recall falls below --recall.",
        ),
    ] = False,
    dtype: Annotated[
        Literal["float32", "float16", "int8"], typer.Option(help="Precision of item vectors.")
    ] = "float32",
    layout: Annotated[
        Literal["offtower", "vector_db"],
        typer.Option(help="Parquet columns: item_id, embedding; or id, values, metadata."),
    ] = "offtower",
    plain_lists: Annotated[
        bool, typer.Option("--plain-lists", help="Plain lists in the Parquet parts.")
    ] = False,
    sampling: Annotated[
        bool, typer.Option(help="Write the files for draws with propensities.")
    ] = True,
    catalogue: Annotated[
        str | None, typer.Option(help="Items to export; the training catalogue by default.")
    ] = None,
    contexts: Annotated[
        str | None,
        typer.Option(help="Log to measure recall on; the run's held-out log by default."),
    ] = None,
    trust_code: TrustCode = None,
    ray: RayOptions = IN_PROCESS,
    as_json: AsJson = False,
) -> None:
    from offtower.retrieval.export import export_run
    from offtower.retrieval.export_options import ExportOptions
    from offtower.retrieval.index import IndexOptions
    from offtower.retrieval.manifest import read_manifest
    from offtower.run_directory import RunDirectory

    wanted: IndexOptions | Literal["auto"] | None = None if index == "none" else "auto"
    if index != "auto" and index != "none":
        wanted = IndexOptions(kind=index, target_recall=recall, k=k, shard_rows=shard_rows)
    options = ExportOptions(
        dtype=dtype,
        index=wanted,
        sampling=sampling,
        layout=layout,
        fixed_size=not plain_lists,
        rebuild_index=rebuild_index,
    )
    with ray.execution(DrawnProgress()) as execution:
        path = export_run(
            run,
            options,
            catalogue=catalogue,
            contexts=contexts,
            execution=execution,
        )
    manifest = read_manifest(path)
    if as_json:
        print_json(finite({"export": str(path), **manifest}))
        return
    console = messages()
    vectors, found = manifest["vectors"], manifest["index"]
    console.print(f"{vectors['count']:,} items of {vectors['dim']} {vectors['dtype']} in {path}")
    if vectors["precision"]:
        kept = {name: value for name, value in vectors["precision"].items() if "@" in name}
        console.print(
            "kept by this precision: " + ", ".join(f"{n} {v:.4f}" for n, v in kept.items())
        )
    if found is None:
        console.print("no index: search is exact")
    else:
        measured, latency = found["recall"], found["latency_ms"]
        console.print(
            f"{found['kind']} {found['parameters']}: recall@{measured['k']} {measured['mean']:.4f} "
            f"± {2 * measured['std_error']:.4f} on {measured['contexts']} contexts not tuned on, "
            f"{latency['p50']:.2f} ms a query"
        )
        if "clusters_of" in found:
            console.print(f"the index has the clusters of export {found['clusters_of']}")
        elif "rebuilt_because" in found:
            console.print(f"the index was built anew: {escape(found['rebuilt_because'])}")
    if manifest["context_tower"]["reason"]:
        reason = escape(manifest["context_tower"]["reason"])
        console.print(f"[yellow]no graph of the context tower[/]: {reason}")
    advice = RunDirectory(run).manifest().get("advice")
    if advice is not None:
        console.print(f"[yellow]by its training log: {escape(advice)}[/]")
