"""One checksum over the content of each upload, not two, so that a server refuses what was damaged on its way."""

from __future__ import annotations

import base64
import zlib
from typing import Any

import botocore  # type: ignore[import-untyped]

from shardckpt.storage.s3_body import Body

__all__ = ["CHECKSUM", "add_checksum", "prepare"]

CHECKSUM = "ChecksumCRC32"
"""The argument of a put, and the member of its answer if the server has checked it."""

_HEADER = "x-amz-checksum-crc32"


def prepare(client: Any, system: Any) -> bool:
    """Set a client of botocore up for uploads. Returns True if each needs `add_checksum`.

    Over http, botocore adds a CRC-32 to the SHA-256 with which it signs the content. Over https it sends the
    content in a coding of its own with the checksum behind it, which takes copies, and which not every server
    reads. Here the signature is the checksum where there is one, else a CRC-32 in a header. Where checksums are
    configured to be left out (`when_required`), or to be of another kind, botocore does what it was told.

    Args:
        client: of botocore, for S3.
        system: the s3fs file system that has made it.
    """
    client.meta.events.register("before-sign.s3", _before_sign, unique_id="shardckpt")
    config = client.meta.config
    is_told = "request_checksum_calculation" in system.config_kwargs
    of_its_own = any(name.startswith("Checksum") for name in system.s3_additional_kwargs)
    if is_told or of_its_own or getattr(config, "request_checksum_calculation", None) != "when_supported":
        return False
    config.request_checksum_calculation = "when_required"
    return not _signs_content(client)


def add_checksum(method: str, arguments: dict[str, Any]) -> None:
    """Add a checksum to the arguments of a method of botocore that writes content."""
    if method == "create_multipart_upload":
        arguments["ChecksumAlgorithm"] = "CRC32"
    elif isinstance(body := arguments.get("Body"), Body):
        arguments[CHECKSUM] = base64.b64encode(zlib.crc32(body.view).to_bytes(4, "big")).decode()


def _signs_content(client: Any) -> bool:
    config = client.meta.config
    if config.signature_version is botocore.UNSIGNED or not str(config.signature_version).startswith(
        "s3v4"
    ):
        return False
    explicit = (config.s3 or {}).get("payload_signing_enabled")
    return bool(explicit if explicit is not None else not client.meta.endpoint_url.startswith("https"))


def _before_sign(request: Any, **_: Any) -> None:
    # Send bodies at once: not every server answers with "100 Continue".
    del request.headers["Expect"]  # no error if there is none
    if _HEADER in request.headers:
        # botocore leaves content that has a checksum out of the signature over https, if it knows of it.
        algorithm = {"algorithm": "crc32", "in": "header", "name": _HEADER}
        request.context.setdefault("checksum", {}).setdefault("request_algorithm", algorithm)
