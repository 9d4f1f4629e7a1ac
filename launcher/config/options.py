"""The options of `launch`: names, parsers and help, and why some of torchrun's are refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from launcher.config import parsers
from launcher.errors import UsageError

__all__ = ["OPTIONS", "Option", "Setting", "find_option", "parse_setting"]


@dataclass(frozen=True)
class Option:
    """One option of the command line and the configuration file.

    Args:
        name: with dashes.
        parse: from its text to its value; raises ValueError with what it expects.
        help: its line in `launch --help`.
        metavar: its value there; empty: it is a switch.
        group: its section there; empty: it is not listed.
        aliases: other names.
        short: its letter.
        torchrun: true if torchrun has it: then PET_<NAME> in the environment sets it too.
        refusal: why it is never accepted, and what to do instead.
    """

    name: str
    parse: Callable[[str], object]
    help: str
    metavar: str = ""
    group: str = ""
    aliases: tuple[str, ...] = ()
    short: str = ""
    torchrun: bool = False
    refusal: str = ""

    @property
    def is_switch(self) -> bool:
        return not self.metavar

    @property
    def key(self) -> str:
        return self.name.replace("-", "_")


@dataclass(frozen=True)
class Setting:
    """The text that one source has for one option; `source` is its name in messages."""

    option: Option
    text: str
    source: str


def find_option(name: str, source: str) -> Option:
    """The option with a name, in dashes or underscores. Raises `UsageError` with the nearest name."""
    wanted = name.replace("_", "-")
    option = _BY_NAME.get(wanted)
    if option is None:
        import difflib  # only a mistake needs it

        near = difflib.get_close_matches(wanted, list(_BY_NAME), n=1, cutoff=0.7)
        dashes = "--" if source.startswith("-") else ""
        hint = f"did you mean {dashes}{near[0]}?" if near else "`launch --help` lists the options"
        named = "" if source.lstrip("-") == name else f" {name}"  # a line of a file does not say it
        raise UsageError(f"{source}: unknown option{named}: {hint}")
    return option


def parse_setting(setting: Setting, gpus: int) -> object:
    """The value of a setting, on a node with so many GPUs.

    Raises `UsageError` with the source, what is expected, and what was found.
    """
    option = setting.option
    if option.refusal:
        raise UsageError(f"{setting.source} is not supported by launch: {option.refusal}")
    try:
        value = option.parse(setting.text)
        return value.count(gpus) if isinstance(value, parsers.WorkerRange) else value
    except ValueError as error:
        raise UsageError(f"{setting.source}: expected {error}, found {setting.text!r}") from None


_JOB = "Job"
_NODES = "Nodes"
_OUTPUT = "Output"
_TORCHRUN = "torchrun's spellings"

OPTIONS: tuple[Option, ...] = (
    Option(
        "nproc",
        parsers.worker_range,
        "workers per node (default 1); auto: GPUs, or else CPUs; MIN:MAX: go on with fewer if need be",
        "N|auto|gpu|cpu|MIN:MAX",
        _JOB,
        aliases=("nproc-per-node",),
        torchrun=True,
    ),
    Option(
        "max-restarts",
        parsers.whole(0, "a number of restarts, 0 or more"),
        "restarts without progress before the job fails (default 3); progress gives them all back",
        "N",
        _JOB,
        torchrun=True,
    ),
    Option(
        "crash-loop",
        parsers.whole(0, "a number of failures, 0 or more"),
        "the same failure at the same step this many times ends the job (default 3); 0: never",
        "N",
        _JOB,
    ),
    Option(
        "hang-timeout",
        parsers.seconds,
        "restart if a rank neither makes a step (Checkpointer.step, launcher.report) nor restores for this long, "
        "or for three times as long before its first step; 0: off (default: only dump stacks, after 600)",
        "SECONDS",
        _JOB,
    ),
    Option(
        "grace",
        parsers.seconds,
        "time for stopped workers to end, and for a preempted job to save and end (default 15)",
        "SECONDS",
        _JOB,
        aliases=("shutdown-timeout",),
        torchrun=True,
    ),
    Option(
        "drain-timeout",
        parsers.seconds,
        "time for saves to become durable after the workers have ended (default 300); 0: do not wait",
        "SECONDS",
        _JOB,
    ),
    Option(
        "run-dir",
        parsers.text,
        "logs, per-rank directories, verdicts (default runs/<script>); starting again in it resumes",
        "DIR",
        _JOB,
    ),
    Option(
        "ckpt",
        parsers.storage_url,
        "folder or URL of the run's checkpoints (default RUN_DIR/checkpoints)",
        "URL",
        _JOB,
    ),
    Option(
        "preload",
        parsers.modules,
        "modules to import once for all workers, besides torch: faster starts and restarts",
        "MODULES",
        _JOB,
    ),
    Option("cold", parsers.switch, "start every worker as a fresh interpreter", "", _JOB),
    Option("config", parsers.text, "read options from a YAML file; flags beat it", "FILE", _JOB),
    Option("help", parsers.switch, "show this help", "", _JOB, short="h"),
    Option("version", parsers.switch, "show the version", "", _JOB),
    Option(
        "nnodes",
        parsers.nnodes,
        "nodes (default 1); MIN:MAX: go on when nodes are lost, and let new ones join",
        "N|MIN:MAX",
        _NODES,
        torchrun=True,
    ),
    Option(
        "rdzv-endpoint",
        parsers.endpoint,
        "where nodes meet, the same on all (c10d's PORT: 29400); for one node, MASTER_ADDR, MASTER_PORT",
        "HOST[:PORT]",
        _NODES,
        torchrun=True,
    ),
    Option(
        "rdzv-backend",
        parsers.one_of(*parsers.RDZV_CONF),
        "how they meet: c10d (default), with a store on the node at the endpoint; etcd-v2, etcd, static",
        "NAME",
        _NODES,
        torchrun=True,
    ),
    Option(
        "rdzv-id",
        parsers.text,
        "the job's name, the same on all nodes (default none); TORCHELASTIC_RUN_ID",
        "ID",
        _NODES,
        torchrun=True,
    ),
    Option(
        "rdzv-conf",
        parsers.rdzv_conf,
        "how nodes wait for each other, in torch's keys: join_timeout=600,last_call_timeout=30; secret=FILE",
        "KEY=VALUE,…",
        _NODES,
        torchrun=True,
    ),
    Option(
        "local-addr",
        parsers.text,
        "the address at which other nodes reach this one (default: its name)",
        "HOST",
        _NODES,
        torchrun=True,
    ),
    Option(
        "node-rank",
        parsers.whole(0, "a node's number from 0"),
        "static: this node's number, from 0",
        "N",
        _NODES,
        torchrun=True,
    ),
    Option(
        "master-addr",
        parsers.text,
        "static: host of the endpoint; for one node, MASTER_ADDR (default 127.0.0.1)",
        "HOST",
        _NODES,
        torchrun=True,
    ),
    Option(
        "master-port",
        parsers.port,
        "static: port of the endpoint (default 29500); for one node, MASTER_PORT (default: a free one)",
        "PORT",
        _NODES,
        torchrun=True,
    ),
    Option(
        "standalone",
        parsers.switch,
        "one node, also within a scheduler's job of several",
        "",
        _NODES,
        torchrun=True,
    ),
    Option(
        "log-dir",
        parsers.text,
        "where the rounds' log files go (default RUN_DIR/logs)",
        "DIR",
        _OUTPUT,
        torchrun=True,
    ),
    Option(
        "redirects",
        parsers.streams,
        "streams that go to the log files only: 1 stdout, 2 stderr, 3 both, or RANK:N,…",
        "STREAMS",
        _OUTPUT,
        short="r",
        torchrun=True,
    ),
    Option(
        "tee",
        parsers.streams,
        "streams that go to the log files and here, as all do by default; beats --redirects",
        "STREAMS",
        _OUTPUT,
        short="t",
        torchrun=True,
    ),
    Option(
        "local-ranks-filter",
        parsers.ranks,
        "show only these ranks here; the log files keep all",
        "RANKS",
        _OUTPUT,
        torchrun=True,
    ),
    Option("quiet", parsers.switch, "print only errors and the workers' output", "", _OUTPUT),
    Option(
        "log-level",
        parsers.one_of("debug", "info", "warning", "error"),
        "messages to print: debug (every event), info, warning or error (default info)",
        "LEVEL",
        _OUTPUT,
    ),
    Option(
        "metrics-port",
        parsers.port,
        "serve Prometheus metrics at this port, to all hosts that can reach it (default: none)",
        "PORT",
        _OUTPUT,
    ),
    Option("module", parsers.switch, "run a module, as python -m", "", _TORCHRUN, short="m", torchrun=True),
    Option("no-python", parsers.switch, "run a command, as after --", "", _TORCHRUN, torchrun=True),
    Option("run-path", parsers.switch, "run a script, as launch does anyway", "", _TORCHRUN, torchrun=True),
    Option("role", parsers.text, "ROLE_NAME (default: default)", "NAME", _TORCHRUN, torchrun=True),
    Option(
        "monitor-interval",
        parsers.seconds,
        "ignored: a death is seen at once",
        "SECONDS",
        _TORCHRUN,
        torchrun=True,
    ),
    Option(
        "start-method",
        parsers.one_of("spawn", "fork", "forkserver"),
        "ignored: of no effect on scripts, as in torchrun",
        "NAME",
        _TORCHRUN,
        torchrun=True,
    ),
    Option(
        "signals-to-handle",
        parsers.stop_signals,
        "torchrun's default, with or without SIGUSR1: what launch does anyway",
        "SIGNALS",
        _TORCHRUN,
        torchrun=True,
    ),
    Option("event-log-handler", parsers.one_of("null"), "null only", "NAME", _TORCHRUN, torchrun=True),
    Option(
        "duplicate-stdout-filters",
        parsers.nothing,
        "",
        "FILTERS",
        torchrun=True,
        refusal="every rank's stdout is a file in RUN_DIR/logs: grep that",
    ),
    Option(
        "duplicate-stderr-filters",
        parsers.nothing,
        "",
        "FILTERS",
        torchrun=True,
        refusal="every rank's stderr is a file in RUN_DIR/logs: grep that",
    ),
    Option(
        "logs-specs",
        parsers.nothing,
        "",
        "NAME",
        refusal="there are no log plugins: read the files in RUN_DIR/logs",
    ),
    Option(
        "numa-binding",
        parsers.nothing,
        "",
        "MODE",
        refusal="bind from outside (numactl launch …): workers inherit launch's CPUs and memory",
    ),
    Option(
        "virtual-local-rank",
        parsers.nothing,
        "",
        torchrun=True,
        refusal="set the device from LOCAL_RANK in the script: torch.cuda.set_device",
    ),
)

_BY_NAME: dict[str, Option] = {
    name: option for option in OPTIONS for name in (option.name, *option.aliases)
}
