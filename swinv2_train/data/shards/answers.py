"""What a server's answer means: in words, and whether asking again can help.

Clients wrap what a server says in errors of their own (fsspec makes "not found" of everything that its second question
for a size meets), so the status is looked for along the chain of causes.
"""

from __future__ import annotations

import datetime
import email.utils
import re
from collections.abc import Iterator
from enum import Enum
from typing import Any, NamedTuple

from swinv2_train.config.secret_texts import without_secrets
from swinv2_train.config.shown import shown

_PAGE = re.compile(rb"\s*<(!doctype|html|head|body|\?xml|error)", re.IGNORECASE)
_TRANSIENT = (408, 425)


class MismatchError(Exception):
    """The bytes that came are not those of the file."""


class PageError(MismatchError):
    """A web page came in the place of the file."""


class Kind(Enum):
    """What was the matter; the value is said after what the client found."""

    MISSING = "it is not there"
    FORBIDDEN = "the server forbids it"
    REFUSED = "the server refuses the request"
    CIRCLE = "it redirects in a circle"
    BUSY = "the server is busy"
    BROKEN = "the server fails"
    UNREACHABLE = "the server cannot be reached, or the connection broke off"
    MISMATCH = "other bytes came"
    PAGE = "a page to log in, or of an error that the server gives for success"
    NOT_HERE = "this machine cannot ask"


class Answer(NamedTuple):
    """An error of a client, understood."""

    kind: Kind
    again: bool
    """Whether asking again can help."""
    wait_sec: float | None = None
    """How long the server asked to be left alone (Retry-After)."""

    @property
    def remedy(self) -> str:
        """What a user can do about it."""
        return _REMEDIES[self.kind]


_REMEDIES = {
    Kind.MISSING: "check the address, and put the file there again",
    Kind.FORBIDDEN: "check your access: credentials, and signatures in the address that have run out",
    Kind.REFUSED: "check the address and your access to it",
    Kind.CIRCLE: "name the address that it leads to",
    Kind.BUSY: "start again later, ask less at a time (data.fetch_ahead_shards), or raise data.fetch_give_up_sec",
    Kind.BROKEN: "check the server, or raise data.fetch_give_up_sec",
    Kind.UNREACHABLE: "check the server and the network, or raise data.fetch_give_up_sec",
    Kind.MISMATCH: "the file is not the one that was indexed: put it there again, or make its manifest again",
    Kind.PAGE: "check the address and your access to it",
    Kind.NOT_HERE: "install the client that it names, or check the address",
}


def answer_of(error: BaseException) -> Answer:
    """What an error of any client says of the server."""
    if isinstance(error, MismatchError):
        return Answer(Kind.PAGE if isinstance(error, PageError) else Kind.MISMATCH, again=True)
    status, headers = _status_of(error)
    if status is not None:
        return _by_status(status, headers)
    for each in _chain(error):
        if type(each).__name__ == "TooManyRedirects":
            return Answer(Kind.CIRCLE, again=False)
        if type(each).__name__ in ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"):
            return Answer(Kind.FORBIDDEN, again=False)
        if "Certificate" in type(each).__name__ or type(each).__name__ == "SSLCertVerificationError":
            return Answer(Kind.FORBIDDEN, again=False)
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and cause is not None and not isinstance(cause, FileNotFoundError):
        return answer_of(cause)
    if isinstance(error, FileNotFoundError):
        return Answer(Kind.MISSING, again=False)
    if isinstance(error, PermissionError):
        return Answer(Kind.FORBIDDEN, again=False)
    if isinstance(error, (ImportError, ValueError)):
        return Answer(Kind.NOT_HERE, again=False)
    return Answer(Kind.UNREACHABLE, again=True)


def _by_status(status: int, headers: Any) -> Answer:
    if status in (404, 410):
        return Answer(Kind.MISSING, again=False)
    if status in (401, 403, 407, 451, 511):
        return Answer(Kind.FORBIDDEN, again=False)
    if status in (429, 503):
        return Answer(Kind.BUSY, again=True, wait_sec=_retry_after(headers))
    if status in _TRANSIENT or status >= 500:
        return Answer(Kind.BROKEN, again=True, wait_sec=_retry_after(headers))
    return Answer(Kind.REFUSED, again=False)


def _chain(error: BaseException) -> Iterator[BaseException]:
    found: BaseException | None = error
    for _ in range(8):
        if found is None:
            return
        yield found
        found = found.__cause__


def _status_of(error: BaseException) -> tuple[int | None, Any]:
    """The HTTP status somewhere behind an error, and the headers that came with it."""
    for each in _chain(error):
        status = getattr(each, "status", None)  # aiohttp's
        if isinstance(status, int) and 300 <= status < 600:
            return status, getattr(each, "headers", None)
        response = getattr(each, "response", None)  # botocore's
        if isinstance(response, dict):
            facts = response.get("ResponseMetadata", {})
            if isinstance(status := facts.get("HTTPStatusCode"), int) and 300 <= status < 600:
                return status, facts.get("HTTPHeaders")
    return None, None


def _retry_after(headers: Any) -> float | None:
    """The seconds of a Retry-After header, which gives them or a date."""
    try:
        value = {str(name).lower(): str(text) for name, text in dict(headers or {}).items()}.get("retry-after", "")
        if value.strip().isdigit():
            return float(value.strip()[:9])
        until = email.utils.parsedate_to_datetime(value)
        return max(0.0, (until - datetime.datetime.now(datetime.UTC)).total_seconds())
    except (ValueError, TypeError):
        return None


def text_of(error: BaseException) -> str:
    """What a client or server said, in a line, without secrets."""
    status, _ = _status_of(error)
    if status is not None:
        texts = (getattr(each, "message", None) for each in _chain(error))
        said = next((text for text in texts if isinstance(text, str)), "")
        return f"HTTP {status} {shown(without_secrets(said))}".strip()
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and cause is not None:
        return text_of(cause)
    text = without_secrets(" ".join(str(error).split()))
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def is_page(start: bytes) -> bool:
    """Whether a file that begins like this is a web page or a server's error, and no shard, manifest or list."""
    return _PAGE.match(start) is not None
