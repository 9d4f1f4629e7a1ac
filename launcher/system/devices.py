"""The CPUs and GPUs of this node, counted without importing torch."""

from __future__ import annotations

import importlib.machinery
import os
import re
from collections.abc import Mapping
from pathlib import Path

__all__ = ["count_cpus", "count_gpus"]


def count_cpus() -> int:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0))


def count_gpus(environ: Mapping[str, str] = os.environ, root: Path = Path("/")) -> int:
    """NVIDIA GPUs that a worker sees; 0 if torch is built without CUDA.

    Args:
        environ: for CUDA_VISIBLE_DEVICES.
        root: where /proc and /dev are.
    """
    if not _torch_has_cuda():
        return 0
    proc = root / "proc/driver/nvidia/gpus"
    if proc.is_dir():
        present = len(list(proc.iterdir()))
    else:
        present = sum(1 for path in root.glob("dev/nvidia*") if re.fullmatch(r"nvidia\d+", path.name))
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    return present if visible is None else min(present, _count_visible(visible))


def _count_visible(visible: str) -> int:
    """Entries before the first invalid one, as CUDA counts them."""
    count = 0
    for entry in visible.split(","):
        if not re.fullmatch(r"\s*(\d+|GPU-[\w-]+|MIG-[\w/-]+)\s*", entry):
            break
        count += 1
    return count


def _torch_has_cuda() -> bool:
    spec = importlib.machinery.PathFinder.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    try:
        version = (Path(spec.origin).parent / "version.py").read_text()
    except OSError:
        return True
    return re.search(r"^cuda\b.*=\s*None\s*$", version, re.MULTILINE) is None
