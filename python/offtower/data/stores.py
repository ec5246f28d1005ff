"""Object stores and other file systems that addresses name: connecting, retrying, explaining.

Whatever pyarrow knows: s3://, gs://, abfs://, hdfs://. A store may be slow, flaky, or silent: what
is asked of it is tried again a few times, is said aloud when it takes long, and ends at a limit.
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

from offtower.data.read_ahead import InOrder
from offtower.errors import DataError
from offtower.paths import HIDDEN, redact

logger = logging.getLogger("offtower.stores")

R = TypeVar("R")

ATTEMPTS = 4
"""Of one request, beside those that pyarrow itself makes."""
PAUSE_SECONDS = 0.5
"""Before the second attempt; it doubles from one to the next."""
CONNECT_SECONDS = 10.0
SILENT_SECONDS = 20.0
"""After so long without an answer a request is given up, where the store's client can."""
TIMEOUT = "OFFTOWER_STORE_TIMEOUT"
"""Environment variable: seconds that one answer may take, with all its attempts; 600 without it."""

_SCHEME = re.compile(r"^([a-z][a-z0-9+.-]+)://", re.IGNORECASE)
_FLAGS = ("anonymous", "allow_bucket_creation", "force_virtual_addressing")
_S3 = ("region", "endpoint_override", "scheme", "tls_ca_file_path", *_FLAGS)
_FINAL = (
    *("ACCESS_DENIED", "NO_SUCH_BUCKET", "NO_SUCH_KEY", "INVALID_ACCESS_KEY_ID"),
    "allow_bucket_creation",
    *("SIGNATURE_DOES_NOT_MATCH", "EXPIRED_TOKEN", "INVALID_CLIENT_TOKEN_ID", "HTTP status 301"),
    *("HTTP status 400", "HTTP status 401", "HTTP status 403", "Unauthenticated"),
)
"""In a message of pyarrow's: the next attempt would say the same."""

_mounted: dict[str, fs.FileSystem] = {}
_lock = threading.Lock()


@dataclass(frozen=True)
class Connection:
    """A file system, and what stands before an address's path in it."""

    filesystem: fs.FileSystem
    prefix: str


def is_address(place: object) -> bool:
    """Whether text has the form SCHEME://... of an address."""
    return isinstance(place, str) and _SCHEME.match(place) is not None


def mount(root: str, filesystem: fs.FileSystem) -> None:
    """Let addresses that begin with `root` mean a file system of the caller's, in this process.

    Args:
        root: "scheme://authority".
        filesystem: any of pyarrow's; PyFileSystem wraps those of fsspec, and others.
    """
    _mounted[root.rstrip("/")] = filesystem


def connect(address: str) -> tuple[Connection, str]:
    """The file system of an address, and the path there. One connection serves a whole process.

    Credentials are those that pyarrow finds: for s3:// environment variables AWS_*, ~/.aws, or the
    role of the machine. Options stand behind a question mark, as pyarrow has them.

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
    try:
        if scheme == "s3":
            made = asked(lambda: _s3(root[5:], query), f"the bucket of '{root}'", attempts=1)
            return Connection(made, root[5:] + "/")
        if scheme in ("gs", "gcs") and "retry_limit_seconds" not in query:
            # Its own limit is a quarter of an hour.
            query = f"{query}&" * bool(query) + f"retry_limit_seconds={SILENT_SECONDS:g}"
        probe = f"{root}/x" + (f"?{query}" if query else "")
        connect = fs.FileSystem.from_uri
        filesystem, path = asked(lambda: connect(probe), f"'{root}'", attempts=1)
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
        # As Amazon's own tools do; pyarrow does so for some of its ways to a file system only.
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


def asked(function: Callable[[], R], what: str, attempts: int | None = None) -> R:
    """function(), tried again where that may help; `what` is named when it takes long.

    Raises:
        DataError: no answer within the limit.
        OSError, ArrowInvalid: the last attempt's.
    """
    answers = InOrder(lambda f: tried(f, what, attempts), [function], 1, lambda _: what, limit())
    return next(answers)


def tried(function: Callable[[], R], what: str, attempts: int | None = None) -> R:
    """function(), again after a pause where it failed in a way that may pass."""
    pause, attempts = PAUSE_SECONDS, ATTEMPTS if attempts is None else attempts
    for attempt in range(attempts):
        try:
            return function()
        except (pa.ArrowInvalid, OSError) as error:
            if attempt + 1 == attempts or not may_pass(error):
                raise
            logger.warning("%s: %s; trying again in %.1f s", what, first_line(error), pause)
        time.sleep(pause)
        pause *= 2
    raise AssertionError


def limit() -> float:
    """Seconds that one answer may take."""
    text = os.environ.get(TIMEOUT, "600")
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise DataError(f"{TIMEOUT}='{text}' must be a number of seconds above 0")
    return seconds


def has_folders(filesystem: fs.FileSystem) -> bool:
    """Whether folders must be made before files in them."""
    return filesystem.type_name not in ("s3", "gcs", "abfs")


def may_pass(error: BaseException) -> bool:
    """Whether the same request may succeed a moment later."""
    gone = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
    return not isinstance(error, gone) and not any(mark in str(error) for mark in _FINAL)


def advice(error: BaseException) -> str:
    """What to do about an error of a store; empty where the error says it all."""
    said = str(error)

    def has(*marks: str) -> bool:
        return any(mark.lower() in said.lower() for mark in marks)

    if has("HTTP status 301", "PermanentRedirect", "AuthorizationHeaderMalformed"):
        return "the bucket is in another region; say which, as ?region=... behind the address"
    if isinstance(error, PermissionError) or has(
        *("ACCESS_DENIED", "INVALID_ACCESS_KEY", "SIGNATURE_DOES_NOT", "EXPIRED_TOKEN"),
        *("HTTP status 401", "HTTP status 403", "Unauthenticated", "AuthenticationFailed"),
    ):
        return (
            "the store refuses this process. For s3:// set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY (or AWS_PROFILE, or give the machine a role), for gs:// "
            "GOOGLE_APPLICATION_CREDENTIALS, for abfs:// AZURE_STORAGE_ACCOUNT and its key; the "
            "role must allow listing and reading (and writing, for outputs). A missing bucket or "
            "prefix is told so too, where listing is not allowed"
        )
    if has("NO_SUCH_BUCKET", "not found", "does not exist"):
        return "check the bucket's name and the prefix, and the region and endpoint_override"
    if has("NETWORK_CONNECTION", "curlCode", "resolve host", "connection refused", "timed out"):
        return (
            "the store cannot be reached from this machine: check region, endpoint_override and "
            "scheme behind the address, the proxy, and whether this network may reach it"
        )
    if has("HTTP status 5", "SLOW_DOWN", "INTERNAL_FAILURE", "SERVICE_UNAVAILABLE", "Throttl"):
        return "the store fails or is overloaded: look at its own state, and try again later"
    if has("libjvm", "libhdfs"):
        return "hdfs:// needs Hadoop's client: set JAVA_HOME, HADOOP_HOME and CLASSPATH"
    return ""


def first_line(error: BaseException) -> str:
    """The first line of what an error says, shortened."""
    lines = redact(str(error)).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]
