"""What S3's and botocore's errors mean to the user of a checkpoint."""

from __future__ import annotations

import errno
import os
import socket
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from botocore import exceptions as botocore  # type: ignore[import-untyped]

from shardckpt.errors import CredentialsError, OutOfReachError, StorageError, StorageFullError

__all__ = ["BeyondEndError", "TransientError", "UnreachableError", "explain"]

_CONVENTIONS = (
    "Credentials come from storage_options (key, secret, token; profile; anon=True for a public "
    "bucket), else from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, "
    "~/.aws/credentials, or the machine's role; the endpoint from endpoint_url or AWS_ENDPOINT_URL"
)
_NO_CREDENTIALS = (
    botocore.NoCredentialsError,
    botocore.PartialCredentialsError,
    botocore.CredentialRetrievalError,
    botocore.NoAuthTokenError,
    botocore.TokenRetrievalError,
    botocore.ProfileNotFound,
)
_UNREACHABLE = (
    botocore.EndpointConnectionError,
    botocore.ConnectTimeoutError,
    botocore.ProxyConnectionError,
)
_BROKEN = (
    botocore.HTTPClientError,
    botocore.ConnectionError,
    botocore.IncompleteReadError,
    botocore.FlexibleChecksumError,  # of an answer: damaged on its way
    aiohttp.ClientError,
    ConnectionError,
    TimeoutError,
)
_FULL = {"QuotaExceeded", "InsufficientStorage", "XMinioStorageFull", "EntityTooLarge"}
_REFUSED = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"}
_ELSEWHERE = {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraint"}
_PASSING = {
    "SlowDown",
    "Throttling",
    "RequestLimitExceeded",
    "RequestTimeout",
    # The request was damaged on its way:
    "BadDigest",
    "IncompleteBody",
    "XAmzContentSHA256Mismatch",
    "XAmzContentChecksumMismatch",
}


class BeyondEndError(StorageError):
    """A range begins behind the end of its object (416)."""


class TransientError(OutOfReachError):
    """It may pass: try again. Whether the request was carried out is not known."""


class UnreachableError(TransientError):
    """There is no connection to the endpoint: the request was not carried out.

    Attributes:
        summary: which endpoint, and why, without what to do about it.
    """

    def __init__(self, message: str, summary: str) -> None:
        super().__init__(message)
        self.summary = summary


def explain(error: Exception, url: str) -> Exception:
    """The error of the library's tree, or of the storage's contract, that `error` amounts to."""
    if isinstance(error, _NO_CREDENTIALS):
        return CredentialsError(f"{url}: {error}. {_CONVENTIONS}")
    response = _response(error)
    if response is None:
        if isinstance(error, _UNREACHABLE):
            summary = f"cannot reach {_endpoint(error)} ({_reason(error)})"
            return UnreachableError(
                f"{url}: {summary}. Check the network, and endpoint_url in storage_options or AWS_ENDPOINT_URL",
                summary,
            )
        if isinstance(error, _BROKEN):
            return TransientError(f"{url}: the connection failed: {error or type(error).__name__}")
        return StorageError(f"{url}: {type(error).__name__}: {error}")
    return _explain_response(response, url)


def _endpoint(error: botocore.BotoCoreError) -> str:
    """Where a request was to go, without its path."""
    parts = urlsplit(str(error.kwargs.get("endpoint_url") or error.kwargs.get("proxy_url") or ""))
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}" if parts.netloc else "the endpoint"


def _reason(error: BaseException) -> str:
    """Why there was no connection, in the system's words if it has said so."""
    below = error.__cause__ or error.__context__
    while below is not None:
        if isinstance(below, socket.gaierror):
            return str(below.strerror)
        if isinstance(below, OSError) and (below.errno or 0) > 0:
            return os.strerror(below.errno or 0).lower()
        below = below.__cause__ or below.__context__
    return "no connection in time" if isinstance(error, botocore.ConnectTimeoutError) else str(error)


def _response(error: BaseException | None) -> dict[str, Any] | None:
    """The server's answer, from the botocore error that s3fs has translated."""
    while error is not None:
        if isinstance(error, botocore.ClientError):
            return dict(error.response)
        error = error.__cause__
    return None


def _explain_response(response: dict[str, Any], url: str) -> Exception:
    code = str(response.get("Error", {}).get("Code", ""))
    said = f"{code} {response.get('Error', {}).get('Message', '')}".strip()
    status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    if code == "NoSuchBucket":
        return StorageError(
            f"{url}: there is no such bucket. Check the name and the endpoint (endpoint_url in "
            "storage_options or AWS_ENDPOINT_URL), or create it: a bucket is never made by itself"
        )
    if status == 404:
        return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), url)
    if status == 412:  # Ceph sends no more than the status
        return FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), url)
    if status == 409:
        return TransientError(f"{url}: other requests on it were under way: {said}")
    if status == 416 or code == "InvalidRange":
        return BeyondEndError(f"{url}: the range begins behind the end: {said}")
    if status == 507 or code in _FULL:
        return StorageFullError(f"{url}: {said}. Delete something or raise the quota")
    if status in (301, 307) or code in _ELSEWHERE:
        return StorageError(
            f"{url}: the bucket is in another region: {said}. Set AWS_DEFAULT_REGION, or region_name in "
            "the client_kwargs of storage_options"
        )
    if status in (401, 403) or code in _REFUSED:
        return CredentialsError(f"{url}: access was refused: {said}. {_CONVENTIONS}")
    answered = f"{url}: the server answered {status} {said}"
    if status == 429 or (status >= 500 and status != 501) or code in _PASSING:
        return TransientError(answered)
    return StorageError(answered)
