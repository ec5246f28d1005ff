"""Connections to object stores and other file systems of pyarrow: s3://, gs://, abfs://, hdfs://.

Store requests are retried, logged when slow, and time out.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit

import pyarrow as pa
from pyarrow import fs

from offtower.data.read_ahead import ParallelReadAhead
from offtower.errors import DataError
from offtower.paths import HIDDEN, redact

logger = logging.getLogger("offtower.stores")

R = TypeVar("R")

ATTEMPTS = 4
"""Attempts of one request, besides those of pyarrow's clients."""
PAUSE_SECONDS = 0.5
"""Pause before the second attempt; it doubles each time."""
CONNECT_SECONDS = 10.0
SILENT_SECONDS = 20.0
"""Timeout of one request without an answer, for clients that have one."""
TIMEOUT = "OFFTOWER_STORE_TIMEOUT"
"""Environment variable: timeout of one answer with all its attempts, in seconds (default 600)."""

_SCHEMES = ("s3", "gs", "gcs", "abfs", "abfss", "hdfs", "viewfs")
"""Of addresses without `mount`. pyarrow also opens any protocol of fsspec, such as http."""
_SCHEME = re.compile(r"^([a-z][a-z0-9+.-]+)://", re.IGNORECASE)
_FLAGS = ("anonymous", "allow_bucket_creation", "force_virtual_addressing")
_S3 = ("region", "endpoint_override", "scheme", "tls_ca_file_path", *_FLAGS)
_FINAL = (
    *("ACCESS_DENIED", "NO_SUCH_BUCKET", "NO_SUCH_KEY", "INVALID_ACCESS_KEY_ID"),
    "allow_bucket_creation",
    *("SIGNATURE_DOES_NOT_MATCH", "EXPIRED_TOKEN", "INVALID_CLIENT_TOKEN_ID", "HTTP status 301"),
    *("HTTP status 400", "HTTP status 401", "HTTP status 403", "Unauthenticated"),
)
"""Parts of pyarrow's messages for errors that a retry does not help."""

_mounted: dict[str, fs.FileSystem] = {}
_lock = threading.Lock()


@dataclass(frozen=True)
class Connection:
    """A file system, and the prefix of paths in it."""

    filesystem: fs.FileSystem
    prefix: str


def is_address(place: object) -> bool:
    """Return whether text has the form SCHEME://..."""
    return isinstance(place, str) and _SCHEME.match(place) is not None


def mount(root: str, filesystem: fs.FileSystem) -> None:
    """Use a file system of the caller for addresses that begin with `root`, in this process.

    Args:
        root: "scheme://authority".
        filesystem: of pyarrow; PyFileSystem wraps those of fsspec.
    """
    _mounted[root.rstrip("/")] = filesystem


def connect(address: str) -> tuple[Connection, str]:
    """Return the file system of an address, shared in this process, and the path in it.

    pyarrow finds credentials: for s3:// in AWS_* variables, ~/.aws, or the role of the machine.
    Options follow a question mark, with pyarrow's names.

    Raises:
        DataError: an unknown scheme or option, credentials in the address, or no connection.
    """
    parts = urlsplit(address.replace("#", "%23"))
    root = f"{parts.scheme.lower()}://{parts.netloc}"
    if root in _mounted:
        return Connection(_mounted[root], ""), unquote(parts.path).strip("/")
    s3 = parts.scheme.lower() == "s3"
    shown = redact(address)
    if shown != address or f"{HIDDEN}@" in address or f"={HIDDEN}" in address:
        raise DataError(
            f"the address {shown} carries credentials, or did before it was stored. They would end "
            "up in configurations and messages; leave them out, and set "
            + ("AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" if s3 else "them in the environment")
        )
    if s3 and not parts.netloc:
        raise DataError(f"'{address}' names no bucket; write s3://BUCKET/FOLDER")
    with _lock:
        connection = _connected(root, parts.query)
    path = (connection.prefix + unquote(parts.path).lstrip("/")).rstrip("/")
    return connection, path or connection.prefix


@lru_cache(maxsize=64)
def _connected(root: str, query: str) -> Connection:
    scheme = root.partition("://")[0]
    if scheme not in _SCHEMES:
        raise DataError(f"'{root}' has an unknown scheme; {_FORMS}")
    try:
        if scheme == "s3":
            made = request(lambda: _s3(root[5:], query), f"the bucket of '{root}'", attempts=1)
            return Connection(made, root[5:] + "/")
        if scheme in ("gs", "gcs") and "retry_limit_seconds" not in query:
            # The client's default is 15 minutes.
            query = f"{query}&" * bool(query) + f"retry_limit_seconds={SILENT_SECONDS:g}"
        probe = f"{root}/x" + (f"?{query}" if query else "")
        connect = fs.FileSystem.from_uri
        filesystem, path = request(lambda: connect(probe), f"'{root}'", attempts=1)
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"'{root}' cannot be used ({first_line(error)}); {advice(error) or _FORMS}"
        ) from error
    return Connection(filesystem, path[:-1])


_FORMS = (
    "addresses look like s3://bucket/folder, gs://bucket/folder, "
    "abfs://container@account.dfs.core.windows.net/folder, hdfs://host:port/folder or "
    "file:///folder; options follow as ?region=...&endpoint_override=..."
)


def _s3(bucket: str, query: str) -> fs.FileSystem:
    options: dict[str, Any] = dict(parse_qsl(query, keep_blank_values=True))
    for name in options:
        if name not in _S3:
            raise DataError(f"unknown option '{name}' of an s3:// address; known: {', '.join(_S3)}")
    for flag in _FLAGS:
        if flag in options:
            options[flag] = options[flag].lower() in ("1", "true", "yes")
    given = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if given and "endpoint_override" not in options:
        # As Amazon's tools do; pyarrow reads these variables only in some of its constructors.
        scheme, mark, rest = given.partition("://")
        options["endpoint_override"] = (rest if mark else given).rstrip("/")
        if mark:
            options.setdefault("scheme", scheme)
    if "region" not in options and "endpoint_override" not in options:
        known = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        options["region"] = known or fs.resolve_s3_region(bucket)
    return fs.S3FileSystem(
        connect_timeout=CONNECT_SECONDS,
        request_timeout=SILENT_SECONDS,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=2),
        **options,
    )


def request(function: Callable[[], R], what: str, attempts: int | None = None) -> R:
    """Return function(), retried on transient errors; log `what` when it is slow.

    Raises:
        DataError: the request timed out.
        OSError, ArrowInvalid: the last attempt failed.
    """
    answers = ParallelReadAhead(
        lambda f: retry(f, what, attempts), [function], 1, lambda _: what, limit()
    )
    return next(answers)


def retry(function: Callable[[], R], what: str, attempts: int | None = None) -> R:
    """Return function(), called again after a pause on transient errors."""
    pause, attempts = PAUSE_SECONDS, ATTEMPTS if attempts is None else attempts
    for attempt in range(attempts):
        try:
            return function()
        except (pa.ArrowInvalid, OSError) as error:
            if attempt + 1 == attempts or not is_transient(error):
                raise
            logger.warning("%s: %s; trying again in %.1f s", what, first_line(error), pause)
        time.sleep(pause)
        pause *= 2
    raise AssertionError


def limit() -> float:
    """Return the timeout of one answer, in seconds."""
    text = os.environ.get(TIMEOUT, "600")
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise DataError(f"{TIMEOUT}='{text}' must be a number of seconds above 0")
    return seconds


def has_folders(filesystem: fs.FileSystem) -> bool:
    """Return whether a file's folder must be created first."""
    return filesystem.type_name not in ("s3", "gcs", "abfs")


def is_transient(error: BaseException) -> bool:
    """Return whether the same request may succeed later."""
    gone = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
    return not isinstance(error, gone) and not any(mark in str(error) for mark in _FINAL)


def advice(error: BaseException) -> str:
    """Return what to do about an error of a store; may be empty."""
    said = str(error)

    def has(*marks: str) -> bool:
        return any(mark.lower() in said.lower() for mark in marks)

    if has("HTTP status 301", "PermanentRedirect", "AuthorizationHeaderMalformed"):
        return "the bucket is in another region; add ?region=... to the address"
    if isinstance(error, PermissionError) or has(
        *("ACCESS_DENIED", "INVALID_ACCESS_KEY", "SIGNATURE_DOES_NOT", "EXPIRED_TOKEN"),
        *("HTTP status 401", "HTTP status 403", "Unauthenticated", "AuthenticationFailed"),
    ):
        return (
            "the store refuses this process. For s3:// set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY (or AWS_PROFILE, or give the machine a role), for gs:// "
            "GOOGLE_APPLICATION_CREDENTIALS, for abfs:// AZURE_STORAGE_ACCOUNT and its key; the "
            "role must allow listing and reading (and writing, for outputs). Where listing is not "
            "allowed, a missing bucket or prefix gives the same error"
        )
    if has("NO_SUCH_BUCKET", "not found", "does not exist"):
        return "check the bucket's name and the prefix, and the region and endpoint_override"
    if has("NETWORK_CONNECTION", "curlCode", "resolve host", "connection refused", "timed out"):
        return (
            "the store cannot be reached from this machine: check the address's region, "
            "endpoint_override and scheme, the proxy, and the network"
        )
    if has("HTTP status 5", "SLOW_DOWN", "INTERNAL_FAILURE", "SERVICE_UNAVAILABLE", "Throttl"):
        return "the store fails or is overloaded: check its status, and try again later"
    if has("libjvm", "libhdfs"):
        return "hdfs:// needs Hadoop's client: set JAVA_HOME, HADOOP_HOME and CLASSPATH"
    return ""


def first_line(error: BaseException) -> str:
    """Return the first line of an error message, shortened."""
    lines = redact(str(error)).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]
