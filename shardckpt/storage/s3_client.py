"""Requests to an S3 server through s3fs: repeated, within limits, while their failure may pass."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import random
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from typing import Any, TypeVar

from shardckpt.errors import CredentialsError, FormatError, OutOfReachError, StorageError
from shardckpt.storage.limits import Limits, Patience
from shardckpt.storage.names import without_temporary
from shardckpt.storage.s3_body import Body
from shardckpt.storage.s3_checksums import add_checksum, prepare
from shardckpt.storage.s3_credentials import Found, credentials_of
from shardckpt.storage.s3_errors import (
    BeyondEndError,
    RefusedError,
    TransientError,
    UnreachableError,
    explain,
)
from shardckpt.storage.s3_settings import S3Settings
from shardckpt.storage.s3_transport import ThreadSession
from shardckpt.storage.work import Work, in_loop

__all__ = ["CONFIG", "Progress", "S3Client", "outcome"]

_log = logging.getLogger("shardckpt")

T = TypeVar("T")

Progress = Callable[[int], object]
"""Called with the bytes of a request or an answer that were transferred so far."""

CONFIG = {
    "max_pool_connections": 32,
    "connect_timeout": 5,
    "read_timeout": 30,
    "http_session_cls": ThreadSession,
}
"""Settings of botocore that the options may override."""

_LONGEST_PAUSE = 2.0  # seconds between two look-ups of credentials that are about to be renewed
_RENEWALS = 4  # of the credentials, within one request, that do not count as attempts
_MEMBERS = {
    "get_object": ("ETag",),
    "head_object": ("ETag", "ContentLength"),
    "put_object": ("ETag",),
    "list_objects_v2": ("IsTruncated",),
    "create_multipart_upload": ("UploadId",),
    "upload_part": ("ETag",),
}
"""Members of every S3 server's answer, by method. A web server at a wrong endpoint, or a login page on the way,
may answer with status 200, but without these."""


class S3Client:
    """The requests of one storage, for all its folders. Coroutines run in the event loop of s3fs.

    Args:
        system: the s3fs file system.
        bucket: the bucket's name.
        options: the user's, for limits, retries and credentials.
        settings: sizes and pauses.
    """

    def __init__(self, system: Any, bucket: str, options: Mapping[str, Any], settings: S3Settings) -> None:
        config = {**CONFIG, **(options.get("config_kwargs") or {})}
        self.settings = settings
        self._system = system
        self._bucket = bucket
        self._attempts = _attempts(options, settings.attempts)
        self._limits = Limits.of(options, read_timeout=float(config["read_timeout"]))
        self._credentials = credentials_of(system, options)
        self._outage = _Outage()
        self._prepared: Any = None
        self._checks_content = False

    def start(self, work: Coroutine[Any, Any, T]) -> Work[T]:
        """Start `work` in the event loop, from any other thread."""
        return in_loop(work, self._system.loop)

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` in the event loop and return its result; an interrupt of this thread cancels it.

        Raises what `work` raises, as `outcome` translates it.
        """
        return outcome(self.start(work))

    def name(self, key: str) -> str:
        """The URL of a key, for messages."""
        return f"s3://{self._bucket}/{key}".rstrip("/")

    async def request(self, method: str, key: str = "", *, about: str = "", **arguments: Any) -> Any:
        """The answer to a request, which is repeated until there is one.

        Args:
            method: of the boto client, like "get_object".
            key: the object's, if the request is about one.
            about: stands for the key in messages where there is none.
            arguments: of the method.
        """
        about = key or about or str(arguments.get("Prefix", ""))
        return await self.repeat(
            about, lambda progress: self.call(method, key, progress, about=about, **arguments)
        )

    async def repeat(self, key: str, work: Callable[[Progress], Awaitable[T]]) -> T:
        """The result of `work`, repeated after ever longer pauses while its failure may pass.

        `work` calls the `Progress` that it gets. It is given up after a number of attempts, or when its limits
        are reached. Refused credentials are looked up again; if they have expired, new ones are waited for until
        the limits are reached.
        """
        loop = asyncio.get_running_loop()
        patience = Patience(self._limits.deadline, self._limits.least_rate, loop.time)
        started = loop.time()
        was_sent = False
        renewals = 0
        failure: TransientError | RefusedError | None = None
        for attempt in itertools.count(1):
            generation = self._credentials.generation
            pause = random.uniform(0.5, 1) * self.settings.first_pause * 2 ** (attempt - 1)
            try:
                result = await self._attempt(key, work, patience)
            except _CutShortError as error:  # says nothing about the server: what it answered before counts
                failure = failure or error
                was_sent = True
            except TransientError as error:
                failure = error
                was_sent = was_sent or not isinstance(error, UnreachableError)
            except RefusedError as error:
                failure = error
                found = await self._look_up(generation, started, patience)
                if found is Found.OTHERS and renewals < _RENEWALS:
                    renewals += 1
                    continue
                if not self._credentials.can_change or (found is Found.THE_SAME and not error.is_expired):
                    raise self._advised(error) from error.__cause__
                # Renewed ones come in their own time: the number of attempts does not matter.
                pause = min(pause, _LONGEST_PAUSE)
            else:
                self._outage.is_reported = False
                return result
            is_last = attempt - renewals >= self._attempts and not isinstance(failure, RefusedError)
            if is_last or loop.time() + pause >= patience.end:
                seconds = 0.0 if is_last else loop.time() - started
                raise self._last(failure, attempt, seconds, was_sent=was_sent) from failure
            if loop.time() > started + self.settings.silence:
                longest = patience.end - loop.time()
                if not isinstance(failure, RefusedError):
                    longest = min(longest, self._pauses_after(attempt))
                self._outage.report(failure, longest)
            await asyncio.sleep(pause)
        raise AssertionError

    async def call(
        self, method: str, key: str, progress: Progress, *, about: str = "", **arguments: Any
    ) -> Any:
        """Send one request, once. Arguments are those of `request`."""
        if key:
            arguments["Key"] = key
        if "Body" in arguments:  # its position moves: every attempt needs one of its own
            arguments["Body"] = Body(arguments["Body"], progress)
        with self.explained(key or about):
            # As s3fs's own `call_s3` does; its other methods cache listings, or lack options.
            await self._system.set_session()
            client = await self._system.get_s3(self._bucket)
            if client is not self._prepared:
                self._prepared, self._checks_content = client, prepare(client, self._system)
            if self._checks_content:
                add_checksum(method, arguments)
            answer = await self._system._call_s3(method, Bucket=self._bucket, **arguments)
        for member in _MEMBERS.get(method, ()):
            if member not in answer:
                if "Body" in answer:
                    answer["Body"].close()  # its connection is needed
                raise StorageError(
                    f"{self.name(without_temporary(key or about))}: what answers is no S3 server: there is no "
                    f"{member} in its answer. Check endpoint_url in storage_options or AWS_ENDPOINT_URL"
                )
        return answer

    @contextlib.contextmanager
    def explained(self, key: str) -> Iterator[None]:
        """Raise errors of the block, about `key`, as this library's or the contract's."""
        try:
            yield
        except (StorageError, FormatError):
            raise
        except Exception as error:
            raise explain(error, self.name(without_temporary(key))) from error

    async def _attempt(self, key: str, work: Callable[[Progress], Awaitable[T]], patience: Patience) -> T:
        """Run `work` once. Half the deadline without progress ends it, so that another connection is tried."""
        loop = asyncio.get_running_loop()
        own = Patience(self._limits.deadline / 2, self._limits.least_rate, loop.time)

        checking: asyncio.TimerHandle | None = None

        def progress(nbytes: int) -> None:  # called from any thread
            own.extend(nbytes)
            patience.extend(nbytes)

        def check() -> None:
            nonlocal checking
            end = min(own.end, patience.end)
            if loop.time() >= end:
                timeout.reschedule(loop.time())
            else:
                checking = loop.call_at(end, check)

        try:
            async with asyncio.timeout(None) as timeout:
                check()
                return await work(progress)
        except TimeoutError as error:
            if not timeout.expired():
                raise
            kind = _CutShortError if patience.end < own.end else TransientError
            raise kind(
                f"{self.name(without_temporary(key))}: the server does not answer, or fewer than "
                f"{self._limits.least_rate:g} bytes per second came through"
            ) from error
        finally:
            if checking is not None:
                checking.cancel()

    async def _look_up(self, generation: int, since: float, patience: Patience) -> Found:
        """Look credentials up again. `Found.NOTHING` if their source does not answer."""
        try:
            async with asyncio.timeout_at(patience.end):
                return await self._credentials.look_up(generation, since)
        except TimeoutError:
            return Found.NOTHING

    def _pauses_after(self, attempt: int) -> float:
        """Seconds of all pauses that may follow this attempt, at most."""
        return self.settings.first_pause * float(2 ** (self._attempts - 1) - 2 ** (attempt - 1))

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
        """The error of a request that is given up."""
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


class _CutShortError(TransientError):
    """An attempt had less time than others, since the deadline of the request came."""


class _Outage:
    """Logs once that a server does not answer, and again only after it has answered. One for all folders."""

    is_reported = False

    def report(self, error: TransientError | RefusedError, seconds: float) -> None:
        """Log the error that is being waited out, and for how many seconds at most."""
        if not self.is_reported:
            self.is_reported = True
            what = str(error) if not isinstance(error, UnreachableError | RefusedError) else error.summary
            _log.warning("%s, trying again for up to %.0f s", what, max(1.0, seconds))


def outcome(work: Work[T], *, stop_it: bool = True) -> T:
    """The result of a request, waited for; its errors are those of the `Storage` contract.

    If this thread is interrupted, the request is cancelled too, unless not `stop_it`.
    """
    try:
        return work.result(stop_it=stop_it)
    except TransientError as error:  # the subclasses are private to this client
        raise OutOfReachError(str(error)) from error
    except BeyondEndError as error:
        raise StorageError(str(error)) from error
    except RefusedError as error:
        raise CredentialsError(str(error)) from error


def _attempts(options: Mapping[str, Any], default: int) -> int:
    """How often a request is tried: by botocore's `retries`, if the options have it."""
    retries = (options.get("config_kwargs") or {}).get("retries") or {}
    if "max_attempts" in retries:  # does not count the first
        return int(retries["max_attempts"]) + 1
    return int(retries.get("total_max_attempts", default))
