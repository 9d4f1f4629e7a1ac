"""Projects in other people's styles, none written for `launch`: under it they do what they do without it.

Each runs under plain `python` with torchrun's variables set by hand, and under `launch`: standard output,
standard error and the exit code must be the same. What an interpreter says of itself: test_worker.py.
"""

from __future__ import annotations

import py_compile
import zipfile

import pytest

from tests.kit.job import Job
from tests.kit.scripts import Style, run_launched, run_plain, script, write

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
}


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
