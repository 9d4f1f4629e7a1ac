"""The command `shardckpt`: list, show, check, convert and copy checkpoints. Torch is imported for .pt only.

    shardckpt ls RUN                            a run's checkpoints
    shardckpt info CKPT                         tensors and values
    shardckpt verify CKPT                       every chunk against its checksum
    shardckpt merge CKPT OUT.safetensors|.pt    one file
    shardckpt reshard CKPT URL --world-size N   the same checkpoint for another number of ranks
    shardckpt copy CKPT URL                     to another storage
    shardckpt refs RUN                          what Zarr reads by, where the run is now

Exit codes: 0 done, 1 another failure, 2 wrong command line, 3 not a checkpoint, 4 corrupt, 5 storage,
6 exists already, 130 interrupted. What is for a machine is on stdout, errors and progress on stderr.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from shardckpt.cli.output import Progress, print_json, printable
from shardckpt.cli.parsing import UsageError, parse
from shardckpt.errors import (
    CheckpointError,
    CheckpointExistsError,
    MissingKeysError,
    NotACheckpointError,
    ShardckptError,
    StorageError,
    UnknownVersionError,
)
from shardckpt.formatting import count, size
from shardckpt.storage.url import protocol_of

__all__ = ["exit_code", "main"]

INTERRUPTED = 128 + signal.SIGINT
BROKEN_PIPE = 128 + signal.SIGPIPE


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command, by default that of this process. Returns its exit code; raises for bugs only."""
    if argv is not None:
        return _run(list(argv))
    for number in (signal.SIGINT, signal.SIGTERM):  # so that what is half-written is deleted
        signal.signal(number, _interrupt)
    try:
        return _run(sys.argv[1:])
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):  # an end that is under way needs no words
            signal.signal(number, signal.SIG_DFL)


def _run(arguments: list[str]) -> int:
    try:
        options = parse(arguments)
        code = _COMMANDS[options.command](options)
        sys.stdout.flush()
    except SystemExit as end:  # --help, --version
        return int(end.code or 0)
    except BrokenPipeError:
        return _leave_pipe()
    except KeyboardInterrupt as interrupt:
        left = "; ".join(_notes(interrupt)) or "nothing half-written is left"
        print(f"shardckpt: interrupted; {printable(left)}", file=sys.stderr)
        return INTERRUPTED
    except (UsageError, ShardckptError, OSError) as error:
        return _fail(error, as_json="--json" in arguments)
    return code


def exit_code(error: BaseException) -> int:
    """The exit code that stands for an error."""
    match error:
        case UsageError() | MissingKeysError():
            return 2
        case CheckpointExistsError():
            return 6
        case NotACheckpointError() | UnknownVersionError():
            return 3
        case CheckpointError():
            return 4
        case StorageError():
            return 5
    return 1


def _ls(options: argparse.Namespace) -> int:
    from shardckpt.cli.commands.ls import show

    return show(options.url, _storage_options(options), as_json=options.json)


def _info(options: argparse.Namespace) -> int:
    from shardckpt.cli.commands.info import show

    return show(
        options.url,
        _storage_options(options),
        select=options.select,
        every=options.all,
        as_json=options.json,
    )


def _verify(options: argparse.Namespace) -> int:
    from shardckpt.cli.commands.verify import show

    return show(options.url, _storage_options(options), as_json=options.json)


def _merge(options: argparse.Namespace) -> int:
    from shardckpt.interop.export import SUFFIXES, merge

    if "://" in options.out:
        raise UsageError(f"merge writes a local file, not {options.out}")
    if not options.out.endswith(SUFFIXES):
        raise UsageError(f"OUT must end with {' or '.join(SUFFIXES)}, not like {options.out!r}")
    with Progress("merging") as progress:
        made = merge(
            options.url,
            options.out,
            only=options.only,
            select=options.select,
            overwrite=options.force,
            storage_options=_storage_options(options),
            progress=progress,
        )
    document = {"url": made.url, "path": made.path, "tensors": made.tensors, "bytes": made.nbytes}
    _done(options, document, f"{made.path}: {count(made.tensors, 'tensor')}, {size(made.nbytes)}")
    return 0


def _reshard(options: argparse.Namespace) -> int:
    from shardckpt.interop.reshard import reshard

    source, target = _options_of_two(options)
    with Progress("resharding") as progress:
        made = reshard(
            options.url,
            options.out,
            options.world_size,
            storage_options=source,
            out_storage_options=target,
            progress=progress,
        )
    document = {
        "source": made.source,
        "url": made.url,
        "world_size": made.world_size,
        "bytes": made.nbytes,
        "dropped_ranks": list(made.dropped),
    }
    _done(options, document, f"{made.url}: {count(made.world_size, 'rank')}, {size(made.nbytes)}")
    if made.dropped:
        ranks = ", ".join(map(str, made.dropped[:8])) + (" ..." if len(made.dropped) > 8 else "")
        print(f"shardckpt: the PerRank values of ranks {ranks} have no place in it", file=sys.stderr)
    return 0


def _copy(options: argparse.Namespace) -> int:
    from shardckpt.interop.copy import copy

    source, target = _options_of_two(options)
    with Progress("copying") as progress:
        url = copy(
            options.url, options.out, source_options=source, target_options=target, progress=progress
        )
    _done(options, {"source": options.url, "url": url}, url)
    return 0


def _refs(options: argparse.Namespace) -> int:
    from shardckpt.cli.commands.refs import show

    return show(options.url, _storage_options(options), as_json=options.json)


_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "ls": _ls,
    "info": _info,
    "verify": _verify,
    "merge": _merge,
    "reshard": _reshard,
    "copy": _copy,
    "refs": _refs,
}


def _storage_options(options: argparse.Namespace, url: str | None = None) -> dict[str, Any] | None:
    """What the storage at the URL gets to know from the command line."""
    named = options.url if url is None else url
    protocol = protocol_of(named)
    is_local = protocol in ("", "file", "local")
    local = {"follow_links": True} if options.follow_links and is_local else None
    if not options.endpoint_url:
        return local
    if protocol in ("s3", "s3a"):
        return {"endpoint_url": options.endpoint_url}
    if url is None:
        raise UsageError("--endpoint-url is for s3:// URLs")
    return local


def _options_of_two(options: argparse.Namespace) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    found = _storage_options(options, options.url), _storage_options(options, options.out)
    if options.endpoint_url and not any(given and "endpoint_url" in given for given in found):
        raise UsageError("--endpoint-url is for s3:// URLs")
    return found


def _done(options: argparse.Namespace, document: dict[str, Any], text: str) -> None:
    if options.json:
        print_json(document)
    else:
        print(printable(text))


def _fail(error: Exception, *, as_json: bool) -> int:
    code = exit_code(error)
    text = (
        str(error)
        if not isinstance(error, OSError) or isinstance(error, ShardckptError)
        else _of_system(error)
    )
    line = " ".join("; ".join([text.rstrip(), *_notes(error)]).split()) or type(error).__name__
    if as_json:
        print_json({"error": {"type": type(error).__name__, "message": line, "exit_code": code}})
    print(f"shardckpt: {printable(line)}", file=sys.stderr)
    return code


def _notes(error: BaseException) -> list[str]:
    """What was added to an error on its way: what is left of the work, and where."""
    return list(getattr(error, "__notes__", ()))


def _of_system(error: OSError) -> str:
    return f"{error.filename}: {error.strerror}" if error.filename else str(error)


def _leave_pipe() -> int:
    """Whoever read the output has gone, like head: end without a word, as other tools do."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):
        pass
    return BROKEN_PIPE


def _interrupt(*_: object) -> NoReturn:
    """End the command. What it tidies up by then takes a moment, which nothing is to cut short."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt
