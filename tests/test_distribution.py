"""The wheel and the sdist: built, installed where the checkout is not, and used by the commands."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("launcher", "shardckpt")

JOB = '''
"""Saves one step of a bfloat16 tensor of which each rank has its own rows, and restores it."""
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import shardckpt

dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (dist.get_world_size(),))
rows = torch.arange(8, dtype=torch.bfloat16).reshape(4, 2)
state = {"w": distribute_tensor(rows, mesh, [Shard(0)]), "epoch": 3}
with shardckpt.Checkpointer(every_steps=1) as checkpoints:
    checkpoints.step(1, state)
with shardckpt.Checkpointer() as checkpoints:
    state = {"w": distribute_tensor(torch.zeros_like(rows), mesh, [Shard(0)]), "epoch": 0}
    assert checkpoints.restore(state).step == 1 and state["epoch"] == 3
    assert torch.equal(state["w"].full_tensor(), rows)
dist.destroy_process_group()
'''

ZARR = """
import sys, zarr
w = zarr.open("reference::" + sys.argv[1], mode="r")["w"]
assert "torch" not in sys.modules
print(w.dtype, w[:].astype("float32").tolist())
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT]
    subprocess.run(build, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin/ of an environment with the wheel, which finds all that it depends on in this one."""
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin/python"
    (site,) = folder.glob("lib/python*/site-packages")
    # A path in a .pth file is searched, but its own .pth files, as that of the editable project, are not read.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    install = [
        "--python",
        python,
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--ignore-installed",
        wheel,
    ]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True)
    where = "import launcher, shardckpt; print(launcher.__file__, shardckpt.__file__)"
    for path in output(python, "-P", "-c", where, cwd=folder).split():
        assert Path(path).is_relative_to(site)
    return python.parent


def output(*command: object, cwd: Path) -> str:
    """What a command prints that runs in `cwd` and cannot find the checkout by the environment."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=env, check=True, stdout=subprocess.PIPE, text=True
    )
    return done.stdout


def files_of(package: str) -> set[str]:
    """The package's files in the checkout, as paths in a wheel."""
    found = (
        path for path in (ROOT / package).rglob("*") if path.is_file() and "__pycache__" not in path.parts
    )
    return {path.relative_to(ROOT).as_posix() for path in found}


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return message_from_bytes(archive.read(name))


def test_the_wheel_has_every_file_of_both_packages_and_nothing_else(wheel: Path) -> None:
    """With py.typed, the zygote's hook, the licence and the commands."""
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        info = {name.partition(".dist-info/")[2] for name in archive.namelist()} - {""}
    assert names == {"cgroup_memory.py"}.union(*(files_of(package) for package in PACKAGES))
    assert {f"{package}/py.typed" for package in PACKAGES} <= names
    assert "launcher/zygote/hook/sitecustomize.py" in names
    assert {"METADATA", "entry_points.txt", "licenses/LICENSE"} <= info


def test_the_sdist_has_what_the_scripts_and_tests_need(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"README.md", "CHANGELOG.md", "LICENSE", "constraints.txt", "scripts/train.py"} <= names
    assert {"docs/format.md", "tests/test_distribution.py", "configs/job.yaml"} <= names
    assert not any(name.startswith((".venv", "runs", "dist")) for name in names)


def test_metadata_is_complete_for_an_index(wheel: Path) -> None:
    found = metadata(wheel)
    assert found["Name"] == "shardckpt" and found["Summary"] and found["Keywords"]
    assert found["License-Expression"] == "Apache-2.0"
    assert found["Requires-Python"] == ">=3.11"
    assert found["Description-Content-Type"] == "text/markdown"
    classifiers = found.get_all("Classifier") or []
    assert {"Typing :: Typed", "Operating System :: POSIX :: Linux"} <= set(classifiers)
    assert set(found.get_all("Provides-Extra") or []) >= {"metrics", "test", "docs", "dev"}


def test_the_installed_commands_work_without_the_checkout(installed: Path, tmp_path: Path) -> None:
    """A job of two ranks saves and restores; its checkpoint is listed, verified, and read by plain Zarr."""
    version = output(installed / "launch", "--version", cwd=tmp_path).split()[-1]
    assert version in output(installed / "shardckpt", "--version", cwd=tmp_path)
    assert "verify" in output(installed / "shardckpt", "--help", cwd=tmp_path)

    (tmp_path / "job.py").write_text(JOB)
    output(installed / "launch", "--nproc", 2, "--run-dir", "run", "job.py", cwd=tmp_path)

    (checkpoint,) = (tmp_path / "run/checkpoints").glob("attempt-*/step-00000001")
    assert "good" in output(installed / "shardckpt", "ls", "run/checkpoints", cwd=tmp_path)
    output(installed / "shardckpt", "verify", checkpoint, cwd=tmp_path)
    read = output(installed / "python", "-P", "-c", ZARR, checkpoint / "refs.json", cwd=tmp_path)
    assert read == "bfloat16 [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0], [6.0, 7.0]]\n"
