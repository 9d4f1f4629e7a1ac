"""README and docs/ name what there is: options, exit codes, public names; and the README's script resumes."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

import launcher
import shardckpt
from launcher.errors import ExitCode
from tests.kit.savers import wait_until

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BIN = Path(sys.executable).parent

_COMMAND = re.compile(r"(?:`|^\$ |^ {4}|^srun .*)((?:launch|shardckpt) [^`#\n]*)", re.MULTILINE)
_OPTION = re.compile(r"(?<![\w-])(--[a-z][a-z-]*)")


def code_blocks(page: Path) -> Iterator[str]:
    return (
        match[1]
        for match in re.finditer(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    )


def help_of(*command: str) -> str:
    return subprocess.check_output([BIN / command[0], *command[1:], "--help"], text=True)


@pytest.fixture(scope="module")
def options() -> dict[str, set[str]]:
    """The options of each command, as its help names them."""
    own = help_of("shardckpt")
    verbs = [
        verb
        for verb in re.findall(r"^  +(\w+)  ", own, re.MULTILINE)
        if verb in own.partition("options:")[0]
    ]
    return {
        "launch": set(_OPTION.findall(help_of("launch"))),
        "shardckpt": set(_OPTION.findall(own)).union(
            *(_OPTION.findall(help_of("shardckpt", v)) for v in verbs)
        ),
    }


def test_commands_have_the_options_that_they_are_shown_with(options: dict[str, set[str]]) -> None:
    """What stands after the script is the script's own."""
    shown = 0
    for page in PAGES:
        for command in _COMMAND.findall(page.read_text()):
            words = re.split(r"\S+\.py\b| -- ", command)[0] if command.startswith("launch") else command
            unknown = set(_OPTION.findall(words)) - options[command.split()[0]]
            assert not unknown, f"{page.name}: {command}"
            shown += 1
    assert shown > 50


def test_every_exit_code_is_documented() -> None:
    page = (ROOT / "docs/exit-codes.md").read_text()
    of_launch, of_shardckpt = page.split("## shardckpt")
    documented = {
        int(code)
        for row in re.findall(r"^\| ([\d, ]+) \|", of_launch, re.MULTILINE)
        for code in row.split(",")
    }
    assert {code.value for code in ExitCode} <= documented
    listed = help_of("shardckpt").partition("exit codes:")[2]
    assert re.findall(r"^  (\d+) ", listed, re.MULTILINE) == re.findall(
        r"^\| (\d+) \|", of_shardckpt, re.MULTILINE
    )


@pytest.mark.parametrize("package", [shardckpt, launcher], ids=lambda package: package.__name__)
def test_the_reference_has_every_public_name(package: object) -> None:
    name = package.__name__  # type: ignore[attr-defined]
    page = (ROOT / f"docs/api/{name}.md").read_text()
    named = set(re.findall(rf"^::: {name}\.(\w+)$", page, re.MULTILINE))
    public = {one for one in package.__all__ if one != "__version__" and not one.endswith("Error")}  # type: ignore[attr-defined]
    assert public - {"ExitCode"} == named - {"errors"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_code_is_python(page: Path) -> None:
    for block in code_blocks(page):
        compile(block, str(page), "exec")


def test_the_script_of_the_readme_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash in the middle of an epoch: it goes on from the last save, with the samples that come next."""
    monkeypatch.setenv("LAUNCH_CKPT_URL", str(tmp_path))
    monkeypatch.setenv("SHARDCKPT_SNAPSHOTS", "0")
    script = next(block for block in code_blocks(ROOT / "README.md") if "Checkpointer" in block)
    seen: list[float] = []

    class Sampler(RandomSampler):
        """In an order that depends on the epoch, as that of a DistributedSampler."""

        def set_epoch(self, epoch: int) -> None:
            self.generator = torch.Generator().manual_seed(epoch)

    def run(crash_at: int | None) -> int:
        data = TensorDataset(torch.arange(40.0))
        model = torch.nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)

        def train_on(batch: list[torch.Tensor]) -> torch.Tensor:
            if len(seen) == crash_at:
                wait_until(lambda: any(tmp_path.glob("attempt-*/step-00000050/manifest.json")))
                raise KeyError("a crash")
            seen.append(batch[0].item())
            loss = model(batch[0][:, None]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss

        names = {
            "model": model,
            "optimizer": optimizer,
            "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 10),
            "sampler": (sampler := Sampler(data)),
            "loader": DataLoader(data, sampler=sampler),
            "epochs": 3,
            "train_on": train_on,
        }
        exec(compile(script, "README.md", "exec"), names)
        return int(names["step"])  # type: ignore[call-overload]

    with pytest.raises(KeyError, match="a crash"):
        run(crash_at=70)
    assert run(crash_at=None) == 120
    del seen[50:70]  # done again
    assert [sorted(seen[epoch * 40 : (epoch + 1) * 40]) for epoch in range(3)] == [list(range(40))] * 3


def test_the_tests_that_ci_runs_twice_are_there() -> None:
    """.ci/run names some for an ordinary user; pytest would refuse a name that a move has made wrong."""
    second = (ROOT / ".ci/run").read_text().partition("scripts/test \\\n")[2].partition("\n        exit")[0]
    found = subprocess.check_output(["bash", "-c", f"ls -d {second}"], cwd=ROOT, text=True).split()
    assert len(found) > 10
