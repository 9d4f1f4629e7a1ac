"""What Slurm and Kubernetes say, read from the environments that they set."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from launcher.cli import parse
from launcher.config.job import Config
from launcher.config.schedulers import expand_nodelist, settings_from_scheduler, slurm_port
from launcher.errors import ExitCode, UsageError

SLURM: Mapping[str, Mapping[str, str]] = json.loads(
    (Path(__file__).parent / "environs/slurm.json").read_text()
)
"""Recorded in steps and scripts of Slurm 22.05."""

CONFIGS = Path(__file__).parents[3] / "configs"

JOB = {"JOB_COMPLETION_INDEX": "3", "HOSTNAME": "train-3", "PET_NNODES": "4"}
JOBSET = {**JOB, "HOSTNAME": "big-run-nodes-0-3", "JOBSET_NAME": "big-run", "JOB_UID": "7d1f"}


def said(environ: Mapping[str, str]) -> dict[str, str]:
    return {setting.option.name: setting.text for setting in settings_from_scheduler(environ)}


def configure(monkeypatch: pytest.MonkeyPatch, environ: Mapping[str, str], *argv: str) -> Config:
    """The job that `launch *argv train.py` would be in `environ`."""
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    return parse([*argv, __file__], gpus=0)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "step of 2 nodes",
            {"nnodes": "2", "node-rank": "1", "rdzv-endpoint": "n1:20031", "rdzv-id": "slurm-1.0-0"},
        ),
        (
            "step of a batch script of 3 nodes",
            {"nnodes": "3", "node-rank": "2", "rdzv-endpoint": "n1:20124", "rdzv-id": "slurm-4.0-0"},
        ),
        (
            "step on 2 of 3 nodes",
            {"nnodes": "2", "node-rank": "1", "rdzv-endpoint": "n1:20125", "rdzv-id": "slurm-4.1-0"},
        ),
        ("step on 1 of 3 nodes", {"nnodes": "1", "node-rank": "0"}),
        ("batch script of 3 nodes", {}),
        ("salloc of 2 nodes", {}),
        (
            "step with 4 GPUs per node, requeued once",
            {
                "nproc": "4",
                "nnodes": "2",
                "node-rank": "1",
                "rdzv-endpoint": "n1:20031",
                "rdzv-id": "slurm-1.0-1",
            },
        ),
        (
            "step with 2 of 4 GPUs per node",
            {
                "nproc": "2",
                "nnodes": "2",
                "node-rank": "1",
                "rdzv-endpoint": "n1:20032",
                "rdzv-id": "slurm-1.1-1",
            },
        ),
    ],
)
def test_slurm(name: str, expected: dict[str, str]) -> None:
    assert said(SLURM[name]) == expected


@pytest.mark.parametrize("name", ["step of 2 nodes, 2 tasks on each", "step of 3 nodes, uneven tasks"])
def test_several_tasks_on_a_node_are_refused(name: str) -> None:
    """Each of them would start all workers of its node."""
    with pytest.raises(UsageError, match=r"SLURM_STEP_TASKS_PER_NODE .* found .*--ntasks-per-node=1"):
        settings_from_scheduler(SLURM[name])


def test_a_shell_of_salloc_is_no_step() -> None:
    """Newer versions give it a number, and its variables are those of the whole job."""
    assert said({**SLURM["step of 2 nodes"], "SLURM_STEP_ID": str(0xFFFFFFFA)}) == {}


def test_no_scheduler_says_nothing() -> None:
    assert said({"HOSTNAME": "desk-3", "PET_NNODES": "4"}) == {}


def test_a_step_of_slurm_is_a_job_of_several_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    config = configure(monkeypatch, SLURM["step with 4 GPUs per node, requeued once"])
    assert (config.nproc, config.nnodes, config.is_alone) == (4, (2, 2), False)
    assert (config.rdzv_backend, config.rdzv_endpoint) == ("c10d", ("n1", 20031))
    assert config.run_id == "slurm-1.0-1"


@pytest.mark.parametrize(
    "argv",
    [
        ["--nnodes", "1"],
        ["--standalone"],
        ["--nnodes=1:1", "--node-rank=0"],
    ],
)
def test_one_node_in_a_step_of_several(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Who says so does not get the scheduler's endpoint, which is another node's address."""
    config = configure(monkeypatch, SLURM["step of 2 nodes"], *argv)
    assert (config.is_alone, config.master_addr, config.master_port) == (True, "127.0.0.1", 0)


@pytest.mark.parametrize(
    ("argv", "backend", "endpoint", "nnodes", "rank"),
    [
        (["--nnodes", "1:2"], "c10d", ("n1", 20031), (1, 2), 1),
        (["--rdzv-endpoint", "h:5"], "c10d", ("h", 5), (2, 2), 1),
        (["--rdzv-backend", "static"], "static", ("n1", 20031), (2, 2), 1),
        (["--master-addr", "h"], "static", ("h", 29500), (2, 2), 1),
        (["--master-addr", "h", "--master-port=7", "--node-rank=0"], "static", ("h", 7), (2, 2), 0),
        (["--rdzv-backend=etcd-v2", "--rdzv-endpoint=h"], "etcd-v2", ("h", 2379), (2, 2), 1),
    ],
)
def test_flags_beat_slurm(
    argv: list[str],
    backend: str,
    endpoint: tuple[str, int],
    nnodes: tuple[int, int],
    rank: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where they say with other options than Slurm where to meet."""
    config = configure(monkeypatch, SLURM["step of 2 nodes"], *argv)
    assert (config.rdzv_backend, config.rdzv_endpoint) == (backend, endpoint)
    assert (config.nnodes, config.node_rank) == (nnodes, rank)


def test_the_file_beats_slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("nproc: 3\nrdzv-id: mine\n")
    config = configure(
        monkeypatch,
        SLURM["step with 4 GPUs per node, requeued once"],
        "--config",
        str(tmp_path / "c.yaml"),
    )
    assert (config.nproc, config.rdzv_id, config.nnodes) == (3, "mine", (2, 2))


def test_an_indexed_job(monkeypatch: pytest.MonkeyPatch) -> None:
    config = configure(monkeypatch, JOB)
    assert (config.nnodes, config.rdzv_endpoint) == ((4, 4), ("train-0.train", 29400))
    assert (config.rdzv_backend, config.rdzv_id, config.node_rank) == ("c10d", "train", 3)


def test_a_jobset(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first pod is the first of its first Job."""
    config = configure(monkeypatch, JOBSET | {"HOSTNAME": "big-run-nodes-1-3", "PET_NNODES": "2:8"})
    assert (config.nnodes, config.rdzv_endpoint) == ((2, 8), ("big-run-nodes-0-0.big-run", 29400))
    assert config.rdzv_id == "7d1f"


@pytest.mark.parametrize(
    "change",
    [{"PET_NNODES": "1"}, {"PET_NNODES": ""}, {"JOB_COMPLETION_INDEX": "2"}, {"HOSTNAME": "node7"}],
)
def test_other_pods_are_not_asked(change: dict[str, str]) -> None:
    """One pod alone, and a pod in its host's network: its name says nothing of others."""
    assert said(JOB | change) == {}


def manifest(name: str) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """The documents in a file by kind, and what it says of the Job."""
    documents = {one["kind"]: one for one in yaml.safe_load_all((CONFIGS / name).read_text())}
    if "Job" in documents:
        return documents, documents["Job"]["spec"]
    (replicated,) = documents["JobSet"]["spec"]["replicatedJobs"]
    assert replicated["replicas"] == 1
    return documents, replicated["template"]["spec"]


def environ_of_pod(documents: Mapping[str, dict[str, Any]], spec: Mapping[str, Any]) -> dict[str, str]:
    """What Kubernetes sets in the last pod of the Job, which has the labels that controllers set."""
    if "Job" in documents:
        job = documents["Job"]["metadata"]["name"]
        labels = {"batch.kubernetes.io/job-name": job, "batch.kubernetes.io/controller-uid": "u-1"}
    else:
        jobset = documents["JobSet"]["metadata"]["name"]
        job = f"{jobset}-{documents['JobSet']['spec']['replicatedJobs'][0]['name']}-0"
        labels = {"jobset.sigs.k8s.io/jobset-name": jobset, "jobset.sigs.k8s.io/jobset-uid": "u-1"}
    environ = {"JOB_COMPLETION_INDEX": str(spec["completions"] - 1)}
    environ["HOSTNAME"] = f"{job}-{environ['JOB_COMPLETION_INDEX']}"
    for variable in spec["template"]["spec"]["containers"][0]["env"]:
        if "secretKeyRef" in variable.get("valueFrom", {}):
            continue  # optional, and no such Secret is there
        path = variable.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath", "")
        key = path.removeprefix("metadata.labels['").removesuffix("']")
        environ[variable["name"]] = variable["value"] if "value" in variable else labels[key]
    return environ


@pytest.mark.parametrize(
    ("name", "first"), [("job.yaml", "train-0.train"), ("jobset.yaml", "train-nodes-0-0.train")]
)
def test_pods_of_the_manifests_meet(name: str, first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    documents, spec = manifest(name)
    (container,) = spec["template"]["spec"]["containers"]
    options = [argument for argument in container["args"] if argument.startswith("--")]
    config = configure(monkeypatch, environ_of_pod(documents, spec), *options)
    assert config.nnodes == (spec["parallelism"],) * 2 == (spec["completions"],) * 2
    assert (config.rdzv_endpoint, config.rdzv_id) == ((first, 29400), "u-1")
    assert config.grace < spec["template"]["spec"]["terminationGracePeriodSeconds"]


def test_the_name_of_the_first_pod_is_the_services() -> None:
    documents, spec = manifest("job.yaml")
    service = documents["Service"]
    assert service["metadata"]["name"] == documents["Job"]["metadata"]["name"]
    assert service["metadata"]["name"] == spec["template"]["spec"]["subdomain"]
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": service["metadata"]["name"]}
    assert (service["spec"]["clusterIP"], service["spec"]["publishNotReadyAddresses"]) == ("None", True)


@pytest.mark.parametrize("name", ["job.yaml", "jobset.yaml"])
def test_the_manifests_know_the_exit_codes(name: str) -> None:
    """Saved and left is no failure; what would only fail again is not tried again."""
    _, spec = manifest(name)
    pod = spec["template"]["spec"]
    rules = [rule for rule in spec["podFailurePolicy"]["rules"] if "onExitCodes" in rule]
    said = {code: rule["action"] for rule in rules for code in rule["onExitCodes"]["values"]}
    assert said.pop(ExitCode.PREEMPTED) == "Ignore"
    final = {ExitCode.BAD_USAGE, ExitCode.CRASH_LOOP, ExitCode.NOT_EXECUTABLE, ExitCode.NOT_FOUND}
    assert said == dict.fromkeys(final, "FailJob")
    assert {rule["onExitCodes"]["containerName"] for rule in rules} == {pod["containers"][0]["name"]}
    assert pod["restartPolicy"] == "Never"
    assert {"/dev/shm"} <= {mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}


@pytest.mark.parametrize(
    ("nodelist", "expected"),
    [
        ("n1", ["n1"]),
        ("n[1-3]", ["n1", "n2", "n3"]),
        ("n[01-03,7],m5", ["n01", "n02", "n03", "n7", "m5"]),
        ("n[098-101]", ["n098", "n099", "n100", "n101"]),
        ("a-1,b[2]-ib,c.d.e", ["a-1", "b2-ib", "c.d.e"]),
        ("r[1-2]n[0,08-09]", ["r1n0", "r1n08", "r1n09", "r2n0", "r2n08", "r2n09"]),
    ],
)
def test_hosts(nodelist: str, expected: list[str]) -> None:
    assert expand_nodelist(nodelist) == expected


spans = st.tuples(st.integers(0, 200), st.integers(0, 12), st.integers(1, 4))
prefixes = st.from_regex(r"[a-z][a-z0-9-]{0,5}[a-z]", fullmatch=True)


@given(st.lists(st.tuples(prefixes, st.lists(spans, min_size=1, max_size=4)), min_size=1, max_size=4))
def test_hosts_of_any_list(groups: list[tuple[str, list[tuple[int, int, int]]]]) -> None:
    """Folding names as Slurm does and expanding them again gives the same names in the same order."""
    folded, names = [], []
    for prefix, ranges in groups:
        texts = []
        for first, count, width in ranges:
            texts.append(
                f"{first:0{width}}-{first + count:0{max(width, len(str(first)))}}"
                if count
                else f"{first:0{width}}"
            )
            names += [
                f"{prefix}{number:0{max(width, len(str(first)))}}"
                for number in range(first, first + count + 1)
            ]
        folded.append(f"{prefix}[{','.join(texts)}]")
    assert expand_nodelist(",".join(folded)) == names


@given(st.integers(1, 2**31), st.integers(0, 30))
def test_ports_of_near_jobs_differ(job: int, step: int) -> None:
    port = slurm_port(job, step)
    assert 20000 <= port < 30000
    assert port != slurm_port(job + 1, step)
    assert step == 0 or port != slurm_port(job, step - 1)
