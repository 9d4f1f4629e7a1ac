"""What the benchmarks need beside this project: each in a virtual environment of its own, never a dependency.

An environment sees this one's packages, torch first of all, and holds only what they lack. So a peer runs on
the same torch as everything that it is compared with, and takes seconds to install.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Mapping
from pathlib import Path

__all__ = ["CACHE", "PACKAGES", "install", "missing", "python", "use"]

PACKAGES: Mapping[str, tuple[str, ...]] = {
    "torchsnapshot": ("torchsnapshot==0.1.0",),
    "orbax": ("orbax-checkpoint==0.12.8", "tensorstore"),
    "torch_checkpointing": ("torch_checkpointing==0.1.1",),
    "dlrover": ("dlrover[torch]", "grpcio"),
    "s3torchconnector": ("s3torchconnector[dcp]==1.5.0",),
    "matplotlib": ("matplotlib",),
    "accelerate": ("accelerate==1.15.0",),
    "ft_launcher": ("nvidia-resiliency-ext==0.4.1",),
}
"""By the environment's name: what pip is told."""

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shardckpt-bench"

_CONSTRAINTS = Path(__file__).resolve().parents[3] / "constraints.txt"
_FAILURE = "failure.txt"


def install(cache: Path, name: str) -> str:
    """Make the environment, if it is not there. Returns "", or why pip could not."""
    folder = cache / name
    if not missing(cache, name):
        return ""
    venv.create(folder, with_pip=False, clear=True)
    (_site_packages(folder) / "shardckpt-bench.pth").write_text(sysconfig.get_path("purelib") + "\n")
    command = [sys.executable, "-m", "pip", "--python", str(python(cache, name)), "install", "--quiet"]
    command += ["--disable-pip-version-check", "--constraint", str(_CONSTRAINTS), *PACKAGES[name]]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode == 0:
        (folder / "installed").write_text(" ".join(PACKAGES[name]))
        return ""
    errors = [line for line in done.stdout.splitlines() if line.startswith("ERROR")]
    reason = (errors or done.stdout.splitlines() or ["pip failed"])[-1].removeprefix("ERROR: ")
    (folder / _FAILURE).write_text(reason)
    return reason


def missing(cache: Path, name: str) -> str:
    """Why the environment cannot be used, or ""."""
    folder = cache / name
    if (folder / _FAILURE).exists():
        return f"does not install: {(folder / _FAILURE).read_text()}"
    try:
        same = (folder / "installed").read_text() == " ".join(PACKAGES[name])
    except OSError:
        same = False
    return "" if same else f"not installed; `scripts/bench/peers --cache {cache}` does it"


def python(cache: Path, name: str) -> Path:
    """The environment's interpreter."""
    return cache / name / "bin" / "python"


def use(cache: Path, name: str) -> None:
    """Make the environment's packages importable here, behind this process's own."""
    folder = str(_site_packages(cache / name))
    if folder not in sys.path:
        sys.path.append(folder)


def _site_packages(folder: Path) -> Path:
    return Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
