"""Names of files and addresses that come from data: checked before use, redacted before display."""

from __future__ import annotations

import re

from offtower.errors import DataError, OfftowerError

_SECRET_OPTION = re.compile(
    r"(?i)(?<![\w.-])(?P<name>[\w.-]*(?:secret|token|passw|credential|signature|access_key|account_key"
    r"|accesskey|apikey|api_key)[\w.-]*|sig|key|pwd)=[^&\s'\"]+"
)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\\]")
_URI = re.compile(r"(?i)\b[a-z][a-z0-9+.-]*://[^\s'\"<>]+")
_STORES = ("s3", "gs", "gcs", "abfs", "abfss")
HIDDEN = "***"
"""What stands in place of credentials."""


def safe_relative(name: object, listed_in: object, error: type[OfftowerError] = DataError) -> str:
    """Return `name` if it is a file below its folder: relative, in normal form, printable.

    Args:
        name: as a manifest or the listing of a store has it, with slashes.
        listed_in: the file or folder that names it, for the message.
        error: class to raise.

    Raises:
        OfftowerError: `name` is no text, is empty or absolute, has an empty part, '.' or '..', a
            backslash or a control character.
    """
    if (
        isinstance(name, str)
        and not _CONTROL.search(name)
        and all(part not in ("", ".", "..") for part in name.split("/"))
    ):
        return name
    raise error(
        f"'{listed_in}' names the file {name!r}, which is not a plain relative path; files outside "
        "its folder are not read or written. It is damaged or hostile: do not use it"
    )


def redact(text: str) -> str:
    """`text` with the credentials of every address in it replaced by ***.

    Credentials are user name and password before the host, and options whose names say so
    (secret, token, password, signature, key).
    """
    return _URI.sub(lambda match: _redact_uri(match[0]), text)


def _redact_uri(uri: str) -> str:
    written, _, rest = uri.partition("://")
    rest, mark, query = rest.partition("?")
    # abfs://container@account and hdfs://user@host hold no secret. Keys of stores may have
    # slashes, and buckets have no port; elsewhere host:port/a@b is a path.
    scheme = written.lower()
    if scheme in _STORES:
        rest = re.sub(r"^[^/@:]*:.*@", f"{HIDDEN}@", rest)
    secret = r"^[^/]*@" if scheme in ("s3", "http", "https") else r"^[^/@]*:[^/]*@"
    rest = re.sub(secret, f"{HIDDEN}@", rest)
    query = _SECRET_OPTION.sub(lambda match: f"{match['name']}={HIDDEN}", query)
    return f"{written}://{rest}{mark}{query}"
