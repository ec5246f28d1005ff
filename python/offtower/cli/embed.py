"""Write a catalogue with vectors of its texts, from any encoder.

--module names a class whose method encode(texts) returns a vector for each text; the class runs,
since you name it. Chunks are kept until the end: the same command after an interruption continues.

\b
Example:
  offtower embed logs/mine/catalogue --column title --out logs/mine/embedded \\
    --module offtower.embedding.encoders:HashedTextEncoder --set dim=32
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from offtower.cli.common import AsJson, DrawnProgress, messages, print_json, verb


@verb
def embed(
    catalogue: Annotated[
        str, typer.Argument(help="Directory of the catalogue, or its address.", metavar="CATALOGUE")
    ],
    out: Annotated[Path, typer.Option(help="New folder for the catalogue with the vectors.")],
    column: Annotated[
        list[str], typer.Option("--column", help="Feature with the texts; may be repeated.")
    ],
    module: Annotated[
        str, typer.Option(help="Encoder as package.module:Class.")
    ] = "offtower.embedding.encoders:HashedTextEncoder",
    name: Annotated[
        str | None, typer.Option(help="Name of the new feature; by default COLUMN_vector.")
    ] = None,
    chunk: Annotated[int, typer.Option(help="Texts that are encoded at a time.")] = 4096,
    keep: Annotated[
        bool, typer.Option(help="Whether the texts stay features of the new catalogue.")
    ] = True,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Argument of the encoder's class."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    from offtower.config import apply_overrides
    from offtower.embedding import EmbedOptions, embed_catalogue
    from offtower.execution import Execution

    options = EmbedOptions(
        module,
        tuple(column),
        name or f"{column[0]}_vector",
        apply_overrides({}, overrides or [], "--set"),
        chunk,
        keep,
    )
    found = embed_catalogue(catalogue, out, options, execution=Execution(progress=DrawnProgress()))
    if as_json:
        print_json(found)
        return
    resumed = f", {found['resumed']:,} chunks were there already" if found["resumed"] else ""
    messages().print(
        f"{found['items']:,} vectors of {found['dim']} numbers, feature '{options.name}', in {out}"
        + resumed,
        soft_wrap=True,
    )
