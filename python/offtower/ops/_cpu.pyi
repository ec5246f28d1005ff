def log_normalizer(
    context: int,
    item: int,
    item_bias: int,
    out: int,
    rows: int,
    items: int,
    dim: int,
    threads: int,
    isa: str,
) -> None: ...
def isas() -> list[str]: ...
def isa() -> str: ...
