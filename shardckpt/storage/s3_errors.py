"""Errors of S3 and botocore, as this library's."""

from __future__ import annotations

import errno
import json
import os
import socket
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from botocore import exceptions as botocore  # type: ignore[import-untyped]
from botocore.parsers import ResponseParserError  # type: ignore[import-untyped]

from shardckpt.errors import CredentialsError, OutOfReachError, StorageError, StorageFullError

__all__ = ["BeyondEndError", "RefusedError", "TransientError", "UnreachableError", "explain"]

_CONVENTIONS = (
    "Credentials come from storage_options (key, secret, token; profile; anon=True for a public "
    "bucket), else from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, "
    "~/.aws/credentials, or the machine's role; the endpoint from endpoint_url or AWS_ENDPOINT_URL"
)
_NO_CREDENTIALS = (
    botocore.NoCredentialsError,
    botocore.PartialCredentialsError,
    botocore.NoAuthTokenError,
    botocore.ProfileNotFound,
)
_NOT_RENEWED = (  # by credential_process, SSO, or the machine's role: the next try may succeed
    botocore.CredentialRetrievalError,
    botocore.MetadataRetrievalError,
    botocore.TokenRetrievalError,
    botocore.SSOError,
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
    botocore.FlexibleChecksumError,  # an answer was damaged on its way
    ResponseParserError,
    aiohttp.ClientError,
    ConnectionError,
    TimeoutError,
)
_FULL = {"QuotaExceeded", "InsufficientStorage", "XMinioStorageFull", "EntityTooLarge"}
_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired"}
_REFUSED = {
    "InvalidAccessKeyId",
    "InvalidClientTokenId",
    "InvalidToken",
    "SignatureDoesNotMatch",
    "UnrecognizedClientException",
    "400",  # the answer to a HEAD has no reason
}
_SOURCES = ("AssumeRole", "GetRoleCredentials", "GetSessionToken", "CreateToken")
"""How the names of operations begin that get credentials."""
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
    """A range begins behind the end of the object (416)."""


class TransientError(OutOfReachError):
    """The failure may pass: try again. It is not known whether the request was carried out."""


class UnreachableError(TransientError):
    """There is no connection to the endpoint: the request was not carried out.

    Attributes:
        summary: which endpoint, and why, without what to do about it.
    """

    def __init__(self, message: str, summary: str) -> None:
        super().__init__(message)
        self.summary = summary


class RefusedError(CredentialsError):
    """The server refuses the credentials, or there are none: with others the request may succeed.

    Attributes:
        summary: what was refused, and why, without what to do about it.
        is_expired: whether they were good once, or their source has failed, so that new ones can be expected.
    """

    def __init__(self, summary: str, advice: str = _CONVENTIONS, *, is_expired: bool = False) -> None:
        super().__init__(f"{summary}. {advice}")
        self.summary = summary
        self.is_expired = is_expired


def explain(error: Exception, url: str) -> Exception:
    """Translate an error of botocore, aiohttp or s3fs to one of this library or of the `Storage` contract."""
    if isinstance(error, _NO_CREDENTIALS):
        return RefusedError(f"{url}: {error}")
    if _is_not_renewed(error):
        return RefusedError(f"{url}: new credentials could not be got: {error}", is_expired=True)
    response = _response(error)
    if response is None:
        if isinstance(error, _UNREACHABLE):
            summary = f"cannot reach {_endpoint(error)} ({_reason(error)})"
            return UnreachableError(
                f"{url}: {summary}. Check the network, and endpoint_url in storage_options or AWS_ENDPOINT_URL",
                summary,
            )
        if isinstance(error, _BROKEN):
            said = " ".join(str(error).split()) or type(error).__name__  # on one line
            return TransientError(f"{url}: the connection failed: {said}")
        return StorageError(f"{url}: {type(error).__name__}: {error}")
    return _explain_response(response, url)


def _is_not_renewed(error: BaseException | None) -> bool:
    """True if the error comes from the source of credentials, not from the storage."""
    if isinstance(error, RuntimeError) and "refreshed credentials" in str(error):  # botocore's own
        return True
    if isinstance(error, FileNotFoundError) and _response(error) is None:  # a web identity's token file
        return True
    if isinstance(error, json.JSONDecodeError):  # the output of a program; S3 itself has no JSON
        return True
    while error is not None:
        if isinstance(error, _NOT_RENEWED):
            return True
        if isinstance(error, botocore.ClientError) and str(error.operation_name).startswith(_SOURCES):
            return True
        error = error.__cause__
    return False


def _endpoint(error: botocore.BotoCoreError) -> str:
    """The endpoint of a request, without its path."""
    parts = urlsplit(str(error.kwargs.get("endpoint_url") or error.kwargs.get("proxy_url") or ""))
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}" if parts.netloc else "the endpoint"


def _reason(error: BaseException) -> str:
    """Why there was no connection: the system's message, if there is one."""
    below = error.__cause__ or error.__context__
    while below is not None:
        if isinstance(below, socket.gaierror):
            return str(below.strerror)
        if isinstance(below, OSError) and (below.errno or 0) > 0:
            return os.strerror(below.errno or 0).lower()
        below = below.__cause__ or below.__context__
    return "no connection in time" if isinstance(error, botocore.ConnectTimeoutError) else str(error)


def _response(error: BaseException | None) -> dict[str, Any] | None:
    """The server's answer, from the botocore error below that of s3fs."""
    while error is not None:
        if isinstance(error, botocore.ClientError):
            return dict(error.response)
        error = error.__cause__
    return None


def _explain_response(response: dict[str, Any], url: str) -> Exception:
    code = str(response.get("Error", {}).get("Code", ""))
    said = f"{code} {response.get('Error', {}).get('Message', '')}".strip()
    status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    of_status = said if code == str(status) else f"{status} {said}"
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
    if status in (401, 403) or code in _REFUSED | _EXPIRED:
        return RefusedError(f"{url}: access was refused: {said}", is_expired=code in _EXPIRED)
    answered = f"{url}: the server answered {of_status}"
    if status == 429 or (status >= 500 and status != 501) or code in _PASSING:
        return TransientError(answered)
    return StorageError(answered)
