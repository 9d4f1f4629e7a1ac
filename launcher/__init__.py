"""`launch`: starts the ranks of a training job, and starts them again when one fails.

    import launcher
    config = launcher.Config(command=launcher.Command(launcher.Kind.SCRIPT, "train.py"), nproc=8)
    exit_code = launcher.run(config)

A worker reports its progress by `launcher.report(step, loss=loss)`. The import of this package imports nothing
else until a name is used, and never torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launcher.config.command import Command, Kind
    from launcher.config.job import Config
    from launcher.errors import ExitCode, LaunchError
    from launcher.progress import report

__all__ = ["Command", "Config", "ExitCode", "Kind", "LaunchError", "report", "run"]

_HOMES = {
    "Command": "config.command",
    "Config": "config.job",
    "ExitCode": "errors",
    "Kind": "config.command",
    "LaunchError": "errors",
    "report": "progress",
}


def run(config: Config) -> int:
    """Run a job to its end, and return the exit code that `launch` would end with.

    Call it from the main thread: it handles signals, and raises the soft limit of open files (workers get the
    former one). It ends all child processes of this process that begin while it runs, except a saver that
    still persists.

    Args:
        config: The job.

    Raises:
        LaunchError: The job cannot run at all.
    """
    from launcher.system.processes import Subreaper, raise_file_limit
    from launcher.zygote.handle import ZygoteHandle

    reaper = Subreaper(raise_file_limit())
    zygote = ZygoteHandle(config, reaper)  # imports torch while this process imports the rest
    from launcher.agent.agent import Agent

    with Agent(config, zygote, reaper) as agent:
        return agent.run()


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
