"""Requests to an S3 server, as s3fs sends them: repeated while their failure may pass, and within limits."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import random
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any, TypeVar

from shardckpt.errors import StorageError
from shardckpt.storage.limits import Limits, Patience
from shardckpt.storage.names import without_temporary
from shardckpt.storage.s3_body import Body
from shardckpt.storage.s3_credentials import Found, credentials_of
from shardckpt.storage.s3_errors import RefusedError, TransientError, UnreachableError, explain

__all__ = ["CONFIG", "Reach", "S3Client"]

_log = logging.getLogger("shardckpt")

T = TypeVar("T")

Reach = Callable[[int], object]
"""Called with the bytes of a request or an answer that have moved so far."""

CONFIG = {"max_pool_connections": 32, "connect_timeout": 5, "read_timeout": 30}
"""The settings of botocore where the options do not have others."""

_ATTEMPTS = 8  # of a request, unless the options say otherwise
_SILENCE = 2.0  # seconds of trouble that nothing is said about
_FIRST_PAUSE = 0.1  # seconds, at most; each later one is twice as long
_LONGEST_LOOK = 2.0  # seconds between two looks for credentials that are to be renewed
_RENEWALS = 4  # of the credentials, within one request, that do not count as attempts
_MEMBERS = {
    "get_object": ("ETag",),
    "head_object": ("ETag", "ContentLength"),
    "put_object": ("ETag",),
    "list_objects_v2": ("IsTruncated",),
    "create_multipart_upload": ("UploadId",),
    "upload_part": ("ETag",),
}
"""What the answer of every S3 server has: that of a web server at a wrong endpoint, or of a login page on the way
there, has it not, though its status says that all is well."""


class S3Client:
    """The requests of one storage, whatever folder they are about. For the event loop of `system` only."""

    def __init__(self, system: Any, bucket: str, options: Mapping[str, Any]) -> None:
        config = {**CONFIG, **(options.get("config_kwargs") or {})}
        self.system = system
        self._bucket = bucket
        self._attempts = _attempts(options)
        self._limits = Limits.of(options, read_timeout=float(config["read_timeout"]))
        self._credentials = credentials_of(system, options)
        self._outage = _Outage()

    def name(self, key: str) -> str:
        """What messages call a key."""
        return f"s3://{self._bucket}/{key}".rstrip("/")

    async def request(self, method: str, key: str = "", *, about: str = "", **arguments: Any) -> Any:
        """The answer to one of the client's methods, tried until the server gives one.

        `about` is what messages name where there is no key.
        """
        about = key or about or str(arguments.get("Prefix", ""))
        return await self.repeat(
            about, lambda reach: self.call(method, key, reach, about=about, **arguments)
        )

    async def repeat(self, key: str, work: Callable[[Reach], Awaitable[T]]) -> T:
        """The result of `work`, repeated after ever longer pauses while its failure may pass.

        `work` tells how much has moved. It is given up after a number of attempts, or once its limits are
        reached. Credentials that are refused are looked up again; if they have expired, others are waited for as
        long as the limits permit.
        """
        loop = asyncio.get_running_loop()
        patience = Patience(self._limits.deadline, self._limits.least_rate, loop.time)
        started = loop.time()
        was_sent = False
        renewals = 0
        failure: TransientError | RefusedError
        for attempt in itertools.count(1):
            generation = self._credentials.generation
            pause = random.uniform(0.5, 1) * _FIRST_PAUSE * 2 ** (attempt - 1)
            try:
                result = await self._attempt(key, work, patience)
            except TransientError as error:
                failure = error
                was_sent = was_sent or not isinstance(error, UnreachableError)
            except RefusedError as error:
                failure = error
                found = await self._look(generation, started, patience)
                if found is Found.OTHERS and renewals < _RENEWALS:
                    renewals += 1
                    continue
                if not self._credentials.can_change or (found is Found.THE_SAME and not error.is_expired):
                    raise self._advised(error) from error.__cause__
                # New ones come when they come, however often that is tried.
                pause = min(pause, _LONGEST_LOOK)
            else:
                self._outage.is_told = False
                return result
            is_last = attempt - renewals >= self._attempts and not isinstance(failure, RefusedError)
            if is_last or loop.time() + pause >= patience.end:
                seconds = 0.0 if is_last else loop.time() - started
                raise self._last(failure, attempt, seconds, was_sent=was_sent) from failure
            if loop.time() > started + _SILENCE:
                longest = patience.end - loop.time()
                if not isinstance(failure, RefusedError):
                    longest = min(longest, _FIRST_PAUSE * (2 ** (self._attempts - 1) - 2 ** (attempt - 1)))
                self._outage.tell(failure, longest)
            await asyncio.sleep(pause)
        raise AssertionError

    async def call(self, method: str, key: str, reach: Reach, *, about: str = "", **arguments: Any) -> Any:
        """One request, tried once."""
        if key:
            arguments["Key"] = key
        if "Body" in arguments:  # its position moves: every attempt needs one of its own
            arguments["Body"] = Body(arguments["Body"], reach)
        with self.explained(key or about):
            # As s3fs's own `call_s3` does; its other methods remember listings, or lack options.
            await self.system.set_session()
            client = await self.system.get_s3(self._bucket)
            client.meta.events.register("before-sign.s3", _expect_nothing, unique_id="shardckpt")
            answer = await self.system._call_s3(method, Bucket=self._bucket, **arguments)
        for member in _MEMBERS.get(method, ()):
            if member not in answer:
                raise StorageError(
                    f"{self.name(without_temporary(key or about))}: what answers is no S3 server: there is no "
                    f"{member} in its answer. Check endpoint_url in storage_options or AWS_ENDPOINT_URL"
                )
        return answer

    @contextlib.contextmanager
    def explained(self, key: str) -> Iterator[None]:
        """Errors about `key`, as this library's or the storage's contract's."""
        try:
            yield
        except StorageError:
            raise
        except Exception as error:
            raise explain(error, self.name(without_temporary(key))) from error

    async def _attempt(self, key: str, work: Callable[[Reach], Awaitable[T]], patience: Patience) -> T:
        """One attempt. It ends at half the deadline without progress, so that another connection is tried."""
        loop = asyncio.get_running_loop()
        own = Patience(self._limits.deadline / 2, self._limits.least_rate, loop.time)

        def reach(nbytes: int) -> None:
            own.reach(nbytes)
            patience.reach(nbytes)
            timeout.reschedule(min(own.end, patience.end))

        try:
            async with asyncio.timeout_at(min(own.end, patience.end)) as timeout:
                return await work(reach)
        except TimeoutError as error:
            if not timeout.expired():
                raise
            raise TransientError(
                f"{self.name(without_temporary(key))}: the server does not answer, or fewer than "
                f"{self._limits.least_rate:g} bytes per second came through"
            ) from error

    async def _look(self, generation: int, since: float, patience: Patience) -> Found:
        """What credentials there are now; nothing, if where they come from does not answer."""
        try:
            async with asyncio.timeout_at(patience.end):
                return await self._credentials.look(generation, since)
        except TimeoutError:
            return Found.NOTHING

    def _advised(self, error: RefusedError) -> RefusedError:
        if not self._credentials.are_explicit:
            return error
        return RefusedError(
            error.summary,
            "The credentials were given in storage_options, so they are not looked up again: give `profile`, or "
            "none of key, secret and token, to have renewed ones found",
        )

    def _last(
        self, error: TransientError | RefusedError, attempts: int, seconds: float, *, was_sent: bool
    ) -> StorageError:
        """The last error of a request that is given up."""
        tries = "1 attempt" if attempts == 1 else f"{attempts} attempts"
        gave_up = f"Gave up after {tries}"
        if seconds:
            gave_up += f" in {seconds:.0f} s (transfer_deadline {self._limits.deadline:g} s)"
        if isinstance(error, RefusedError):
            return RefusedError(f"{error.summary}. {gave_up}", is_expired=error.is_expired)
        text = f"{error}. {gave_up}"
        if isinstance(error, UnreachableError) and not was_sent:
            return UnreachableError(text, error.summary)
        return TransientError(text)


class _Outage:
    """Says once that a server does not answer; again only after it has. Shared by all folders of a storage."""

    is_told = False

    def tell(self, error: TransientError | RefusedError, seconds: float) -> None:
        """Say what is being waited out, and for how long at most."""
        if not self.is_told:
            self.is_told = True
            what = str(error) if not isinstance(error, UnreachableError | RefusedError) else error.summary
            _log.warning("%s, trying again for up to %.0f s", what, max(1.0, seconds))


def _attempts(options: Mapping[str, Any]) -> int:
    """How often a request is tried: as botocore's `retries` has it, which may be in the options."""
    retries = (options.get("config_kwargs") or {}).get("retries") or {}
    if "max_attempts" in retries:  # does not count the first
        return int(retries["max_attempts"]) + 1
    return int(retries.get("total_max_attempts", _ATTEMPTS))


def _expect_nothing(request: Any, **_: Any) -> None:
    """Send bodies at once: not every server tells that it is ready for one, and aiohttp waits for that."""
    del request.headers["Expect"]  # no error if there is none
