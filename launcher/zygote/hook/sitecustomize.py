"""Turns a starting Python interpreter into a zygote, before it runs its script.

`launch` starts `python -u train.py …` with this directory first in PYTHONPATH. `site` imports this
module when the interpreter is complete but has not yet looked at the script. The zygote lives in here;
only its forked workers come out again, and then run the script as the interpreter would have done
anyway. Started as a script itself (`--cold`, `-- command`), it forks and executes the command line.
"""

import importlib
import os
import sys
import types


def _import_server() -> types.ModuleType:
    """launcher.zygote.server of the package that this file belongs to; sys.path and modules stay clean."""
    home = os.path.abspath(f"{__file__}/../../../..")  # noqa: PTH100
    sys.path.insert(0, home)
    try:
        return importlib.import_module("launcher.zygote.server")
    except BaseException:
        # `site` would report this and run the script, in the place of the zygote.
        sys.excepthook(*sys.exc_info())
        os._exit(1)
    finally:
        del sys.path[0]


def _forget_hook() -> None:
    """Undo what brought this module here, so that a worker and its children see nothing of it."""
    hook_dir = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120
    first, _, rest = os.environ["PYTHONPATH"].partition(os.pathsep)
    if os.pathsep in os.environ["PYTHONPATH"]:
        os.environ["PYTHONPATH"] = rest
    else:
        del os.environ["PYTHONPATH"]
    sys.path[:] = [entry for entry in sys.path if entry not in (first, hook_dir)]
    sys.path_importer_cache.pop(hook_dir, None)


if __name__ == "__main__":
    _import_server().serve(is_warm=False)
else:
    _forget_hook()
    _import_server().serve(is_warm=True)
    for _name in [name for name in sys.modules if name.partition(".")[0] == "launcher"]:
        del sys.modules[_name]
    # The environment's own sitecustomize, if it has one, is next on the path. Without one this
    # raises ImportError, which `site` takes for "there is none".
    del sys.modules["sitecustomize"]
    importlib.import_module("sitecustomize")
