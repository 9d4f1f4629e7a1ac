"""What scripts do with their process: streams, signals, flags, exits. Under `launch` it is as without it.

Each runs under plain `python` with torchrun's variables set by hand, and under `launch`: standard output,
standard error and the exit code must be the same. What an interpreter says of itself: test_worker.py.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.kit.job import Job
from tests.kit.scripts import PATIENCE, Style, run_launched, run_plain, script, write

STYLES = {
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


@pytest.mark.parametrize("name", STYLES)
def test_a_style(job: Job, name: str) -> None:
    write(job, STYLES[name])
    assert run_launched(job, STYLES[name]) == run_plain(job, STYLES[name])


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
