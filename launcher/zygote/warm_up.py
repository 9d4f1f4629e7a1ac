"""Import in the zygote, once, what all workers will import."""

from __future__ import annotations

import gc
import importlib
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from launcher.zygote import script_imports

__all__ = ["warm_up"]

_TORCH = ("torch", "torch.distributed")
_REFERENCES_OF_TORCH = 1  # to `__main__`, in C


def warm_up(orders: dict[str, Any]) -> str | None:
    """Import torch, the modules to preload, and the script's own imports of known libraries.

    Modules are resolved as the script would resolve them. Returns the traceback if that fails, or if threads
    are left that make a fork unsafe.
    """
    if orders["import_dir"] is not None:
        sys.path.insert(0, orders["import_dir"])
    try:
        with _frozen(orders["main_file"]), _variables_of(orders["source"]):
            for name in (*_TORCH, *orders["preload"]):
                importlib.import_module(name)
            if orders["source"] is not None:
                script_imports.import_all(
                    script_imports.find_imports(Path(orders["source"]), Path(orders["import_dir"]))
                )
        _check_single_thread(orders["preload"])
    except BaseException:
        return traceback.format_exc()
    else:
        return None
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
def _variables_of(source: str | None) -> Iterator[None]:
    """Set the variables that the script sets before its imports. The workers set them again by themselves."""
    changed = {} if source is None else script_imports.find_variables(Path(source), os.environ)
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
    if _count_threads() == 1:
        return
    # Libraries that support forks (OpenBLAS) end their threads before one, so fork once.
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    threads = _count_threads()
    if threads > 1:
        what = f"preloading {', '.join(preload)}" if preload else "importing torch"
        raise RuntimeError(f"{what} left {threads - 1} threads running, so forking is not safe")


def _count_threads() -> int:
    return len(os.listdir("/proc/self/task"))  # noqa: PTH208 - pathlib would be one more import
