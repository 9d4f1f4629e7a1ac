"""The worker contract: the document's tables, and a worker's environment as `launch` makes it."""

from __future__ import annotations

import re
from pathlib import Path

from launcher.agent.worker_env import worker_orders
from launcher.config.command import Command, Kind
from launcher.config.job import Config
from launcher.rendezvous.team import RankAssignment
from launcher.round.restart import History
from launcher.run_dir import RankFiles
from launcher.zygote.orders import shared_environment

__all__ = ["DOCUMENT", "section", "table", "worker_environments"]

DOCUMENT = Path(__file__).parents[2] / "docs/worker-contract.md"


def section(title: str, document: Path = DOCUMENT) -> str:
    """The text below a heading, up to the next one."""
    match = re.search(rf"^##+ {re.escape(title)}\n(.*?)(?=^##|\Z)", document.read_text(), re.M | re.S)
    assert match is not None, title
    return match[1]


def table(title: str, document: Path = DOCUMENT) -> dict[str, str]:
    """First cell -> the rest of each row of the tables in a section, without backticks around the first cell."""
    rows = re.findall(r"^\| (.+?) \| (.+) \|$", section(title, document), re.M)
    return {first.strip("`"): rest for first, rest in rows if not set(first) <= set("-| ")}


def worker_environments(
    run_dir: Path, *, saver: str = "launch-saver-1", workers: int = 2, config: Config | None = None
) -> list[dict[str, str]]:
    """What each worker of a round on one node finds in its environment, beside what `launch` was started with."""
    config = config or Config(command=Command(Kind.SCRIPT, __file__), nproc=workers, run_dir=run_dir)
    slots = tuple(range(config.nproc))
    plan = RankAssignment(1, 0, (len(slots),), slots, "127.0.0.1", 29500)
    files = []
    for rank in plan.ranks:
        directory = run_dir / f"ranks/rank-{rank:05d}"
        logs = run_dir / "logs/round-0001"
        files.append(RankFiles(rank, logs / "out", logs / "err", logs / "error.json", directory))
    orders = worker_orders(config, plan, History(), files, saver=saver, drain=run_dir / "drain")
    return [{**shared_environment(config, {}), **order.environment} for order in orders]
