"""What object storage allows: the same bytes by plain HTTP, with nothing around it."""

from __future__ import annotations

import http.client
import os
import re
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from _kit.s3_server import BUCKET

__all__ = ["BareClient"]

_REGION = "us-east-1"


class BareClient:
    """Multipart puts and ranged gets over plain HTTP, in parallel, with signed headers and nothing else."""

    PART = 16 << 20
    CONNECTIONS = 2  # per rank

    def __init__(self, tensors: Sequence[torch.Tensor], size: int) -> None:
        """What it moves are the first `size` bytes of the tensors, from and to one buffer."""
        flat = torch.cat([tensor.view(-1).view(torch.uint8) for tensor in tensors])[:size].contiguous()
        self._content = memoryview(flat.numpy())
        self._target = memoryview(bytearray(len(self._content)))
        self._path = f"/{BUCKET}/bare-{dist.get_rank()}"

    def measure(self, seconds: Callable[[Callable[[], object]], float]) -> dict[str, float]:
        """Seconds to put and to get; `seconds` runs a function on all ranks together."""
        times = {"put": seconds(self._put), "get": seconds(self._get)}
        assert self._content == self._target
        return times

    def _put(self) -> None:
        (upload,) = re.findall(r"<UploadId>(.*)</UploadId>", self._request("POST", "uploads=")[0].decode())
        query = f"uploadId={urllib.parse.quote(upload, safe='')}"

        def put(number: int) -> str:
            part = self._content[number * self.PART : (number + 1) * self.PART]
            _, headers = self._request("PUT", f"partNumber={number + 1}&{query}", body=part)
            return f"<Part><PartNumber>{number + 1}</PartNumber><ETag>{headers['ETag']}</ETag></Part>"

        with ThreadPoolExecutor(self.CONNECTIONS) as threads:
            parts = "".join(threads.map(put, range(self._parts)))
        body = f"<CompleteMultipartUpload>{parts}</CompleteMultipartUpload>".encode()
        self._request("POST", query, body=memoryview(body))

    def _get(self) -> None:
        def get(number: int) -> None:
            target = self._target[number * self.PART : (number + 1) * self.PART]
            first = number * self.PART
            self._request("GET", "", {"Range": f"bytes={first}-{first + len(target) - 1}"}, into=target)

        with ThreadPoolExecutor(self.CONNECTIONS) as threads:
            list(threads.map(get, range(self._parts)))

    @property
    def _parts(self) -> int:
        return -(-len(self._content) // self.PART)

    def _request(
        self,
        method: str,
        query: str,
        headers: Mapping[str, str] | None = None,
        body: memoryview | None = None,
        into: memoryview | None = None,
    ) -> tuple[bytes, Mapping[str, str]]:
        """One signed request on a connection of its own; the answer's content, unless it goes `into`."""
        endpoint = os.environ["AWS_ENDPOINT_URL"]
        url = f"{self._path}?{query}" if query else self._path
        request = AWSRequest(method, endpoint + url, headers=dict(headers or {}))
        keys = Credentials(os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"])
        _HeadersOnly(keys, "s3", _REGION).add_auth(request)
        connection = http.client.HTTPConnection(urllib.parse.urlsplit(endpoint).netloc)
        sent = {**dict(request.headers), "Content-Length": str(len(body) if body is not None else 0)}
        connection.request(method, url, body=body, headers=sent)
        answer = connection.getresponse()
        if answer.status >= 300:
            raise OSError(f"{method} {url}: {answer.status} {answer.read()[:500]!r}")
        content = b""
        if into is None:
            content = answer.read()
        else:
            while into and (count := answer.readinto(into)):
                into = into[count:]
        connection.close()
        return content, answer.headers


class _HeadersOnly(S3SigV4Auth):
    """Signs no content, as clients do over HTTPS; hashing it is no part of moving it."""

    def _should_sha256_sign_payload(self, request: AWSRequest) -> bool:  # noqa: ARG002
        return False
