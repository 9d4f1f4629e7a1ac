"""The options of `launch`: their names, how each is read, and why some of torchrun's are refused."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from .devices import count_cpus, count_gpus
from .errors import UsageError

__all__ = ["OPTIONS", "Option", "Setting", "find", "read"]


@dataclass(frozen=True)
class Option:
    """One option. `parse` turns its text into a value, or raises ValueError saying what it expects."""

    name: str
    parse: Callable[[str], object]
    help: str
    metavar: str = ""  # none: a switch
    group: str = ""
    aliases: tuple[str, ...] = ()
    short: str = ""
    torchrun: bool = False  # then PET_<NAME> in the environment sets it too
    refusal: str = ""  # why it is never accepted, and what to do instead

    @property
    def is_switch(self) -> bool:
        return not self.metavar

    @property
    def key(self) -> str:
        return self.name.replace("-", "_")


@dataclass(frozen=True)
class Setting:
    """The text that one source gives for one option. `source` is how messages name it."""

    option: Option
    text: str
    source: str


def find(name: str, source: str) -> Option:
    """The option called `name` (dashes or underscores). Raises `UsageError` with the nearest name."""
    wanted = name.replace("_", "-")
    option = _BY_NAME.get(wanted)
    if option is None:
        import difflib  # only a mistake needs it

        near = difflib.get_close_matches(wanted, list(_BY_NAME), n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else "`launch --help` lists the options"
        raise UsageError(f"{source}: unknown option {name}: {hint}")
    return option


def read(setting: Setting) -> object:
    """The value of a setting. Raises `UsageError` that names the source, what it expects and found."""
    option = setting.option
    if option.refusal:
        raise UsageError(f"{setting.source} is not supported by launch: {option.refusal}")
    try:
        return option.parse(setting.text)
    except ValueError as error:
        raise UsageError(f"{setting.source}: expected {error}, found {setting.text!r}") from None


def _whole(minimum: int, what: str) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"[+-]?\d+", text.strip()) or int(text) < minimum:
            raise ValueError(what)
        return int(text)

    return parse


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise ValueError("a number of seconds, 0 or more")
    return value


def _switch(text: str) -> bool:
    words = {"true": True, "yes": True, "on": True, "1": True}
    words |= {"false": False, "no": False, "off": False, "0": False}
    if text.lower() not in words:
        raise ValueError("true or false")
    return words[text.lower()]


def _text(text: str) -> str:
    if not text:
        raise ValueError("some text")
    return text


def _one_of(*choices: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(" or ".join(choices))
        return text

    return parse


def _nproc(text: str) -> int:
    if text == "cpu":
        return count_cpus()
    if text in ("gpu", "auto"):
        gpus = count_gpus()
        if text == "gpu" and not gpus:
            raise ValueError("a node with GPUs that torch can use, or --nproc N, or --nproc cpu")
        return gpus or count_cpus()
    return _whole(1, "a number of workers of at least 1, or auto, gpu or cpu")(text)


def _modules(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not all(part.isidentifier() for name in names for part in name.split(".")):
        raise ValueError("module names separated by commas")
    return names


def _ranks(text: str) -> frozenset[int] | None:
    if not re.fullmatch(r"(\d+(,\d+)*)?", text):
        raise ValueError("ranks separated by commas, as 0,1")
    return frozenset(map(int, text.split(","))) if text else None


def _streams(text: str) -> Mapping[int | None, int]:
    """torchrun's bit mask (1 stdout, 2 stderr) for every rank (key None), or rank by rank."""
    if re.fullmatch(r"[0-3]", text):
        return {None: int(text)}
    if not re.fullmatch(r"\d+:[0-3](,\d+:[0-3])*", text):
        raise ValueError("0 to 3 (1 stdout, 2 stderr, 3 both), or RANK:0-3 separated by commas")
    pairs = (pair.split(":") for pair in text.split(","))
    return {int(rank): int(mask) for rank, mask in pairs}


def _one_node(text: str) -> int:
    if text not in ("1", "1:1"):
        raise ValueError("1, as launch runs one node for now; use torchrun for several")
    return 1


def _endpoint(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":") if re.search(r":\d+$", text) else (text, "", "0")
    if not host or int(port) > 65535:
        raise ValueError("HOST or HOST:PORT")
    return host.strip("[]"), int(port)


def _port(text: str) -> int:
    port = _whole(0, "a port from 0 (any free one) to 65535")(text)
    if port > 65535:
        raise ValueError("a port from 0 (any free one) to 65535")
    return port


def _stop_signals(text: str) -> str:
    if set(text.split(",")) != {"SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT"}:
        raise ValueError(
            "SIGTERM,SIGINT,SIGHUP,SIGQUIT, which always end the job (SIGUSR1 and SIGUSR2 never do)"
        )
    return text


def _nothing(text: str) -> str:
    raise AssertionError(text)


_JOB = "Job"
_OUTPUT = "Output"
_ONE_NODE = "torchrun's spellings, for one node"

OPTIONS: tuple[Option, ...] = (
    Option(
        "nproc",
        _nproc,
        "workers on this node (default 1); auto: the GPUs, or else the CPUs",
        "N|auto|gpu|cpu",
        _JOB,
        aliases=("nproc-per-node",),
        torchrun=True,
    ),
    Option(
        "max-restarts",
        _whole(0, "a number of restarts, 0 or more"),
        "rounds that may fail before the job does (default 3)",
        "N",
        _JOB,
        torchrun=True,
    ),
    Option(
        "grace",
        _seconds,
        "time between SIGTERM and SIGKILL when workers are stopped (default 15)",
        "SECONDS",
        _JOB,
        aliases=("shutdown-timeout",),
        torchrun=True,
    ),
    Option(
        "run-dir",
        _text,
        "logs, per-rank directories, verdicts (default runs/<script>); starting again in it resumes",
        "DIR",
        _JOB,
    ),
    Option(
        "ckpt",
        _text,
        "where the run's checkpoints live (default RUN_DIR/checkpoints)",
        "URL",
        _JOB,
    ),
    Option(
        "preload",
        _modules,
        "modules that workers find imported, besides torch: a faster start and restart",
        "MODULES",
        _JOB,
    ),
    Option("cold", _switch, "start every worker as a fresh interpreter", "", _JOB),
    Option("config", _text, "read options from a YAML file; flags beat it", "FILE", _JOB),
    Option("help", _switch, "show this", "", _JOB, short="h"),
    Option("version", _switch, "show the version", "", _JOB),
    Option(
        "log-dir",
        _text,
        "where the rounds' log files go (default RUN_DIR/logs)",
        "DIR",
        _OUTPUT,
        torchrun=True,
    ),
    Option(
        "redirects",
        _streams,
        "streams that go to the log files only: 1 stdout, 2 stderr, 3 both, or RANK:N,…",
        "STREAMS",
        _OUTPUT,
        short="r",
        torchrun=True,
    ),
    Option(
        "tee",
        _streams,
        "streams that go to the log files and here, as all do by default; beats --redirects",
        "STREAMS",
        _OUTPUT,
        short="t",
        torchrun=True,
    ),
    Option(
        "local-ranks-filter",
        _ranks,
        "show only these ranks here; the log files keep all",
        "RANKS",
        _OUTPUT,
        torchrun=True,
    ),
    Option("module", _switch, "run a module, as python -m", "", _ONE_NODE, short="m", torchrun=True),
    Option("no-python", _switch, "run a command, as after --", "", _ONE_NODE, torchrun=True),
    Option("run-path", _switch, "run a script: what launch does anyway", "", _ONE_NODE, torchrun=True),
    Option("standalone", _switch, "one node: what launch does anyway", "", _ONE_NODE, torchrun=True),
    Option("nnodes", _one_node, "1 or 1:1", "N", _ONE_NODE, torchrun=True),
    Option(
        "node-rank",
        _one_of("0"),
        "0",
        "N",
        _ONE_NODE,
        torchrun=True,
    ),
    Option("master-addr", _text, "MASTER_ADDR (default 127.0.0.1)", "HOST", _ONE_NODE, torchrun=True),
    Option(
        "master-port",
        _port,
        "MASTER_PORT (default: a free one, another in each round)",
        "PORT",
        _ONE_NODE,
        torchrun=True,
    ),
    Option("local-addr", _text, "MASTER_ADDR, if that is not given", "HOST", _ONE_NODE, torchrun=True),
    Option(
        "rdzv-backend",
        _one_of("static", "c10d"),
        "static or c10d: the same on one node",
        "NAME",
        _ONE_NODE,
        torchrun=True,
    ),
    Option(
        "rdzv-endpoint",
        _endpoint,
        "MASTER_ADDR and MASTER_PORT",
        "HOST[:PORT]",
        _ONE_NODE,
        torchrun=True,
    ),
    Option("rdzv-id", _text, "TORCHELASTIC_RUN_ID", "ID", _ONE_NODE, torchrun=True),
    Option("role", _text, "ROLE_NAME (default: default)", "NAME", _ONE_NODE, torchrun=True),
    Option(
        "monitor-interval",
        _seconds,
        "any: a death is seen at once",
        "SECONDS",
        _ONE_NODE,
        torchrun=True,
    ),
    Option(
        "start-method",
        _one_of("spawn", "fork", "forkserver"),
        "any: of no effect on scripts, as in torchrun",
        "NAME",
        _ONE_NODE,
        torchrun=True,
    ),
    Option(
        "signals-to-handle",
        _stop_signals,
        "torchrun's default only",
        "SIGNALS",
        _ONE_NODE,
        torchrun=True,
    ),
    Option("event-log-handler", _one_of("null"), "null only", "NAME", _ONE_NODE, torchrun=True),
    Option(
        "rdzv-conf",
        _nothing,
        "",
        "CONF",
        torchrun=True,
        refusal="it tunes how nodes wait for each other, and one node never waits: leave it out",
    ),
    Option(
        "duplicate-stdout-filters",
        _nothing,
        "",
        "FILTERS",
        torchrun=True,
        refusal="every rank's stdout is a file in RUN_DIR/logs: grep that",
    ),
    Option(
        "duplicate-stderr-filters",
        _nothing,
        "",
        "FILTERS",
        torchrun=True,
        refusal="every rank's stderr is a file in RUN_DIR/logs: grep that",
    ),
    Option(
        "logs-specs",
        _nothing,
        "",
        "NAME",
        refusal="there are no log plugins: read the files in RUN_DIR/logs",
    ),
    Option(
        "numa-binding",
        _nothing,
        "",
        "MODE",
        refusal="bind from outside (numactl launch …): workers inherit launch's CPUs and memory",
    ),
    Option(
        "virtual-local-rank",
        _nothing,
        "",
        torchrun=True,
        refusal="set the device from LOCAL_RANK in the script: torch.cuda.set_device",
    ),
)

_BY_NAME: dict[str, Option] = {
    name: option for option in OPTIONS for name in (option.name, *option.aliases)
}
