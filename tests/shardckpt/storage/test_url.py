"""From a URL to its storage, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from shardckpt.errors import (
    InvalidUrlError,
    StorageError,
)
from shardckpt.storage import LocalStorage, open_storage
from tests.kit.faults import HookedStorage


def test_local_spellings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for url in ("~/run", "run", "./x/../run", tmp_path / "run", f"file://{tmp_path}/run/"):
        storage = open_storage(url)
        assert isinstance(storage, LocalStorage)
        assert storage.url == str(tmp_path / "run")


def test_s3_spellings() -> None:
    for url in ("s3://bucket/a/b", "s3://bucket/a/b/", "s3a://bucket/a/b"):
        assert open_storage(url).url == "s3://bucket/a/b"
    assert open_storage("s3://bucket").url == open_storage("s3://bucket/").url == "s3://bucket"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("", "empty"),
        ("s3://", "bucket is missing"),
        ("s3://bucket/a/../b", "a path below"),
        ("s4://bucket/run", r"unknown protocol 's4'; did you mean s3://[?]$"),
        ("fiel:///data/run", r"unknown protocol 'fiel'; did you mean file://[?]$"),
        ("s_3://bucket/run", r"unknown protocol 's_3'; did you mean s3://[?]$"),
        ("file://", "file:// names no folder"),
        ("xyzzy://bucket/run", r"unknown protocol 'xyzzy'; object stores are s3://, gs:// and az://$"),
        ("gs://bucket/run", "a package is missing: .*gcsfs"),
        ("simplecache::s3://bucket/run", "chained"),
    ],
)
def test_a_wrong_url_says_what_is_wrong(url: str, message: str) -> None:
    with pytest.raises(StorageError, match=message) as caught:
        open_storage(url)
    assert url in str(caught.value)


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("file://localhost/data/run", "/data/run"),
        ("FILE:///data/run/", "/data/run"),
        ("file:////data/run", "/data/run"),
        ("local:///data/run", "/data/run"),
        ("file:///data/a%20b?c#d", "/data/a%20b?c#d"),
        ("//data/run", "/data/run"),
        ("/data//run///", "/data/run"),
        ("/data/my run ", "/data/my run "),
        ("/data/run?x=1#2", "/data/run?x=1#2"),
    ],
)
def test_local_urls(url: str, path: str) -> None:
    """Nothing is decoded, and no host but this one is meant."""
    storage = open_storage(url)
    assert isinstance(storage, LocalStorage)
    assert storage.url == path


@pytest.mark.parametrize("url", ["S3://bucket/run", "S3A://bucket/run/", "s3://bucket//run//"])
def test_protocols_in_capitals(url: str) -> None:
    assert open_storage(url).url == "s3://bucket/run"


def test_what_a_key_may_have_in_it() -> None:
    for name in ("run#3", "a?b", "my run", "100%", "r\u00fcn"):
        assert open_storage(f"s3://bucket/{name}").url == f"s3://bucket/{name}"


def test_a_host_in_the_url() -> None:
    """Those who open such URLs go by the host, the user and the port in it."""
    seen: list[dict[str, Any]] = []

    class Hosted(MemoryFileSystem):  # type: ignore[misc]
        protocol = "hosted"

        def __init__(self, **options: Any) -> None:
            super().__init__()
            seen.append(options)

        @staticmethod
        def _get_kwargs_from_urls(path: str) -> dict[str, Any]:
            return {"host": path.split("/")[2]}

    fsspec.register_implementation("hosted", Hosted, clobber=True)
    storage = open_storage("hosted://server:22/data/run/", {"timeout": 3})
    assert storage.url == storage.fresh().url == "hosted://server:22/data/run"
    assert seen == [{"host": "server:22", "timeout": 3}] * 2


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("file://host/data/run", r"the machine 'host': did you mean file:///host/data/run\?"),
        ("file://data/run", r"did you mean file:///data/run\?"),
        ("s3:///bucket/run", r"did you mean s3://bucket/run\?"),
        ("gs:///bucket/run", r"did you mean gs://bucket/run\?"),
        ("az://", r"the bucket is missing"),
        (" s3://bucket/run", r"white space.*did you mean s3://bucket/run\?"),
        ("s3://bucket/run\n", r"white space.*did you mean s3://bucket/run\?"),
        ("s3://my bucket/run", r"white space in 'my bucket'"),
        ("S3:/bucket", r"did you mean s3://bucket\?"),
        ("FILE:/data", r"did you mean file:///data\?"),
        ("gs://bucket/run?generation=1", r"no meaning"),
        ("az://box/run#1", r"no meaning"),
        ("https://host/run?sig=1", r"no meaning"),
        ("~nobody-of-this-name/run", r"home"),
        ("a\0b", r"null"),
        ("   ", "empty"),
    ],
)
def test_what_is_refused_and_what_is_meant(url: str, message: str) -> None:
    with pytest.raises(StorageError, match=message):
        open_storage(url)


@pytest.mark.parametrize("url", ["s3://key:secret@bucket/run", "sftp://user:secret@host/run"])
def test_a_password_is_not_repeated(url: str) -> None:
    with pytest.raises(StorageError, match="must not have a password") as caught:
        open_storage(url)
    assert "secret" not in str(caught.value)


def test_a_path_object_that_was_a_url() -> None:
    with pytest.raises(StorageError, match=r"did you mean s3://bucket/run\?"):
        open_storage(Path("s3://bucket/run"))


@pytest.mark.parametrize(
    ("url", "meant"),
    [
        ("s3:/b/run", "s3://b/run"),
        ("s3:b", "s3://b"),
        ("gs:/b", "gs://b"),
        ("file:/d/x", "file:///d/x"),
        ("file:d/x", "d/x"),
    ],
)
def test_a_url_that_lacks_a_slash_is_no_folder(url: str, meant: str) -> None:
    with pytest.raises(InvalidUrlError, match=f"^{url}: did you mean {meant}[?]"):
        open_storage(url)


def test_names_with_a_colon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("run:1", "lr:/x", "./s3:/x", "a/s3:/x", "C:/run", "s3x:/y", "17:30:05"):
        assert open_storage(name).url == str((tmp_path / name).absolute())


@pytest.mark.parametrize("thing", [None, 3, b"s3://bucket/run", ["run"]])
def test_what_is_no_url(thing: Any) -> None:
    with pytest.raises(TypeError, match=rf"is neither a URL nor a path: it is a {type(thing).__name__}"):
        open_storage(thing)


def test_a_storage_of_the_users_own_that_lacks_methods() -> None:
    class Mine(HookedStorage):
        write_pieces = property()  # type: ignore[assignment]

    with pytest.raises(TypeError, match=r"the Mine is no Storage: it lacks write_pieces \("):
        open_storage(Mine(open_storage("memory://mine"), lambda *_: None))


def test_options_for_a_local_path_are_a_forgotten_protocol() -> None:
    with pytest.raises(StorageError, match="is 's3://' missing before it"):
        open_storage("bucket/run", {"key": "k"})


def test_local_storage_imports_no_client() -> None:
    """Opening and using a local folder is fast: neither fsspec nor s3fs is imported."""
    program = (
        "import sys; from shardckpt.storage import open_storage;"
        "open_storage('/nowhere').list();"
        "print([m for m in ('fsspec', 's3fs', 'botocore', 'asyncio') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert found.stdout.strip() == b"[]"
