"""From the options --endpoint-url and --follow-links to the storage options of each URL."""

from __future__ import annotations

import argparse
from typing import Any

from shardckpt.cli.exit_codes import UsageError
from shardckpt.storage.url import protocol_of

__all__ = ["storage_options"]


def storage_options(options: argparse.Namespace, *urls: str) -> list[dict[str, Any] | None]:
    """The `storage_options` for each of a command's URLs, in order.

    Raises UsageError if there is an --endpoint-url and none of the URLs is in S3.
    """
    protocols = [protocol_of(url) for url in urls]
    if options.endpoint_url and not any(protocol in ("s3", "s3a") for protocol in protocols):
        raise UsageError("--endpoint-url is for s3:// URLs")
    return [_of_protocol(options, protocol) for protocol in protocols]


def _of_protocol(options: argparse.Namespace, protocol: str) -> dict[str, Any] | None:
    if protocol in ("s3", "s3a") and options.endpoint_url:
        return {"endpoint_url": options.endpoint_url}
    if protocol in ("", "file", "local") and options.follow_links:
        return {"follow_links": True}
    return None
