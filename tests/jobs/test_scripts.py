"""Scripts in other people's styles, none written for `launch`: under it they do what they do without it.

Each runs under plain `python` with torchrun's variables set by hand, and under `launch`; some under torchrun.
Standard output, standard error and the exit code must be the same. What an interpreter tells of itself is
compared in test_worker.py.
"""

from __future__ import annotations

import os
import py_compile
import re
import socket
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.kit.job import WITHOUT_SIGUSR1, Job

TORCHRUN = str(Path(sys.executable).with_name("torchrun"))
PATIENCE = (
    120.0  # seconds; far more than anything here takes, also where real torch is imported again and again
)


@dataclass(frozen=True)
class Style:
    """One way to write a training job.

    Attributes:
        files: source by path; `train.py` is what runs if `words` do not say otherwise.
        words: the command line after `python` or `launch`.
        stdin: what there is to read.
        environment: what the user has exported.
    """

    files: Mapping[str, str]
    words: tuple[str, ...] = ("train.py", "--lr", "0.1")
    stdin: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)


def script(source: str, *words: str, stdin: str = "", **environment: str) -> Style:
    """The style of a single file."""
    return Style({"train.py": source}, ("train.py", *words), stdin, environment)


STYLES = {
    "Transformers": script(
        """
        import argparse, dataclasses, logging, os, sys
        logger = logging.getLogger(__name__)

        @dataclasses.dataclass
        class TrainingArguments:
            output_dir: str = dataclasses.field(metadata={"help": "where to"})
            learning_rate: float = 5e-5
            local_rank: int = -1

        def parse(cls):
            parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
            for one in dataclasses.fields(cls):
                default = None if one.default is dataclasses.MISSING else one.default
                parser.add_argument(f"--{one.name}", type=eval(one.type) if isinstance(one.type, str)
                                    else one.type, default=default)
            space = parser.parse_args()
            return cls(**vars(space))

        def main():
            args = parse(TrainingArguments)
            if args.local_rank == -1:
                args.local_rank = int(os.environ.get("LOCAL_RANK", -1))
            logging.basicConfig(format="%(levelname)s - %(name)s - %(message)s",
                                handlers=[logging.StreamHandler(sys.stdout)])
            logger.setLevel(logging.INFO if args.local_rank in (-1, 0) else logging.WARNING)
            logger.info(f"Training/evaluation parameters {args}")
            print(args == TrainingArguments(**dataclasses.asdict(args)), repr(args))

        def _mp_fn(index):
            main()

        if __name__ == "__main__":
            main()
        """,
        "--output_dir=out",
        "--learning_rate",
        "1e-3",
    ),
    "nanoGPT": Style(
        {
            "train.py": """
                import os
                out_dir = 'out'
                batch_size = 12
                learning_rate = 6e-4
                compile = True
                # ---
                config_keys = [k for k, v in globals().items()
                               if not k.startswith('_') and isinstance(v, (int, float, bool, str))]
                exec(open('configurator.py').read())
                config = {k: globals()[k] for k in config_keys}
                ddp = int(os.environ.get('RANK', -1)) != -1
                print(config, ddp, config_keys, __file__)
                """,
            "configurator.py": """
                import sys
                from ast import literal_eval
                for arg in sys.argv[1:]:
                    if '=' not in arg:
                        assert not arg.startswith('--')
                        print(f"Overriding config with {arg}:")
                        with open(arg) as f:
                            print(f.read())
                        exec(open(arg).read())
                    else:
                        key, val = arg.split('=')
                        key = key[2:]
                        if key in globals():
                            try: attempt = literal_eval(val)
                            except (SyntaxError, ValueError): attempt = val
                            assert type(attempt) == type(globals()[key])
                            globals()[key] = attempt
                        else:
                            raise ValueError(f"Unknown config key: {key}")
                """,
            "config/small.py": "out_dir = 'small'\nbatch_size = 2\n",
        },
        ("train.py", "config/small.py", "--batch_size=8", "--compile=False"),
    ),
    "fairseq's entry point": Style(
        {
            "bin/fairseq-train": """
                #!/usr/bin/python
                import re, sys
                sys.path.insert(0, "")
                from fairseq_cli.train import cli_main
                if __name__ == '__main__':
                    sys.argv[0] = re.sub(r'(-script.pyw|.exe)?$', '', sys.argv[0])
                    sys.exit(cli_main())
                """,
            "fairseq_cli/__init__.py": "",
            "fairseq_cli/train.py": """
                import argparse, importlib, os, sys
                def cli_main():
                    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
                    parser.add_argument("--user-dir")
                    known, rest = parser.parse_known_args()
                    sys.path.insert(0, os.path.dirname(os.path.abspath(known.user_dir)))
                    importlib.import_module(os.path.basename(known.user_dir))
                    print(known, rest, sys.argv, __file__)
                    return 4
                """,
            "plugins/mine/__init__.py": "print('registered', __name__, __path__)",
        },
        ("bin/fairseq-train", "--user-dir", "plugins/mine", "data-bin", "--fp16"),
    ),
    "Lightning starts itself again": script(
        """
        import __main__, os, subprocess, sys
        def command():
            if __main__.__spec__ is None:
                return [sys.executable, os.path.abspath(sys.argv[0]), *sys.argv[1:]]
            return [sys.executable, "-m", __main__.__spec__.name, *sys.argv[1:]]
        print(command()[1:], os.environ.get("LOCAL_RANK"), "TORCHELASTIC_RUN_ID" in os.environ, flush=True)
        if "CHILD" not in os.environ:
            child = subprocess.Popen(command(), env={**os.environ, "LOCAL_RANK": "1", "CHILD": "1"})
            sys.exit(child.wait() + 5)
        """,
        "a b",
    ),
    "Lightning starts its module again": Style(
        {
            "pkg/__init__.py": "",
            "pkg/train.py": """
                import __main__, os, subprocess, sys
                print(__main__.__spec__.name, __package__, sys.argv, flush=True)
                if "CHILD" not in os.environ:
                    command = [sys.executable, "-m", __main__.__spec__.name, *sys.argv[1:]]
                    subprocess.check_call(command, env={**os.environ, "CHILD": "1"})
                """,
        },
        ("-m", "pkg.train", "x"),
    ),
    "Hydra": script(
        """
        import functools, inspect, os, pathlib, sys
        def hydra_main(config_path):
            def decorate(task):
                @functools.wraps(task)
                def decorated():
                    frame = inspect.stack()[1].frame
                    calling_file = frame.f_globals["__file__"]
                    home = pathlib.Path(calling_file).resolve().parent / config_path
                    original = os.getcwd()
                    pathlib.Path("outputs").mkdir(exist_ok=True)
                    os.chdir("outputs")
                    try:
                        return task({"home": home.name, "original": original, "overrides": sys.argv[1:]})
                    finally:
                        os.chdir(original)
                return decorated
            return decorate
        @hydra_main("conf")
        def main(config):
            print(config, os.path.relpath(os.getcwd(), config["original"]), main.__module__)
        if __name__ == "__main__":
            main()
        """,
        "+trainer.lr=1",
        "model@top=a",
        "++x={a:[1,2]}",
    ),
    "Megatron": Style(
        {
            "pretrain.py": """
                import argparse, signal, os, sys
                class DistributedSignalHandler:
                    def __enter__(self):
                        self.received = False
                        self.original = signal.getsignal(signal.SIGTERM)
                        signal.signal(signal.SIGTERM, self.handle)
                        return self
                    def handle(self, signum, frame):
                        self.received = True
                    def __exit__(self, *_):
                        signal.signal(signal.SIGTERM, self.original)
                parser = argparse.ArgumentParser(fromfile_prefix_chars="@", allow_abbrev=False)
                parser.add_argument("--tensor-model-parallel-size", type=int)
                args, extra = parser.parse_known_args()
                args.rank, args.world_size = int(os.getenv("RANK", "0")), int(os.getenv("WORLD_SIZE", "1"))
                with DistributedSignalHandler() as handler:
                    os.kill(os.getpid(), signal.SIGTERM)
                    print(args, extra, handler.received, handler.original)
                sys.exit(0)
                """,
            "args.txt": "--tensor-model-parallel-size=2\n--unknown\n",
        },
        ("./pretrain.py", "@args.txt", "--", "--tail"),
    ),
    "relative imports out of a tree": Style(
        {
            "src/project/__init__.py": "",
            "src/project/common.py": "from . import settings\nNAME = settings.__name__",
            "src/project/settings.py": "",
            "src/project/tools/__init__.py": "print(__name__)",
            "src/project/tools/train/__init__.py": "",
            "src/project/tools/train/__main__.py": """
                import sys
                from ...common import NAME
                from ... import settings
                from .. import train as package
                if __name__ == "__main__":
                    print(NAME, settings, package, __package__, sys.argv)
                """,
        },
        ("-m", "project.tools.train", "-x", "--", "y"),
        environment={"PYTHONPATH": "src"},
    ),
    "imports itself by its name": script(
        """
        import sys
        import train
        class Model: pass
        if __name__ == "__main__":
            print(train.Model is Model, sys.modules["train"] is sys.modules["__main__"], train.__file__)
        """
    ),
    "runs another script": Style(
        {
            "train.py": "import runpy, sys\nrunpy.run_path('inner.py', {'given': 1}, '__main__')",
            "inner.py": "import sys\nprint(given, __name__, __file__, sys.argv)\nraise SystemExit('inner')",
        }
    ),
    "under cProfile": Style(
        {"train.py": "import sys\nprint(__name__, __file__, sys.argv, sys.path[0])\nsys.exit(3)"},
        ("-m", "cProfile", "-o", "profile", "train.py", "-x"),
    ),
    "under pdb": Style(
        {"train.py": "import sys\nx = 6 * 7\nprint(sys.argv)\n"},
        ("-m", "pdb", "-c", "until 3", "train.py", "y"),
        stdin="p x\nc\nq\n",
    ),
    "a breakpoint": script("x = 41\nbreakpoint()\nprint('went on', x)", stdin="p x + 1\nx = 7\nc\n"),
    "classes of __main__ in other processes": script(
        """
        import dataclasses, enum, multiprocessing, pickle
        from typing import NamedTuple
        class Kind(enum.Enum):
            A = 1
        class Pair(NamedTuple):
            a: int
            b: Kind
        @dataclasses.dataclass(frozen=True, slots=True)
        class Config:
            pair: Pair
        def work(config, results):
            results.put((type(config).__module__, config))
        if __name__ == "__main__":
            config = Config(Pair(1, Kind.A))
            print(pickle.loads(pickle.dumps(config)) == config, Config.__module__, Config)
            for method in ("fork", "spawn", "forkserver"):
                context = multiprocessing.get_context(method)
                results = context.Queue()
                process = context.Process(target=work, args=(config, results), name=f"by {method}")
                process.start()
                print(method, results.get(), process.name, process.join(), process.exitcode)
        """
    ),
    "executors, managers, shared memory": script(
        """
        import concurrent.futures, multiprocessing, os
        from multiprocessing import shared_memory
        def square(x): return x * x
        def write(name):
            memory = shared_memory.SharedMemory(name)
            memory.buf[0] = 7
            memory.close()
        def fail(): raise ValueError("in a child")
        if __name__ == "__main__":
            with concurrent.futures.ProcessPoolExecutor(2) as pool:
                print(list(pool.map(square, range(5))))
                try:
                    pool.submit(fail).result()
                except ValueError as error:
                    print(error, type(error.__cause__).__name__)
            with multiprocessing.Manager() as manager:
                shared = manager.dict(a=1)
                print(dict(shared), multiprocessing.current_process().name)
            memory = shared_memory.SharedMemory(create=True, size=16)
            with multiprocessing.Pool(1) as pool:
                pool.apply(write, (memory.name,))
            print(memory.buf[0])
            memory.close(); memory.unlink()
            print(multiprocessing.active_children(), multiprocessing.get_start_method())
        """
    ),
    "forgets the guard": script(
        """
        import multiprocessing
        if multiprocessing.parent_process() is not None:
            print("imported again as", __name__, flush=True)
        multiprocessing.set_start_method("spawn", force=True)
        print("once" if __name__ == "__main__" else "twice", flush=True)
        if __name__ == "__main__":
            process = multiprocessing.Process(target=print, args=("child", __name__), kwargs={"flush": True})
            process.start(); process.join(); print(process.exitcode)
        """
    ),
    "stdin by lines": script(
        """
        import sys
        first = input("name? ")
        print(repr(first), [line.rstrip() for line in sys.stdin], sys.stdin.isatty())
        try:
            input()
        except EOFError as error:
            print("over:", error)
        """,
        stdin="alice\nu\u0308ber\nlast without newline",
    ),
    "stdin in a child": script(
        """
        import subprocess, sys
        print(subprocess.run(["head", "-c", "3"], capture_output=True).stdout, flush=True)
        subprocess.run(["cat"])
        """,
        stdin="",
    ),
    "its own place": Style(
        {
            "jobs/train.py": """
                import os, pathlib, sys
                import beside
                print(__file__, sys.argv, os.getcwd(), sys.path[0], beside.__file__)
                print(os.path.dirname(os.path.realpath(__file__)), pathlib.Path(__file__).parent)
                """,
            "jobs/beside.py": "",
        },
        ("./jobs/../jobs/train.py", "relative/argument"),
    ),
    "its own source": script(
        '''
        import inspect, linecache, sys
        class Model:
            """Doc."""
            def forward(self, x):  # a comment
                return x
        def main():
            """Doc of main."""
            print(inspect.getsource(main), inspect.getsource(Model), inspect.getdoc(Model))
            print(inspect.getsourcefile(main), inspect.getsourcelines(Model.forward))
            print(inspect.getmodule(main), linecache.getline(__file__, 3), inspect.signature(main))
            print(inspect.getsource(sys.modules["__main__"]).count("inspect"))
        if __name__ == "__main__":
            main()
        '''
    ),
    "optimized": script(
        "import sys\nassert False\nprint(sys.flags, __debug__, main.__doc__ if 0 else 1)",
        PYTHONOPTIMIZE="2",
    ),
    "a fixed hash seed": script("print(hash('a'), list({'x', 'y', 'z', 'w'}))", PYTHONHASHSEED="5"),
    "warnings are errors": script("import warnings; warnings.warn('careful')", PYTHONWARNINGS="error"),
    "warnings by category": script(
        """
        import warnings
        def old(): warnings.warn("old() goes", DeprecationWarning, stacklevel=2)
        def util(): warnings.warn("hidden?", PendingDeprecationWarning)
        for _ in range(3): old(); util()
        warnings.simplefilter("always")
        for _ in range(2): warnings.warn("again", ResourceWarning)
        print(len(warnings.filters), open)
        import logging; logging.captureWarnings(True); warnings.warn("captured")
        """
    ),
    "latin-1": script(
        "import sys; print('Grüße', sys.stdout.encoding, sys.stderr.errors); print('€')",
        PYTHONIOENCODING="latin-1",
    ),
    "the C locale": script(
        "import sys, locale; print('Grüße', sys.stdout.encoding, sys.stdout.errors, sys.getfilesystemencoding(),"
        " locale.getlocale(), sys.flags.utf8_mode, ascii(sys.argv))",
        "schön",
        LC_ALL="C",
    ),
    "bytes to stdout": script(
        """
        import os, sys
        print("text", end=" ")
        sys.stdout.flush()
        sys.stdout.buffer.write(b"\\xff\\x00\\r\\n"); sys.stdout.buffer.flush()
        os.write(1, "\\u20ac".encode())
        sys.stdout.reconfigure(encoding="utf-16"); print("wide")
        """
    ),
    "a progress bar": script(
        """
        import sys, time
        for i in range(5):
            sys.stderr.write(f"\\r{i * 25:3d}%|{'#' * i:<4}|"); sys.stderr.flush()
        print(file=sys.stderr)
        """
    ),
    "redirects itself": script(
        """
        import contextlib, io, os, sys
        with contextlib.redirect_stdout(io.StringIO()) as text:
            print("kept")
        class Tee:
            def __init__(self, *to): self.to = to
            def write(self, s): return [one.write(s) for one in self.to][0]
            def flush(self): [one.flush() for one in self.to]
        sys.stdout = Tee(sys.__stdout__, open("copy.txt", "w"))
        print(text.getvalue(), "teed"); sys.stdout.flush()
        saved = os.dup(2); os.dup2(1, 2)
        os.write(2, b"to stdout"); os.dup2(saved, 2); os.write(2, b"to stderr")
        print(open("copy.txt").read(), file=sys.__stdout__)
        """
    ),
    "logging by default": script(
        """
        import logging
        print(logging.root.handlers, logging.root.level, logging.lastResort, logging.getLogger().disabled)
        logging.info("not shown"); logging.getLogger("x.y").warning("shown")
        print(logging.root.handlers)
        logging.warning("by basicConfig"); logging.getLogger("z").error("with name", exc_info=True)
        """
    ),
    "what runs at exit": script(
        """
        import atexit, sys, threading, weakref
        class Thing:
            def __del__(self): print("deleted", flush=True)
        kept = Thing()
        other = Thing()
        weakref.finalize(other, print, "finalized")
        atexit.register(print, "first registered, last run")
        @atexit.register
        def failing(): raise ValueError("in an exit handler")
        def daemon():
            while True: pass
        threading.Thread(target=lambda: threading.main_thread().join() or print("thread outlived main")).start()
        threading.Thread(target=threading.Event().wait, daemon=True).start()
        try:
            sys.exit("the message")
        finally:
            print("finally")
        """
    ),
    "exceptions elsewhere": script(
        """
        import threading, sys
        def fail(): raise ValueError("in a thread")
        thread = threading.Thread(target=fail, name="loader"); thread.start(); thread.join()
        quiet = threading.Thread(target=sys.exit, args=(9,)); quiet.start(); quiet.join()
        class Bad:
            def __del__(self): raise RuntimeError("in __del__")
        Bad()
        error = KeyError("noted"); error.add_note("a note\\nof two lines")
        def deep(n): return deep(n - 1) if n else 1 / 0
        try:
            deep(30)
        except ZeroDivisionError:
            raise error
        """
    ),
    "a broken import": Style({"train.py": "import broken", "broken.py": "x = 1\ndef f(:\n"}, ("train.py",)),
    "recursion": script("def f(n): return f(n + 1)\nf(0)"),
    "handlers of signals": script(
        """
        import os, signal, sys, time
        def report(signum, frame):
            print(signal.Signals(signum).name, frame.f_code.co_name, flush=True)
        for one in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT, signal.SIGHUP,
                    signal.SIGALRM, signal.SIGCHLD):
            signal.signal(one, report)
        def main():
            for one in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                os.kill(os.getpid(), one)
            signal.setitimer(signal.ITIMER_REAL, 0.01); signal.pause()
            pid = os.fork()
            if not pid: os._exit(3)
            print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        main()
        signal.signal(signal.SIGUSR1, signal.SIG_DFL); os.kill(os.getpid(), signal.SIGUSR1)
        """
    ),
    "asyncio": script(
        """
        import asyncio, os, signal, sys
        async def main():
            loop = asyncio.get_running_loop()
            got = asyncio.Event()
            loop.add_signal_handler(signal.SIGTERM, got.set)
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.wait_for(got.wait(), 10)
            child = await asyncio.create_subprocess_exec(
                sys.executable, "-c", "print(input())", stdin=-1, stdout=-1)
            print(await child.communicate(b"ping\\n"), child.returncode)
            async with asyncio.TaskGroup() as group:
                group.create_task(asyncio.to_thread(print, "in a thread"))
            await asyncio.gather(asyncio.sleep(0), failing())
        async def failing(): raise ValueError("in a task")
        asyncio.run(main())
        """
    ),
    "children": script(
        """
        import os, subprocess, sys
        try:
            print(os.waitpid(-1, os.WNOHANG))
        except ChildProcessError:
            print("no children yet")
        print(subprocess.run("echo $RANK $0; exit 4", shell=True, capture_output=True, text=True))
        print(os.popen('echo popen').read(), os.system('exit 2'))
        print(subprocess.getoutput("echo $PYTHONPATH | wc -l"))
        os.environ["MINE"] = "set"; os.putenv("RAW", "put")
        sys.stdout.flush(); subprocess.check_call(["sh", "-c", "echo $MINE $RAW; echo err >&2"])
        code = "import sys; print(sys.argv, [m for m in sys.modules if 'launcher' in m or 'torch' in m])"
        print(subprocess.check_output([sys.executable, "-c", code]))
        print(subprocess.run([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]).returncode)
        print(sorted(os.listdir("/proc/self/fd")))
        subprocess.run(["false"], check=True)
        """
    ),
    "executes itself again": script(
        """
        import os, sys
        print(sys.argv, os.environ.get("AGAIN"), flush=True)
        if "AGAIN" not in os.environ:
            os.environ["AGAIN"] = str(os.getpid())
            os.execv(sys.executable, [sys.executable, *sys.argv])
        sys.exit(6 if os.environ["AGAIN"] == str(os.getpid()) else "another process")
        """.replace('os.environ.get("AGAIN")', '"AGAIN" in os.environ'),
        "x y",
    ),
    "what a process has": script(
        """
        import os, resource, sys, threading
        print(os.getcwd(), oct(os.umask(0)), os.getpriority(os.PRIO_PROCESS, 0), os.sched_getaffinity(0))
        print([resource.getrlimit(getattr(resource, n)) for n in sorted(dir(resource)) if n[:7] == "RLIMIT_"])
        print(open("/proc/self/comm").read(), open("/proc/self/oom_score_adj").read())
        status = dict(line.split(":", 1) for line in open("/proc/self/status"))
        print({name: status[name] for name in ("SigBlk", "SigIgn", "SigCgt", "Threads", "NoNewPrivs", "Seccomp")})
        print(sys.getrecursionlimit(), sys.getswitchinterval(), sys.gettrace(), sys.getprofile(),
              threading.stack_size(), sys.getdlopenflags(), sys.displayhook, sys.excepthook)
        """
    ),
    "tracing memory": script(
        "import tracemalloc; print(tracemalloc.is_tracing(), tracemalloc.get_traceback_limit())",
        PYTHONTRACEMALLOC="3",
    ),
    "development mode": script(
        "import sys; print(sys.flags.dev_mode); f = open(__file__); del f", PYTHONDEVMODE="1"
    ),
    "from the future": script(
        """
        "Its docstring."
        from __future__ import annotations
        def f(x: Undefined) -> Also.Undefined: ...
        print(f.__annotations__, __doc__, __annotations__, annotations.compiler_flag > 0)
        print(eval(compile('f.__annotations__', 'x', 'eval')))
        print(exec("def g(a: Nope): ...\\nprint(g.__annotations__)"))
        """
    ),
    "a coding line": Style({"train.py": "# -*- coding: ascii -*-\nprint('only ascii')\n"}, ("train.py",)),
    "types in __main__": script(
        """
        import sys, typing
        class Node:
            next: "Node"
        print(typing.get_type_hints(Node), vars(sys.modules[Node.__module__])["Node"] is Node)
        T = typing.NewType("T", int); print(T, T.__module__, __builtins__, __loader__.get_filename(), __cached__
              if "__cached__" in globals() else "none")
        """
    ),
}


def write(job: Job, style: Style) -> None:
    for name, source in style.files.items():
        job.script(textwrap.dedent(source).lstrip("\n"), name)
    for name, value in style.environment.items():
        if name == "PYTHONPATH":
            value = os.pathsep.join([value, job.environment["PYTHONPATH"]])
        job.environment[name] = value


@dataclass(frozen=True)
class Outcome:
    """What a script did. Addresses and process numbers, which nobody can foresee, are left out."""

    code: int
    out: str
    err: str


def outcome(code: int, out: str, err: str) -> Outcome:
    """`code` as subprocess or as a shell tells it."""
    mask = re.compile(r"0x[0-9a-f]{8,}|Thread-\d+|(?<=process )\d+")
    return Outcome(128 - code if code < 0 else code, mask.sub("…", out), mask.sub("…", err))


def torchrun_variables() -> dict[str, str]:
    """What torchrun sets for the only rank of a job."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    ones = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "ROLE_WORLD_SIZE", "GROUP_WORLD_SIZE")
    zeros = ("RANK", "LOCAL_RANK", "ROLE_RANK", "GROUP_RANK", "TORCHELASTIC_RESTART_COUNT")
    return {
        **dict.fromkeys(ones, "1"),
        **dict.fromkeys(zeros, "0"),
        "ROLE_NAME": "default",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_MAX_RESTARTS": "0",
        "TORCHELASTIC_RUN_ID": "none",
        "TORCHELASTIC_USE_AGENT_STORE": "False",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
    }


def run_plain(job: Job, style: Style) -> Outcome:
    done = subprocess.run(
        [*WITHOUT_SIGUSR1, sys.executable, "-u", *style.words],
        cwd=job.path,
        env={**job.environment, **torchrun_variables()},
        input=style.stdin.encode(),
        capture_output=True,
        timeout=PATIENCE,
        check=False,
    )
    out, err = (stream.decode(errors="replace") for stream in (done.stdout, done.stderr))
    return outcome(done.returncode, out, err)


def run_launched(job: Job, style: Style) -> Outcome:
    """Its exit code, and what the rank's log files hold."""
    (job.path / "stdin").write_text(style.stdin, encoding="utf-8")
    with (job.path / "stdin").open() as file:
        process = job.start("--max-restarts=0", "--run-dir=runs/train", *style.words, stdin=file)
    process.communicate(timeout=PATIENCE)
    return outcome(process.returncode, job.log(0, "out"), job.log(0, "err"))


@pytest.mark.parametrize("name", STYLES)
def test_a_style(job: Job, name: str) -> None:
    write(job, STYLES[name])
    assert run_launched(job, STYLES[name]) == run_plain(job, STYLES[name])


def test_a_link_to_a_script(job: Job) -> None:
    """Modules are looked for beside the file that the link leads to."""
    job.script(
        "import beside, sys; print(__file__, sys.argv, sys.path[0], beside.__file__)", "real/main.py"
    )
    job.script("", "real/beside.py")
    (job.path / "linked.py").symlink_to("real/main.py")
    style = Style({}, ("linked.py",))
    assert run_launched(job, style) == run_plain(job, style)


def test_a_script_elsewhere(job: Job) -> None:
    """By its absolute path, from a directory that has modules of the same names."""
    job.script(
        "import beside, sys, os; print(__file__, sys.argv, os.getcwd(), beside.__file__)", "far/main.py"
    )
    job.script("", "far/beside.py")
    job.script("raise SystemExit('the wrong one')", "beside.py")
    style = Style({}, (str(job.path / "far/main.py"), "--", "-m"))
    assert run_launched(job, style) == run_plain(job, style)


@pytest.mark.parametrize("shebang", [b"", b"#!/usr/bin/env python3\n"])
def test_an_archive(job: Job, shebang: bytes) -> None:
    """A zip file with a `__main__`, as zipapp and shiv make them."""
    source = "import sys, inner.deep; print(__file__, sys.argv, sys.path[0], inner.deep.__file__)\n1 / 0\n"
    with open(job.path / "app.pyz", "wb") as file:
        file.write(shebang)
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("__main__.py", source)
            archive.writestr("inner/__init__.py", "")
            archive.writestr("inner/deep.py", "")
    style = Style({}, ("app.pyz", "x"))
    assert run_launched(job, style) == run_plain(job, style)


def test_a_compiled_script(job: Job) -> None:
    job.script("import sys; print(__file__, sys.argv)\nraise ValueError('no source')")
    py_compile.compile(str(job.path / "train.py"), str(job.path / "train.pyc"))
    style = Style({}, ("train.pyc", "x"))
    assert run_launched(job, style) == run_plain(job, style)


@pytest.mark.parametrize("head", [b"\xef\xbb\xbf", b"# coding: latin-1\n", b"#!/bin/python\r\n"])
def test_bytes_of_a_source(job: Job, head: bytes) -> None:
    """A byte order mark, another encoding, another system's ends of lines."""
    text = b"print('Gr\xfc\xdfe')" if b"latin" in head else b"print('x')\r\nprint('y')\r\n"
    (job.path / "train.py").write_bytes(head + text)
    style = Style({}, ("train.py",))
    assert run_launched(job, style) == run_plain(job, style)


def test_stdin_closed(job: Job) -> None:
    """`<&-`: a script finds an empty stdin."""
    job.script("import os, sys; print(sys.stdin); print(open(os.devnull).fileno() >= 0)")
    done = {}
    for name, stdin, words in (
        ("plain", "</dev/null", [sys.executable, "-u", "train.py"]),
        ("launch", "<&-", [sys.executable, "-m", "launcher", "--run-dir=runs/train", "train.py"]),
    ):
        done[name] = subprocess.run(
            ["sh", "-c", f'exec "$@" {stdin}', "sh", *words],
            cwd=job.path,
            env=job.environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
    assert done["launch"].returncode == done["plain"].returncode == 0, done["launch"].stderr
    assert job.log(0) == done["plain"].stdout


CLEANS_UP = """
    import atexit, os, signal, sys
    atexit.register(print, "at exit", flush=True)
    if os.environ["RANK"] == "1":
        open("fifo").read()
        sys.exit(3)
    class Stop(BaseException): pass
    def stop(signum, frame): raise Stop(signal.Signals(signum).name)
    signal.signal(signal.SIGTERM, stop)
    try:
        open("fifo", "w").close()
        while True: signal.pause()
    except Stop as error:
        print("stopped by", error)
        sys.exit(7)
    finally:
        print("finally")
    """


def test_a_handler_gets_to_clean_up(job: Job) -> None:
    """A rank that is stopped because another failed runs its SIGTERM handler, `finally` and atexit."""
    job.fifo()
    done = job.run("--nproc=2", "--max-restarts=0", job.script(CLEANS_UP))
    assert done.code == 3
    assert job.log(0) == "stopped by SIGTERM\nfinally\nat exit\n"
    assert job.log(1) == "at exit\n"


SEEDS = """
    import multiprocessing.util, os, random, secrets, sys, tempfile, uuid
    print(random.random()); print(uuid.uuid4()); print(secrets.token_hex()); print(os.urandom(8))
    print(tempfile.mktemp()); print(multiprocessing.util.get_temp_dir()); print(random.SystemRandom().random())
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        sys.stdout.flush()
        open("fifo", "w" if os.environ["RANK"] == "0" else "r").close()
        raise SystemExit(1)
    """


def test_chance_is_the_ranks_own(job: Job) -> None:
    """And another one in each round."""
    job.fifo()
    assert job.run("--nproc=2", job.script(SEEDS)).code == 0
    drawn = [job.log(rank, number=number).splitlines() for rank in (0, 1) for number in (1, 2)]
    assert all(len(set(values)) == 4 for values in zip(*drawn, strict=True))


LEFT_OPEN = """
    def function(): pass
    file = open("left open", "w")
    file.write("flushed when Python ends")
    """


def test_a_file_that_is_left_open_is_flushed(job: Job) -> None:
    assert job.run(job.script(LEFT_OPEN)).code == 0
    assert (job.path / "left open").read_text() == "flushed when Python ends"


# What follows needs the real torch.

TORCH_STYLES = {
    "what is left at the end": """
        import atexit, ctypes, os, sys
        import torch

        class Sampler:
            def __init__(self, path):
                self.path, self.state = path, torch.ones(2)

            def __del__(self):
                print("del", os.path.basename(self.path), self.state.sum().item())
                try:
                    import torch.nn
                except ImportError:
                    print("no more imports")

        class Loop:
            def __del__(self): print("del loop")

        sampler = Sampler("/data/train")
        loop = Loop(); loop.itself = loop
        file = open("left-open.txt", "w"); file.write("all of it")
        atexit.register(lambda: print("atexit", torch.ones(2).sum().item()))
        ctypes.CDLL(None).printf(b"of C\\n")
        sys.exit(3)
        """,
    "DataLoader": """
        import multiprocessing, os, random
        import numpy as np
        import torch
        from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

        class Squares(Dataset):
            def __init__(self, n): self.n = n
            def __len__(self): return self.n
            def __getitem__(self, i): return {"x": torch.tensor(i * i), "worker": get_worker_info().id}

        class Stream(IterableDataset):
            def __iter__(self): return iter(range(get_worker_info().id, 6, get_worker_info().num_workers))

        class Failing(Squares):
            def __getitem__(self, i): raise KeyError("no such sample")

        def seed_worker(worker):
            np.random.seed(torch.initial_seed() % 2**32); random.seed(0)

        if __name__ == "__main__":
            generator = torch.Generator().manual_seed(7)
            for method in ("fork", "spawn"):
                loader = DataLoader(Squares(8), 2, shuffle=True, num_workers=1, generator=generator,
                                    worker_init_fn=seed_worker, persistent_workers=True, prefetch_factor=2,
                                    multiprocessing_context=method)
                for epoch in range(2):
                    print(method, epoch, [batch["x"].tolist() for batch in loader])
                del loader
            print([batch.tolist() for batch in DataLoader(Stream(), 2, num_workers=2)])
            print(len(multiprocessing.active_children()))
            try:
                next(iter(DataLoader(Failing(1), num_workers=1)))
            except KeyError as error:
                print(str(error).splitlines()[0], str(error).splitlines()[-1])
        """,
    "torch.compile off": """
        import os
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
        import torch
        import torch.nn.functional as F
        torch.manual_seed(1337)
        torch.set_float32_matmul_precision("high")
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 2))
        model = torch.compile(model)
        step = torch.compile(lambda x: F.cross_entropy(model(x), torch.zeros(len(x), dtype=torch.long)))
        optimizer = torch.optim.AdamW(model.parameters(), fused=False)
        for _ in range(3):
            loss = step(torch.randn(5, 4))
            loss.backward(); optimizer.step(); optimizer.zero_grad(set_to_none=True)
            print(loss.item())
        print(type(model), sorted(model.state_dict()), torch.is_grad_enabled(), torch.get_default_dtype())
        """,
    "mp.spawn": """
        import os, sys, tempfile
        import torch
        import torch.distributed as dist
        import torch.multiprocessing as mp
        from torch.nn.parallel import DistributedDataParallel as DDP

        def setup(rank, world_size, store):
            dist.init_process_group("gloo", rank=rank, world_size=world_size, init_method=f"file://{store}")

        def demo_basic(rank, world_size, store):
            setup(rank, world_size, store)
            torch.manual_seed(rank)
            model = DDP(torch.nn.Linear(2, 1, bias=False))
            model(torch.ones(1, 2)).sum().backward()
            total = model.module.weight.grad.clone(); dist.all_reduce(total)
            print(f"rank {rank} of {world_size}: {total.tolist()}\\n", end="", flush=True) if rank == 0 else None
            dist.destroy_process_group()

        def fail(rank): raise RuntimeError("has had enough")

        if __name__ == "__main__":
            with tempfile.TemporaryDirectory() as folder:
                mp.spawn(demo_basic, args=(2, os.path.join(folder, "store")), nprocs=2, join=True)
            try:
                mp.start_processes(fail, nprocs=1, start_method="fork")
            except mp.ProcessRaisedException as error:
                print(error.error_index, str(error).strip().splitlines()[-1])
                sys.exit(11)
        """,
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "name",
    [
        "what is left at the end",
        "DataLoader",
        "torch.compile off",
        pytest.param("mp.spawn", marks=pytest.mark.slow),
    ],
)
def test_a_style_with_torch(job: Job, name: str) -> None:
    job.use_torch()
    style = script(TORCH_STYLES[name])
    write(job, style)
    assert run_launched(job, style) == run_plain(job, style)


def test_what_a_script_leaves_open_is_written(job: Job) -> None:
    """Also what it has opened in C, though nothing of C's libraries is torn down."""
    job.use_torch()
    path = job.script(
        """
        import ctypes, torch
        libc = ctypes.CDLL(None)
        libc.fopen.restype = ctypes.c_void_p
        libc.fputs(b"of C", ctypes.c_void_p(libc.fopen(b"c.txt", b"w")))
        file = open("python.txt", "w"); file.write("of Python")
        """
    )
    assert job.run(path).code == 0
    written = [(job.path / name).read_text() for name in ("c.txt", "python.txt")]
    assert written == ["of C", "of Python"]


@pytest.mark.parametrize(
    ("variable", "source"),
    [
        ("OMP_NUM_THREADS", "import torch; print(torch.get_num_threads())"),
        ("TORCH_LOGS", "import torch, logging; print(logging.getLogger('torch.distributed').level)"),
    ],
)
def test_a_variable_that_a_script_sets_before_it_imports_torch(
    job: Job, variable: str, source: str
) -> None:
    job.use_torch()
    job.environment["OMP_NUM_THREADS"] = "1"
    value = {"OMP_NUM_THREADS": "2", "TORCH_LOGS": "+distributed"}[variable]
    style = script(f"import os; os.environ[{variable!r}] = {value!r}\n{source}")
    write(job, style)
    assert run_launched(job, style) == run_plain(job, style)


def run_torchrun(job: Job, words: list[str], ranks: int) -> tuple[int, list[Outcome]]:
    """The exit code, and what each rank did to its streams."""
    logs = job.path / "torchrun"
    command = [TORCHRUN, "--standalone", f"--nproc-per-node={ranks}", "--redirects=3", f"--log-dir={logs}"]
    done = subprocess.run(
        [*command, *words],
        cwd=job.path,
        env=job.environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=PATIENCE,
        check=False,
    )
    (attempt,) = logs.glob("*/attempt_0")
    read = [
        [(attempt / str(rank) / f"{stream}.log").read_text() for stream in ("stdout", "stderr")]
        for rank in range(ranks)
    ]
    return done.returncode, [outcome(0, out, err) for out, err in read]


TOGETHER = {
    "a ring of ranks": """
        import argparse, os, sys
        import torch
        import torch.distributed as dist
        def main(argv=None):
            parser = argparse.ArgumentParser()
            parser.add_argument("--local-rank", "--local_rank", type=int, default=-1)
            parser.add_argument("--epochs", type=int, required=True)
            args = parser.parse_args(argv)
            local = int(os.environ.get("LOCAL_RANK", args.local_rank))
            dist.init_process_group(backend="gloo", init_method="env://")
            rank, world = dist.get_rank(), dist.get_world_size()
            gathered = [None] * world
            dist.all_gather_object(gathered, {"rank": rank, "local": local, "argv": sys.argv})
            sampler = torch.utils.data.DistributedSampler(range(7), shuffle=True, seed=3)
            sampler.set_epoch(args.epochs)
            print(gathered, list(sampler), dist.is_torchelastic_launched(), torch.get_num_threads())
            dist.barrier()
            dist.destroy_process_group()
        if __name__ == "__main__":
            main()
        """,
    "an exception of all ranks": """
        import os, sys
        print(__file__, sys.argv, sys.path[0], sys.flags, os.environ["WORLD_SIZE"], sys.stdin.read())
        import signal; print(signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))
        def train():
            raise RuntimeError("loss is nan")
        train()
        """,
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", TOGETHER)
def test_the_same_as_under_torchrun(job: Job, name: str) -> None:
    """Two ranks, both launchers, the same options and the same words."""
    job.use_torch()
    words = [job.script(TOGETHER[name]), "--epochs", "2"]
    code, expected = run_torchrun(job, words, ranks=2)
    process = job.start("--standalone", "--nproc-per-node=2", "--max-restarts=0", *words)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == code
    found = [outcome(0, job.log(rank, "out"), job.log(rank, "err")) for rank in (0, 1)]
    if code:  # a rank may be stopped before it gets as far as the first
        first = next(rank for rank in (0, 1) if "loss is nan" in found[rank].err)
        assert found[first] in expected
    else:
        assert found == expected
