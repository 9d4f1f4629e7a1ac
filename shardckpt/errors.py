"""What can go wrong, grouped by what the caller can do about it.

    ShardckptError
    +-- StateError              the state passed to save or load is not right: fix the state
    |   +-- UnsupportedValueError   holds something that cannot be stored as data
    |   +-- RankMismatchError       ranks disagree about one name
    |   +-- MissingKeysError        the checkpoint and the state do not have the same names
    |   +-- ShapeMismatchError      a tensor's shape or dtype differs
    +-- CheckpointError         the checkpoint at this URL is not right: take another one
    |   +-- NotACheckpointError     nothing is there, or it is something else
    |   +-- CheckpointExistsError   a checkpoint is there already, and is never overwritten
    |   +-- FormatError             the manifest is invalid or unsafe
    |   |   +-- UnknownVersionError     another version of the library wrote it
    |   |   +-- OutsideLinkError        a symbolic link leads out of the run: allow it, if you trust it
    |   +-- CorruptError            stored bytes differ from what was written
    +-- StorageError            the storage refuses or is out of reach: fix it, then try again
    |   +-- StorageFullError        no space, or over quota
    |   +-- CredentialsError        no or wrong credentials, or no permission
    |   +-- OutOfReachError         it does not answer for now, as in an outage: wait
    |   +-- RunInUseError           another job is at work in the run: take another URL, or stop that job
    +-- SaveError               a save did not become durable: the checkpoint before it stands
    |   +-- SupersededError         a newer attempt goes on, which does not need this save
    +-- SaverError              this node's saver is gone: save again, with a new one
        +-- SaverSilentError        it exists and does not answer: it may go on later

Every message names the rank, the tensor or the path; what was expected; what was found; and the remedy.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable
from typing import ParamSpec, TypeVar

__all__ = [
    "CheckpointError",
    "CheckpointExistsError",
    "CorruptError",
    "CredentialsError",
    "FormatError",
    "InvalidUrlError",
    "MissingKeysError",
    "NotACheckpointError",
    "OutOfReachError",
    "OutsideLinkError",
    "RankMismatchError",
    "RunInUseError",
    "SaveError",
    "SaverError",
    "SaverSilentError",
    "ShapeMismatchError",
    "ShardckptError",
    "StateError",
    "StorageError",
    "StorageFullError",
    "SupersededError",
    "UnknownVersionError",
    "UnsupportedValueError",
    "public_api",
]


LOAD_ANOTHER = "Load another checkpoint of this run (shardckpt ls), and have the storage checked."
"""The remedy at the end of a CorruptError about a chunk."""


def finding(error: Exception) -> str:
    """Return what an error found, without the remedy, for a message of code that applies the remedy itself."""
    return str(error).removesuffix(LOAD_ANOTHER).strip().rstrip(".")


class ShardckptError(Exception):
    """Base class of the errors that this library raises."""


class StateError(ShardckptError, ValueError):
    """The state passed to save or load is not right. Nothing was written or changed."""


class UnsupportedValueError(StateError):
    """The state holds something that cannot be stored as data (a function, a class, a plain object)."""


class RankMismatchError(StateError):
    """Ranks disagree about a name: other shape, dtype, layout or content."""


class MissingKeysError(StateError, KeyError):
    """The checkpoint lacks names that the state has, or the other way round."""

    def __str__(self) -> str:  # KeyError would print its repr
        return str(self.args[0])


class ShapeMismatchError(StateError):
    """A tensor's shape or dtype in the checkpoint differs from the one in the state."""


class CheckpointError(ShardckptError):
    """The checkpoint at this URL is not right. The state is unchanged, unless the text says that it is not."""


class NotACheckpointError(CheckpointError, FileNotFoundError):
    """No checkpoint is at this URL: nothing is there, or it is something else."""


class CheckpointExistsError(CheckpointError, FileExistsError):
    """A checkpoint is at this URL already; it was left as it is."""


class FormatError(CheckpointError):
    """The manifest is invalid, or refers to something outside its run."""


class UnknownVersionError(FormatError):
    """The manifest has a version that this library does not read; nothing is wrong with it."""


class OutsideLinkError(FormatError):
    """A symbolic link leads out of the run, and `follow_links` is not given; the file may be as it should."""


class CorruptError(CheckpointError):
    """Stored bytes are missing or differ from what was written; the message names the chunk."""


class StorageError(ShardckptError, OSError):
    """The storage refuses or is out of reach. What was stored before is unchanged."""


class InvalidUrlError(StorageError):
    """The URL of a storage is malformed."""


class StorageFullError(StorageError):
    """The storage has no space left, or a quota is used up."""


class CredentialsError(StorageError, PermissionError):
    """The storage needs credentials, or those given do not permit this."""


class OutOfReachError(StorageError):
    """The storage does not answer, or says that it is overloaded. It may pass by itself."""


class RunInUseError(StorageError):
    """Another job that is still at work saves into this run. Nothing was written."""


class SaverError(ShardckptError):
    """This node's saver cannot be reached: snapshots in its memory are lost, checkpoints are not."""


class SaverSilentError(SaverError):
    """This node's saver exists and does not answer. What it was given may become durable yet."""


class SaveError(ShardckptError):
    """A save did not become durable. Checkpoints committed before it are untouched."""


class SupersededError(SaveError):
    """A save lacks parts that will not come: the run goes on in a newer attempt, without it."""


_log = logging.getLogger("shardckpt")


P = ParamSpec("P")


T = TypeVar("T")


def public_api(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a public function: its errors are short, and name the keyword that a call should have used.

    Errors of a storage or a checkpoint come without the errors below them, whose chain of a hundred lines and
    more is logged at debug level. Errors about the state keep their chain: its cause may be in the user's code.
    """

    @functools.wraps(function)
    def public(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except TypeError:
            if (text := _unknown_keyword(function, kwargs)) is None:
                raise
            raise TypeError(text) from None
        except (StorageError, CheckpointError, SaveError) as error:
            _log.debug("%s failed", function.__qualname__, exc_info=True)
            raise error.with_traceback(None) from _cause_of(error)

    return public


def _unknown_keyword(function: Callable[..., object], keywords: Iterable[str]) -> str | None:
    """Say what keywords a function has, if one of `keywords` is none of them; None if all are."""
    import difflib
    import inspect

    parameters = inspect.signature(function).parameters.values()
    known = [
        each.name for each in parameters if each.kind is not each.POSITIONAL_ONLY and each.name != "self"
    ]
    unknown = next((name for name in keywords if name not in known), None)
    if unknown is None or any(each.kind is each.VAR_KEYWORD for each in parameters):
        return None
    alike = difflib.get_close_matches(unknown, known, n=1)
    listed = f"did you mean {alike[0]}? It has" if alike else "it has"
    name = function.__qualname__.removesuffix(".__init__")
    return f"{name} has no argument {unknown!r}; {listed} {', '.join(known)}"


def _cause_of(error: Exception) -> BaseException | None:
    """Return the cause that a program may examine: why a save failed, if that is not just another SaveError."""
    cause = error.__cause__ if isinstance(error, SaveError) else None
    if type(cause) is SaveError:  # a saver's words, which `error` repeats
        return None
    if isinstance(cause, StorageError):
        cause.__cause__, cause.__suppress_context__ = None, True
        return cause.with_traceback(None)
    return cause
