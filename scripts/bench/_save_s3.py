"""What scripts/bench/save --s3 compares: the same state to and from object storage, and a bare client."""

from __future__ import annotations

import http.client
import os
import re
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist
from _s3_server import BUCKET
from _save_candidates import Candidate, Dcp, Wait
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

import shardckpt

__all__ = ["REMOTE", "BareClient", "remove"]

_REGION = "us-east-1"


class RemoteShardckpt(Candidate):
    name = "shardckpt"
    again = syncs = overlaps = prepares = True

    @property
    def _objects(self) -> dict[str, Any]:
        return {"model": self.state.model, "optimizer": self.state.optimizer}

    def prepare(self) -> None:
        self._manager = shardckpt.Checkpointer(_url(self), every_steps=10**9)
        self._manager.restore(self._objects)
        self._manager.step(1, self._objects)

    def save(self, step: int) -> Wait:
        return self._manager.save(step, self._objects).wait

    def load(self) -> None:
        shardckpt.load(_url(self), self._objects)

    def close(self) -> None:
        self._manager.close()
        del self._manager


class RemoteDcp(Dcp):
    """DCP's own way to fsspec, over s3fs."""

    name = "DCP, s3fs"
    reshards = False

    def save(self, step: int) -> Wait:
        save(self._state_dict(), storage_writer=self._writer(f"{_url(self)}/step-{step:08d}"))
        self._saved = step
        return lambda: None

    def load(self) -> None:
        loaded = self._state_dict()
        load(loaded, storage_reader=self._reader(f"{_url(self)}/step-{self._saved:08d}"))
        self._apply(loaded)

    def _writer(self, url: str) -> Any:
        return FsspecWriter(url, sync_files=False)

    def _reader(self, url: str) -> Any:
        return FsspecReader(url)


class ConnectorDcp(RemoteDcp):
    """DCP with the AWS connector for PyTorch."""

    name = "DCP, s3torchconnector"
    needs = "s3torchconnector"

    def _writer(self, url: str) -> Any:
        from s3torchconnector.dcp import S3StorageWriter

        return S3StorageWriter(region=_REGION, path=url, s3client_config=self._config())

    def _reader(self, url: str) -> Any:
        from s3torchconnector.dcp import S3StorageReader

        return S3StorageReader(region=_REGION, path=url, s3client_config=self._config())

    def _config(self) -> Any:
        from s3torchconnector import S3ClientConfig

        return S3ClientConfig(force_path_style=True)


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


def remove(prefix: str) -> None:
    """Delete everything whose key begins with it."""
    import s3fs

    filesystem = s3fs.S3FileSystem(skip_instance_cache=True)
    for path in filesystem.ls(BUCKET):
        if path.startswith(f"{BUCKET}/{prefix}"):
            filesystem.rm(path, recursive=True)


def _url(candidate: Candidate) -> str:
    return f"s3://{BUCKET}/{candidate.folder.name}"


REMOTE: dict[str, type[Candidate]] = {
    "s3:shardckpt": RemoteShardckpt,
    "s3:dcp-s3fs": RemoteDcp,
    "s3:dcp-connector": ConnectorDcp,
}
"""By the word of a job."""
