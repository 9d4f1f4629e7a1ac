"""What a cluster's scheduler says of a job, as settings: from the environment alone, and pure.

Slurm is asked inside a job step only: there every node runs one `launch` (`srun launch train.py`). In the
batch script itself `launch` is what it is elsewhere, a job of one node. Kubernetes is asked in the pods of
an indexed Job or a JobSet that say with PET_NNODES how many they are. docs/schedulers.md has all of it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from launcher.config.options import Setting, find_option
from launcher.errors import UsageError

__all__ = ["expand_nodelist", "settings_from_scheduler", "slurm_port"]

_PORT = 29400  # c10d's own
_SPECIAL_STEPS = 0xFFFFFFF0  # steps from this number on are shells, of salloc and sbatch


def settings_from_scheduler(environ: Mapping[str, str] = os.environ) -> list[Setting]:
    """What Slurm or Kubernetes says of nodes, workers and where to meet; nothing outside of both.

    Raises `UsageError` if Slurm starts more than one `launch` per node, as each starts all workers.
    """
    return _slurm(environ) or _kubernetes(environ)


def expand_nodelist(nodelist: str) -> list[str]:
    """The host names in a list of Slurm's: `n[01-03,7],m5` are n01, n02, n03, n7 and m5."""
    names = []
    for item in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", nodelist):
        found = [""]
        for plain, numbers in re.findall(r"([^\[]+)|\[([^\]]*)\]", item):
            parts = _numbers(numbers) if numbers else [plain]
            found = [head + part for head in found for part in parts]
        names += found
    return names


def _numbers(text: str) -> list[str]:
    numbers = []
    for item in text.split(","):
        first, _, last = item.partition("-")
        width = len(first)
        numbers += [f"{number:0{width}}" for number in range(int(first), int(last or first) + 1)]
    return numbers


def slurm_port(job: int, step: int) -> int:
    """The port at which the nodes of a step meet: the same on all, another for jobs near in number."""
    return 20000 + (31 * job + step) % 10000


def _slurm(environ: Mapping[str, str]) -> list[Setting]:
    step = environ.get("SLURM_STEP_ID", "")
    if not step.isdecimal() or int(step) >= _SPECIAL_STEPS:
        return []
    _check_tasks(environ.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    said = [
        _setting(environ, "nproc", "SLURM_GPUS_ON_NODE"),
        _setting(environ, "nnodes", "SLURM_STEP_NUM_NODES", "SLURM_NNODES"),
        _setting(environ, "node-rank", "SLURM_NODEID"),
        *_slurm_meeting(environ, int(environ.get("SLURM_JOB_ID", "0")), int(step)),
    ]
    return [setting for setting in said if setting is not None]


def _check_tasks(tasks: str) -> None:
    """`tasks` is the number on each node, as 2(x3),1."""
    if any(int(number) > 1 for number in re.findall(r"(?:^|,)(\d+)", tasks)):
        raise UsageError(
            f"SLURM_STEP_TASKS_PER_NODE in the environment: expected 1 on each node, found {tasks}: one launch "
            f"starts all workers of its node: srun --ntasks-per-node=1"
        )


def _slurm_meeting(environ: Mapping[str, str], job: int, step: int) -> list[Setting]:
    """Where several nodes meet, and their job's name: another one after each requeue."""
    variable = next(
        (name for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST") if name in environ), None
    )
    names = expand_nodelist(environ[variable]) if variable else []
    if variable is None or len(names) < 2:
        return []
    restarts = environ.get("SLURM_RESTART_COUNT", "0")
    return [
        _said("rdzv-endpoint", f"{names[0]}:{slurm_port(job, step)}", variable),
        _said("rdzv-id", f"slurm-{job}.{step}-{restarts}", "SLURM_JOB_ID"),
    ]


def _kubernetes(environ: Mapping[str, str]) -> list[Setting]:
    """The pod with index 0 of the Job is where to meet; of a JobSet that of its first Job."""
    index = environ.get("JOB_COMPLETION_INDEX", "")
    job, dash, own = environ.get("HOSTNAME", "").rpartition("-")
    several = re.fullmatch(r"(?:\d+:)?0*([1-9]\d+|[2-9])", environ.get("PET_NNODES", ""))
    if not (job and dash and index.isdecimal() and own == index and several):
        return []
    jobset = environ.get("JOBSET_NAME")
    first = re.sub(r"-\d+$", "-0", job) if jobset else job
    return [
        _said("rdzv-endpoint", f"{first}-0.{jobset or job}:{_PORT}", "HOSTNAME"),
        _setting(environ, "rdzv-id", "JOB_UID", "JOBSET_NAME") or _said("rdzv-id", job, "HOSTNAME"),
        *([] if jobset else [_said("node-rank", index, "JOB_COMPLETION_INDEX")]),
    ]


def _setting(environ: Mapping[str, str], option: str, *variables: str) -> Setting | None:
    """What the first of `variables` that is set says of `option`."""
    for variable in variables:
        if environ.get(variable):
            return _said(option, environ[variable], variable)
    return None


def _said(option: str, text: str, variable: str) -> Setting:
    source = f"{variable} in the environment"
    return Setting(find_option(option, source), text, source)
