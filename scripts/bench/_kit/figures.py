"""How figures are introduced: the machine they are of, and how many runs."""

from __future__ import annotations

import os
import platform
import sys

__all__ = ["machine"]


def machine(runs: int, *, of: str = "runs", statistic: str = "medians") -> str:
    """The machine and its load, the versions that matter, and of how many runs the figures are the `statistic`.

    torch's version is told only if this process has imported it.
    """
    parts = [
        f"{os.cpu_count()} CPUs",
        f"load {os.getloadavg()[0]:.1f}",
        f"Linux {platform.release()}",
        f"glibc {platform.libc_ver()[1]}",
        f"Python {platform.python_version()}",
    ]
    if "torch" in sys.modules:
        parts.append(f"torch {sys.modules['torch'].__version__}")
    return f"{', '.join(parts)}; {statistic} of {runs} {of}"
