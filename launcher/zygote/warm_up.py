"""Import in the zygote, once, what all workers will import."""

from __future__ import annotations

import gc
import importlib
import os
import sys
import traceback
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from launcher.zygote import script_imports
from launcher.zygote.fork_safety import count_threads
from launcher.zygote.import_record import import_recorded

__all__ = ["WarmUp", "warm_up"]

_TORCH = ("torch", "torch.distributed")
_REFERENCES_OF_TORCH = 1  # to `__main__`, in C


class WarmUp(NamedTuple):
    """What has been imported.

    Args:
        error: the traceback if that failed, or if threads are left that make a fork unsafe; else None.
        recorded: modules that earlier workers had imported; None: workers should record none.
        variables: those that the script sets before its imports.
    """

    error: str | None = None
    recorded: Sequence[str] | None = None
    variables: Mapping[str, str] = types.MappingProxyType({})


def warm_up(orders: dict[str, Any]) -> WarmUp:
    """Import torch, the modules to preload, the script's own imports of known libraries, and recorded ones.

    Modules are resolved as the script would resolve them.
    """
    source = orders["source"]
    if orders["import_dir"] is not None:
        sys.path.insert(0, orders["import_dir"])
    try:
        variables = {} if source is None else script_imports.find_variables(Path(source), os.environ)
        recorded = None
        with _frozen(orders["main_file"]), _set_for_now(variables):
            for name in (*_TORCH, *orders["preload"]):
                importlib.import_module(name)
            if source is not None:
                script_imports.import_all(
                    script_imports.find_imports(Path(source), Path(orders["import_dir"]))
                )
            if orders["imports"] is not None:
                recorded = import_recorded(orders["imports"])
        _check_single_thread(orders["preload"])
        return WarmUp(None, recorded, variables)
    except BaseException:
        return WarmUp(traceback.format_exc())
    finally:
        if orders["import_dir"] is not None:
            sys.path.remove(orders["import_dir"])


@contextmanager
def _frozen(main_file: str | None) -> Iterator[None]:
    """Exempt all objects that are made here from garbage collection for good, except the names of `__main__`.

    Collections in the workers would write to every object's header, and so copy every page. But the names of a
    script hold its functions, and these hold all its names: if they were exempt too, no collection at exit would
    find what they hold, and a file that the script has left open would not be flushed. For the same reason, no
    garbage and no frame that an exception may keep (libraries keep those of failed imports) may hold `__main__`.
    """
    main = vars(sys.modules["__main__"])
    names = dict(main)
    references = _count_references()
    for name in [name for name, value in names.items() if not isinstance(value, str | None)]:
        del main[name]
    gc.collect()  # only this releases dictionaries that hold nothing but plain values
    gc.disable()
    if main_file is not None:
        main["__file__"] = main_file  # some libraries look at it when they are imported
    try:
        yield
    finally:
        main.pop("__file__", None)
        if _count_references() > references + _REFERENCES_OF_TORCH:
            gc.collect()  # 0.2 s, but since Python 3.12 `inspect` leaves copies of sys.modules behind
        gc.enable()
        gc.freeze()
        names |= main
        main.clear()
        main.update(names)


def _count_references() -> int:
    """References to `__main__` and to the dictionary of its names."""
    main = sys.modules["__main__"]
    return sys.getrefcount(main) + sys.getrefcount(vars(main))


@contextmanager
def _set_for_now(changed: Mapping[str, str]) -> Iterator[None]:
    """Set variables that the script sets before its imports. The workers set them again by themselves."""
    before = {name: os.environ[name] for name in changed if name in os.environ}
    os.environ.update(changed)
    try:
        yield
    finally:
        for name in changed:
            os.environ.pop(name, None)
        os.environ.update(before)


def _check_single_thread(preload: list[str]) -> None:
    """Raise `RuntimeError` if there are other threads: in a fork, the locks that they hold are never released."""
    threads = count_threads()
    if threads > 1:
        what = f"preloading {', '.join(preload)}" if preload else "importing torch"
        raise RuntimeError(f"{what} left {threads - 1} threads running, so forking is not safe")
