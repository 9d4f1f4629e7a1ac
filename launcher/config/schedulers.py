"""The settings of a job that Slurm or Kubernetes puts into the environment. Pure.

Slurm's variables are used in a job step only, where every node runs one `launch` (`srun launch train.py`). In
the batch script itself `launch` runs a job of one node. Kubernetes' variables are used in the pods of an indexed
Job or a JobSet that sets PET_NNODES. Details: docs/schedulers.md.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from launcher.config.options import Setting, find_option
from launcher.errors import UsageError

__all__ = ["expand_nodelist", "settings_from_scheduler", "slurm_port"]

_PORT = 29400  # c10d's own
_SPECIAL_STEPS = 0xFFFFFFF0  # steps from this number on are shells of salloc and sbatch


def settings_from_scheduler(environ: Mapping[str, str] = os.environ) -> list[Setting]:
    """The settings for nodes, workers and rendezvous; none outside Slurm and Kubernetes.

    Raises `UsageError` if Slurm starts more than one `launch` per node, as each starts all workers.
    """
    return _slurm(environ) or _kubernetes(environ)


def expand_nodelist(nodelist: str) -> list[str]:
    """The host names in a list of Slurm's.

    >>> expand_nodelist("n[01-03,7],m5")
    ['n01', 'n02', 'n03', 'n7', 'm5']
    """
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
    """The port of the rendezvous of a step: the same on all nodes, different for jobs of similar numbers."""
    return 20000 + (31 * job + step) % 10000


def _slurm(environ: Mapping[str, str]) -> list[Setting]:
    step = environ.get("SLURM_STEP_ID", "")
    if not step.isdecimal() or int(step) >= _SPECIAL_STEPS:
        return []
    _check_tasks(environ.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    settings = [
        _setting(environ, "nproc", "SLURM_GPUS_ON_NODE"),
        _setting(environ, "nnodes", "SLURM_STEP_NUM_NODES", "SLURM_NNODES"),
        _setting(environ, "node-rank", "SLURM_NODEID"),
        *_slurm_rendezvous(environ, int(environ.get("SLURM_JOB_ID", "0")), int(step)),
    ]
    return [setting for setting in settings if setting is not None]


def _check_tasks(tasks: str) -> None:
    """Raise `UsageError` unless each node has one task; `tasks` is as Slurm has it, such as "2(x3),1"."""
    if any(int(number) > 1 for number in re.findall(r"(?:^|,)(\d+)", tasks)):
        raise UsageError(
            f"SLURM_STEP_TASKS_PER_NODE in the environment: expected 1 on each node, found {tasks}: one launch "
            f"starts all workers of its node: srun --ntasks-per-node=1"
        )


def _slurm_rendezvous(environ: Mapping[str, str], job: int, step: int) -> list[Setting]:
    """Endpoint and id of the rendezvous of several nodes; another id after each requeue."""
    variable = next(
        (name for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST") if name in environ), None
    )
    names = expand_nodelist(environ[variable]) if variable else []
    if variable is None or len(names) < 2:
        return []
    restarts = environ.get("SLURM_RESTART_COUNT", "0")
    return [
        _set_by("rdzv-endpoint", f"{names[0]}:{slurm_port(job, step)}", variable),
        _set_by("rdzv-id", f"slurm-{job}.{step}-{restarts}", "SLURM_JOB_ID"),
    ]


def _kubernetes(environ: Mapping[str, str]) -> list[Setting]:
    """The endpoint is the pod with index 0 of the Job, or of the first Job of a JobSet."""
    index = environ.get("JOB_COMPLETION_INDEX", "")
    job, dash, own = environ.get("HOSTNAME", "").rpartition("-")
    several = re.fullmatch(r"(?:\d+:)?0*([1-9]\d+|[2-9])", environ.get("PET_NNODES", ""))
    if not (job and dash and index.isdecimal() and own == index and several):
        return []
    jobset = environ.get("JOBSET_NAME")
    first = re.sub(r"-\d+$", "-0", job) if jobset else job
    return [
        _set_by("rdzv-endpoint", f"{first}-0.{jobset or job}:{_PORT}", "HOSTNAME"),
        _setting(environ, "rdzv-id", "JOB_UID", "JOBSET_NAME") or _set_by("rdzv-id", job, "HOSTNAME"),
        *([] if jobset else [_set_by("node-rank", index, "JOB_COMPLETION_INDEX")]),
    ]


def _setting(environ: Mapping[str, str], option: str, *variables: str) -> Setting | None:
    """The setting of `option` by the first of `variables` that is set."""
    for variable in variables:
        if environ.get(variable):
            return _set_by(option, environ[variable], variable)
    return None


def _set_by(option: str, text: str, variable: str) -> Setting:
    source = f"{variable} in the environment"
    return Setting(find_option(option, source), text, source)
