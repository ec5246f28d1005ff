"""The folder of an ingest, held by one process and without what a killed one left there."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from offtower.atomic import remove_leftovers
from offtower.data.ingest.histories import PREFIX
from offtower.data.ingest.plan import Split
from offtower.data.lease import Lease
from offtower.data.location import AnyPath, Location
from offtower.data.output import check_new
from offtower.errors import DataError

logger = logging.getLogger("offtower.data")

_MARKER = ".ingest.json"
_FOLDERS = ("log", "catalogue", "train", "validation", "test", "quarantine")


@contextmanager
def claimed(out: AnyPath, split: Split | None) -> Iterator[Location]:
    """Hold `out` for one ingest, without what a killed one left there.

    A marker names the folders that this ingest will write and that did not exist before. It is
    removed at the end, so that a marker without a living owner means that they are incomplete.
    """
    out = Location.of(out)
    names = ["log", "catalogue", *(() if split is None else split.names)]
    lease = Lease.acquire(out, remedy=", or choose another --out")
    try:
        marker = out / _MARKER
        _remove_interrupted(out, marker)
        for name in names:
            check_new(out / name)
        if not (out / "quarantine").exists():
            names.append("quarantine")
        marker.write_bytes(json.dumps({"folders": names}).encode())
        try:
            yield out
        except BaseException:
            if not (out / "catalogue").exists():
                (out / "log").remove()
            raise
        finally:
            marker.remove()
    finally:
        lease.release(remove=True)


def _remove_interrupted(out: Location, marker: Location) -> None:
    try:
        names = json.loads(marker.read_bytes())["folders"]
    except FileNotFoundError:
        return
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"'{marker}' of an interrupted ingest is damaged ({error}); remove '{out}', or choose "
            "another --out"
        ) from error
    found = [name for name in _FOLDERS if name in names and (out / name).exists()]
    for name in found:
        (out / name).remove()
    if out.local is not None:
        remove_leftovers(out.local)
        for path in (*out.local.glob(".split-*"), *out.local.glob(f"{PREFIX}*")):
            shutil.rmtree(path, ignore_errors=True)
    logger.warning(
        "an earlier ingest into '%s' was interrupted; removed what it had written (%s) to start "
        "again",
        out,
        ", ".join(found) or "no whole folder",
    )
