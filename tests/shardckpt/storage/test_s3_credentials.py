"""Credentials that are renewed while a process runs."""

from __future__ import annotations

import itertools
import pickle
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shardckpt.errors import (
    CredentialsError,
)
from shardckpt.storage import Storage, open_storage
from tests.kit.servers import FaultyProxy, S3Server, faulty_proxy
from tests.shardckpt.storage.helpers import PART, noise


@pytest.fixture
def put_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Writes ~/.aws/credentials with this access key, as whatever renews them does."""
    file = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))

    def put(key: str) -> None:
        file.write_text(
            f"[default]\naws_access_key_id={key}\naws_secret_access_key=s\naws_session_token=t-{key}\n"
        )

    put("one")
    return put


@pytest.fixture
def opened(
    moto_s3: S3Server,
    put_keys: Callable[[str], None],  # noqa: ARG001, the first keys
) -> Iterator[tuple[Storage, FaultyProxy]]:
    """A storage that has worked with the first keys."""
    with faulty_proxy(moto_s3.endpoint) as proxy:
        storage = open_storage(moto_s3.url(), {"endpoint_url": proxy.endpoint})
        storage.write_pack("pack", memoryview(noise(PART + 1)))
        yield storage, proxy


def test_every_call_goes_on_with_renewed_ones(
    opened: tuple[Storage, FaultyProxy], put_keys: Callable[[str], None]
) -> None:
    storage, proxy = opened
    calls: list[Callable[[], object]] = [
        lambda: storage.write_pack("other", memoryview(noise(3 * PART))),
        lambda: storage.write("small", b"x"),
        lambda: storage.create("claim", b"x"),
        lambda: storage.read("pack"),
        lambda: storage.read_into("pack", 0, memoryview(bytearray(PART))),
        lambda: storage.size("pack"),
        lambda: storage.list(),
        lambda: storage.delete_tree("none"),
        lambda: storage.delete("small"),
    ]
    for number, call in enumerate(calls):
        proxy.expired.add(proxy.keys[-1])
        put_keys(f"key{number}")
        call()
        assert proxy.keys[-1] == f"key{number}"


def test_in_the_middle_of_an_upload(
    opened: tuple[Storage, FaultyProxy], put_keys: Callable[[str], None]
) -> None:
    storage, proxy = opened

    def before(start: int, _stop: int) -> None:
        if start == PART:
            proxy.expired.add("one")
            put_keys("two")

    storage.write_pack("other", memoryview(noise(4 * PART)), before)
    assert storage.read("other") == noise(4 * PART)
    assert {"one", "two"} <= set(proxy.keys)


def test_of_a_storage_that_others_use_too(
    opened: tuple[Storage, FaultyProxy], put_keys: Callable[[str], None]
) -> None:
    """s3fs hands out one client for equal options; a copy of a storage goes on as well."""
    storage, proxy = opened
    twin, copied = (
        open_storage(storage.url, {"endpoint_url": proxy.endpoint}),
        pickle.loads(pickle.dumps(storage)),
    )
    proxy.expired.add("one")
    put_keys("two")
    for one in (storage, twin, copied, storage.at("below")):
        one.list()
    assert proxy.keys[-1] == "two"


def test_that_come_later_are_waited_for(
    opened: tuple[Storage, FaultyProxy],
    put_keys: Callable[[str], None],
    tmp_path: Path,
) -> None:
    """Also where the file is being written when it is looked at."""
    storage, proxy = opened
    asked = itertools.count()

    def renew(_method: str, _path: str) -> None:
        number = next(asked)
        if number == 0:
            proxy.expired.add("one")
        if number == 1:
            (tmp_path / "credentials").write_text("[default]\naws_access_key_id=two\n")
        if number == 2:
            put_keys("two")

    proxy.faults = renew
    assert storage.list() == ["pack"]
    assert proxy.keys[-1] == "two"


def test_that_never_come_are_an_error(opened: tuple[Storage, FaultyProxy]) -> None:
    storage, proxy = opened
    once = open_storage(
        storage.url,
        {"endpoint_url": proxy.endpoint, "transfer_deadline": 3},
    )
    proxy.expired.add("one")
    with pytest.raises(
        CredentialsError, match=r"ExpiredToken.*Gave up after \d+ attempts in \d+ s.*credentials"
    ) as caught:
        once.size("pack")
    assert type(caught.value) is CredentialsError


def test_that_never_come_are_the_reason_even_if_the_last_answer_does_not_come(
    opened: tuple[Storage, FaultyProxy],
) -> None:
    """The deadline cuts the last request short: what was answered before it tells more."""
    storage, proxy = opened
    once = open_storage(storage.url, {"endpoint_url": proxy.endpoint, "transfer_deadline": 4})
    proxy.expired.add("one")
    began = time.monotonic()
    proxy.faults = lambda _method, _path: "ignore" if time.monotonic() > began + 2.5 else None
    with pytest.raises(CredentialsError, match="ExpiredToken"):
        once.size("pack")


def test_that_come_right_after_a_request_has_failed(
    opened: tuple[Storage, FaultyProxy], put_keys: Callable[[str], None]
) -> None:
    """The next request finds them at its first look, however little time has passed."""
    storage, proxy = opened
    once = open_storage(storage.url, {"endpoint_url": proxy.endpoint, "transfer_deadline": 3})
    proxy.expired.add("one")
    with pytest.raises(CredentialsError):
        once.size("pack")
    put_keys("two")
    proxy.requests.clear()
    once = open_storage(storage.url, {"endpoint_url": proxy.endpoint})
    assert once.size("pack") == PART + 1
    assert [path.endswith("/pack") for _, path in proxy.requests].count(True) == 2


def test_a_missing_permission_is_an_error_at_once(opened: tuple[Storage, FaultyProxy]) -> None:
    storage, proxy = opened
    proxy.faults = lambda _method, _path: "denied"
    proxy.requests.clear()
    with pytest.raises(CredentialsError, match="AccessDenied"):
        storage.list()
    assert len(proxy.requests) == 1


def test_what_the_options_hold_is_not_looked_up(
    opened: tuple[Storage, FaultyProxy], put_keys: Callable[[str], None]
) -> None:
    storage, proxy = opened
    options = {"endpoint_url": proxy.endpoint, "key": "mine", "secret": "s"}
    mine = open_storage(storage.url, options)
    proxy.expired.add("mine")
    put_keys("two")
    with pytest.raises(CredentialsError, match=r"storage_options.*not looked up again"):
        mine.list()
    assert proxy.keys[-1] == "mine"


@pytest.mark.parametrize("failing", ["exit 1", "echo; exit 0", "echo no keys; exit 0"])
def test_of_a_program_that_fails_at_first(
    moto_s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    """A credential_process is asked again."""
    config, ready = tmp_path / "config", tmp_path / "ready"
    keys = '{"Version": 1, "AccessKeyId": "k", "SecretAccessKey": "s"}'
    script = tmp_path / "keys.sh"
    script.write_text(f"test -e {ready} || {{ touch {ready}; {failing}; }}\necho '{keys}'\n")
    config.write_text(f"[profile p]\ncredential_process = sh {script}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    storage = open_storage(moto_s3.url(), {"endpoint_url": moto_s3.endpoint, "profile": "p"})
    storage.write("file", b"x")
    assert storage.list() == ["file"]
