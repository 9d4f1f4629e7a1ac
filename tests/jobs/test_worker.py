"""A worker is what `python train.py` would be: the same scripts, run both ways, compared."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kit.job import PATIENCE, WITHOUT_SIGUSR1, Job

SCRIPTS = {
    "argparse": """
        import argparse
        parser = argparse.ArgumentParser()
        parser.add_argument("--lr", type=float)
        parser.add_argument("rest", nargs="*")
        print(parser.parse_args(), parser.prog)
        """,
    "usage error": """
        import argparse
        argparse.ArgumentParser().parse_args()
        """,
    "the module itself": """
        import sys
        this = sys.modules["__main__"]
        print(this.__name__, this.__file__, this.__spec__, this.__builtins__, type(this.__loader__))
        print(sorted(name for name in vars(this)), this.__dict__ is globals())
        """,
    "what the interpreter tells": """
        import inspect, os, sys
        print(sys.argv, sys.orig_argv, sys.path, sys.flags, sys.executable, sys.warnoptions)
        print(len(inspect.stack()), os.getcwd(), os.environ.get("PYTHONPATH"))
        print(open("/proc/self/cmdline").read().split("\\0"))
        print(sys.stdin.encoding, sys.stdout, sys.stderr, sys.stdout.line_buffering)
        print([name for name in sys.modules if "launcher" in name or "sitecustom" in name])
        print([name for name in os.environ if "ZYGOTE" in name])
        """,
    "signals": """
        import signal
        for number in sorted(signal.valid_signals()):
            print(number, signal.getsignal(number))
        print(signal.pthread_sigmask(signal.SIG_BLOCK, []), signal.set_wakeup_fd(-1))
        """,
    "descriptors": """
        import os
        print(sorted(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")))
        """,
    "threads and atexit": """
        import atexit, os, threading, time
        main = threading.main_thread()
        print(main is threading.current_thread(), main.native_id == os.getpid(), main.name)
        atexit.register(print, "at exit")
        threading.Thread(target=lambda: (time.sleep(0.05), print("thread is done"))).start()
        """,
    "garbage": """
        import gc
        print(gc.isenabled(), gc.get_threshold(), gc.get_debug())
        """,
    "its own source": """
        import pathlib
        print(pathlib.Path(__file__).read_text().count("pathlib"), __file__)
        """,
    "a sibling module": """
        import helper
        print(helper.__file__, helper.VALUE)
        """,
    "a module named as ours": """
        import launcher
        print(launcher.__file__)
        """,
    "stdin": """
        import sys
        print(sys.stdin.readline(), sys.stdin.read(), input)
        """,
    "pickle": """
        import pickle
        class Thing:
            def __eq__(self, other): return type(self) is type(other)
        print(pickle.loads(pickle.dumps(Thing())) == Thing(), pickle.dumps(Thing()))
        """,
    "multiprocessing": """
        import multiprocessing, os
        def double(x): return 2 * x
        def main():
            for method in ("fork", "spawn", "forkserver"):
                with multiprocessing.get_context(method).Pool(2) as pool:
                    print(method, pool.map(double, range(4)))
        if __name__ == "__main__":
            main()
        """,
    "exit 3": "raise SystemExit(3)",
    "exit None": "import sys; print('x', end=''); sys.exit()",
    "exit message": "import sys; sys.exit('no luck')",
    "exit object": "import sys; sys.exit([1, 2])",
    "exit 300": "import sys; sys.exit(300)",
    "os._exit": "import os; print('lost?'); os._exit(4)",
    "abort": "import os; os.abort()",
    "exception": """
        def inner():
            raise ValueError("boom")
        def outer():
            try:
                inner()
            except ValueError as error:
                raise KeyError("outer") from error
        outer()
        """,
    "exception group": "raise ExceptionGroup('several', [ValueError(1), TypeError(2)])",
    "excepthook": """
        import sys
        sys.excepthook = lambda kind, value, tb: print("hooked", kind, value, tb.tb_frame.f_code)
        raise ValueError("boom")
        """,
    "keyboard interrupt": "import os, signal; os.kill(os.getpid(), signal.SIGINT)",
    "syntax error": "def f(:\n    pass\n",
    "faulthandler": """
        import faulthandler, sys
        print(faulthandler.is_enabled())
        faulthandler.dump_traceback(sys.stderr)
        """,
    "warning": "import warnings; warnings.warn('careful'); warnings.warn('above', stacklevel=2)",
    "future": "from __future__ import annotations\nx: int = 1\nprint(__annotations__)",
    "prints without newline": "print('a', end=''); import sys; sys.stderr.write('b')",
    "code object": "import sys; print(sys._getframe().f_code, sys._getframe().f_back)",
}


def run_plain(job: Job, words: list[str], stdin: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [*WITHOUT_SIGUSR1, sys.executable, "-u", *words],
        cwd=job.path,
        env=job.environment,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    return done.returncode, without_addresses(done.stdout), without_addresses(done.stderr)


def run_launched(job: Job, words: list[str], stdin: str) -> tuple[int, str, str]:
    """Exit code (minus the signal, as subprocess tells it) and what the rank's log files hold."""
    (job.path / "stdin").write_text(stdin)
    with (job.path / "stdin").open() as file:
        process = job.start("--max-restarts=0", "--run-dir=runs/train", *words, stdin=file)
    code = job.end(process).code
    out, err = without_addresses(job.log(0, "out")), without_addresses(job.log(0, "err"))
    return 128 - code if code > 128 else code, out, err


def without_addresses(text: str) -> str:
    return re.sub(r"0x[0-9a-f]{8,}", "0x…", text)


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_behave_the_same(job: Job, name: str) -> None:
    script = job.script(SCRIPTS[name])
    job.script("VALUE = 42", "helper.py")
    job.script("", "launcher.py")
    job.script("", "unrelated.py")
    words = [script, "--lr", "0.1", "a", "$$", "${x}"] if name != "usage error" else [script, "-x"]
    stdin = "first line\nsecond\n"
    assert run_launched(job, words, stdin) == run_plain(job, words, stdin)


MODULE = """
    import sys
    from . import helper
    from .helper import VALUE
    print(VALUE, __name__, __package__, __spec__, __file__, sys.argv, sys.path, sys.orig_argv)
    raise RuntimeError("boom")
    """


@pytest.mark.parametrize("module", ["pkg.job", "pkg"])
def test_modules_behave_the_same(job: Job, module: str) -> None:
    """Relative imports, the traceback with its frames of runpy, and `-m` of a package."""
    job.script("print('package')", "pkg/__init__.py")
    job.script("VALUE = 42", "pkg/helper.py")
    job.script(MODULE, "pkg/job.py")
    job.script(MODULE, "pkg/__main__.py")
    words = ["-m", module, "x"]
    assert run_launched(job, words, "") == run_plain(job, words, "")


def test_a_directory_with_a_main(job: Job) -> None:
    job.script("import sys, beside; print(__file__, sys.path[0], sys.argv)", "app/__main__.py")
    job.script("", "app/beside.py")
    assert run_launched(job, ["app", "x"], "") == run_plain(job, ["app", "x"], "")


def test_a_sitecustomize_of_the_environment_still_runs(job: Job) -> None:
    job.script("import builtins; builtins.customized = __file__", "site/sitecustomize.py")
    job.environment["PYTHONPATH"] += os.pathsep + str(job.path / "site")
    script = job.script("import sys; print(customized, sys.modules['sitecustomize'])")
    assert run_launched(job, [script], "") == run_plain(job, [script], "")


@pytest.mark.parametrize("variables", [{"PYTHONSAFEPATH": "1"}, {"PYTHONFAULTHANDLER": "1"}])
def test_pythons_variables_are_honoured(job: Job, variables: dict[str, str]) -> None:
    job.environment |= variables
    script = job.script("import faulthandler, sys; print(sys.path, sys.flags, faulthandler.is_enabled())")
    assert run_launched(job, [script], "") == run_plain(job, [script], "")


def test_modules_are_found_as_the_script_would_find_them(job: Job) -> None:
    """Also those that the zygote imports: a module beside the script comes first."""
    job.script("HERE = True", "torch/__init__.py")
    job.script("class _G:\n    def seed(self): pass\ndefault_generator = _G()", "torch/__init__.py")
    job.script("", "torch/distributed.py")
    script = job.script("import torch; print(torch.__file__)")
    assert run_launched(job, [script], "")[1] == f"{job.path}/torch/__init__.py\n"


def test_preloaded_modules_are_there(job: Job) -> None:
    """Beside the script, too; and they saw the script's name, as some look at it when imported."""
    job.script("import __main__; SEEN = __main__.__file__", "heavy.py")
    script = job.script(
        "import sys, heavy; print('heavy' in sys.modules, heavy.SEEN, 'csv' in sys.modules)"
    )
    done = job.run("--preload", "heavy,csv", script)
    assert done.code == 0
    assert done.out == "[0] True train.py True\n"


def test_preload_must_not_start_threads(job: Job) -> None:
    job.script(
        "import threading; threading.Thread(target=threading.Event().wait, daemon=True).start()",
        "bad.py",
    )
    done = job.run("--preload", "bad", job.script("print('ran')"))
    assert done.code == 2
    assert "preloading bad left 1 threads running, so forking is not safe" in done.err
    assert done.out == ""


def test_preload_that_raises(job: Job) -> None:
    job.script("raise OSError('no such card')", "bad.py")
    done = job.run("--preload", "bad", job.script("print('ran')"))
    assert done.code == 2
    assert "--preload bad failed" in done.err
    assert "no such card" in done.err


def test_without_torch_workers_start_cold(job: Job) -> None:
    broken = job.path / "broken"
    job.script("raise ImportError('no libcudart')", "broken/torch/__init__.py")
    job.environment["PYTHONPATH"] = str(broken)
    done = job.run("--nproc=2", job.script("import os; print(os.environ['RANK'])"))
    assert done.code == 0
    assert sorted(done.out.split("\n")) == ["", "[0] 0", "[1] 1"]
    assert "as in --cold: ImportError: no libcudart" in done.err


CONTRACT = """
    import json, os, pathlib
    names = ("RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_RANK GROUP_WORLD_SIZE ROLE_NAME "
             "ROLE_RANK ROLE_WORLD_SIZE MASTER_ADDR TORCHELASTIC_RESTART_COUNT "
             "TORCHELASTIC_MAX_RESTARTS TORCHELASTIC_RUN_ID TORCHELASTIC_USE_AGENT_STORE "
             "TORCH_NCCL_ASYNC_ERROR_HANDLING OMP_NUM_THREADS GLIBC_TUNABLES LAUNCH_RUN_DIR LAUNCH_RANK_DIR "
             "LAUNCH_ROUND LAUNCH_CKPT_URL LAUNCH_PROGRESS_FILE USERS_OWN").split()
    found = {name: os.environ.get(name) for name in names}
    assert pathlib.Path(os.environ["LAUNCH_RANK_DIR"]).is_dir()
    assert 1023 < int(os.environ["MASTER_PORT"]) < 65536
    assert os.environ["TORCHELASTIC_ERROR_FILE"].endswith(f"rank-0000{found['RANK']}.error.json")
    # What C code sees is the same: a child inherits the C environment.
    seen = os.popen("echo $RANK").read().strip()
    print(json.dumps(found | {"C": seen}))
    """


@pytest.mark.parametrize("options", [[], ["--cold"]])
def test_the_contract(job: Job, options: list[str]) -> None:
    """docs/worker-contract.md, for forked and for fresh workers."""
    job.environment["USERS_OWN"] = "kept"
    done = job.run("--nproc=2", *options, "--rdzv-id=me", "--role=r", job.script(CONTRACT))
    assert done.code == 0, done.err
    run = job.path / "runs/train"
    assert json.loads(job.log(1)) == {
        "RANK": "1",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "0",
        "GROUP_WORLD_SIZE": "1",
        "ROLE_NAME": "r",
        "ROLE_RANK": "1",
        "ROLE_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "3",
        "TORCHELASTIC_RUN_ID": "me",
        "TORCHELASTIC_USE_AGENT_STORE": "False",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
        "OMP_NUM_THREADS": "1",
        "GLIBC_TUNABLES": "glibc.cpu.x86_non_temporal_threshold=0x100000",
        "LAUNCH_RUN_DIR": str(run),
        "LAUNCH_RANK_DIR": str(run / "ranks/rank-00001"),
        "LAUNCH_ROUND": "1",
        "LAUNCH_CKPT_URL": str(run / "checkpoints"),
        "LAUNCH_PROGRESS_FILE": str(run / "ranks/rank-00001/progress"),
        "USERS_OWN": "kept",
        "C": "1",
    }


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("glibc.malloc.perturb=1", "glibc.malloc.perturb=1:glibc.cpu.x86_non_temporal_threshold=0x100000"),
        ("glibc.cpu.x86_non_temporal_threshold=0x4040", "glibc.cpu.x86_non_temporal_threshold=0x4040"),
    ],
)
def test_tunables_of_the_user_stay(job: Job, given: str, found: str) -> None:
    job.environment["GLIBC_TUNABLES"] = given
    assert job.run("--", "sh", "-c", "echo $GLIBC_TUNABLES").out == f"[0] {found}\n"


def test_programs_get_the_contract_and_default_signals(job: Job) -> None:
    """What is ignored anyway (under nohup, SIGHUP) stays so; SIGUSR1 is ignored besides."""
    look = "grep SigIgn /proc/self/status"
    plain = subprocess.run(["sh", "-c", look], capture_output=True, text=True, check=True).stdout
    source = f"echo $RANK $WORLD_SIZE $LAUNCH_ROUND; {look}"
    done = job.run("--nproc=2", "--run-dir=runs/train", "--", "sh", "-c", source)
    assert done.code == 0
    for rank in (0, 1):
        first, ignored = job.log(rank).splitlines()
        assert first == f"{rank} 2 1"
        assert int(ignored.split()[1], 16) == int(plain.split()[1], 16) | 1 << (signal.SIGUSR1 - 1)


TORCH = """
    import multiprocessing, os, random
    import numpy, torch

    class Squares(torch.utils.data.Dataset):
        def __len__(self): return 8
        def __getitem__(self, i): return i * i

    def main():
        print("threads", torch.get_num_threads(), len(os.listdir("/proc/self/task")))
        for method in ("fork", "spawn"):
            loader = torch.utils.data.DataLoader(
                Squares(), batch_size=4, num_workers=1, multiprocessing_context=method)
            print(method, [batch.tolist() for batch in loader])
        values = torch.rand(1).item(), numpy.random.rand(), random.random()
        print("seeds", *values, torch.initial_seed(), multiprocessing.current_process().authkey.hex())
        print("bad fork", torch.cuda._is_in_bad_fork())

    if __name__ == "__main__":
        main()
    """


@pytest.mark.parametrize("threads", [None, "2"])
def test_torch_itself(job: Job, threads: str | None) -> None:
    """DataLoader workers, as many threads as OMP_NUM_THREADS says, and seeds drawn afresh."""
    job.use_torch()
    if threads is not None:
        job.environment["OMP_NUM_THREADS"] = threads
    done = job.run("--nproc=2", job.script(TORCH))
    assert done.code == 0, done.err
    logs = [job.log(rank).splitlines() for rank in (0, 1)]
    batches = "[[0, 1, 4, 9], [16, 25, 36, 49]]"
    for log in logs:
        assert log[0] == f"threads {threads or 1} 1"
        assert log[1:3] == [f"fork {batches}", f"spawn {batches}"]
        assert log[4] == "bad fork False"
    seeds = [log[3].split()[1:] for log in logs]
    assert all(first != second for first, second in zip(*seeds, strict=True))


def test_log_files_are_the_rank_s_own(job: Job, tmp_path: Path) -> None:
    """What a rank writes is in its files byte by byte; nothing of the launcher is."""
    source = "import os, sys; os.write(1, b'a\\xff\\r\\0' + os.environ['RANK'].encode())"
    assert job.run("--nproc=2", job.script(source)).code == 0
    for rank in (0, 1):
        path = tmp_path / f"runs/train/logs/round-0001/rank-0000{rank}.out"
        assert path.read_bytes() == b"a\xff\r\x00" + str(rank).encode()


def test_a_low_limit_of_open_files(job: Job) -> None:
    """launch raises its own, and workers find what they would without it."""
    job.script("import resource; print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])")
    ended = job.end(job.start("--nproc=2", "train.py", preexec_fn=lower_file_limit))
    assert (ended.code, ended.err.count("ulimit")) == (0, 0)
    assert (job.log(0), job.log(1)) == ("48\n", "48\n")


def lower_file_limit() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (48, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
