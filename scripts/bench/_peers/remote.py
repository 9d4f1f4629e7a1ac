"""What scripts/bench/save --s3 compares: the same state to and from object storage."""

from __future__ import annotations

from typing import Any

from _kit.s3_server import BUCKET
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

import shardckpt
from _peers.base import Candidate, Wait
from _peers.dcp import Dcp

__all__ = ["REMOTE", "remove"]

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
