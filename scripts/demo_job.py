"""What scripts/demo shows: 8 ranks, a kill -9, a restart, a resume on 6 ranks, a push to S3."""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import s3fs
import zarr

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
LIMIT = 120.0  # seconds that any one thing may take


def main() -> None:
    """The story, with a line for each thing that happened."""
    times: list[tuple[str, float]] = []
    # In the background, as `scripts/demo &`, it would have its children ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # more ranks than a machine has GPUs, for a small model
    with tempfile.TemporaryDirectory(prefix="shardckpt-demo-") as folder:
        os.chdir(folder)
        shutil.copy(ROOT / "scripts/train.py", folder)
        run = Path("runs/train")
        victim, at_step = random.randrange(8), random.randrange(33, 39)

        say(f"rank {victim} gets a kill -9 after step {at_step}, and launch a Ctrl-C after step 50")
        started = time.perf_counter()
        with launched(8, steps=200) as job:
            wait_until(lambda: progress(run) >= 1, job)
            times.append(("start to first step, 8 ranks", time.perf_counter() - started))
            wait_until(lambda: progress(run) >= at_step, job)
            before = progress(run)
            os.kill(workers(job)[victim], signal.SIGKILL)
            killed, wall = time.perf_counter(), time.time()
            wait_until(lambda: reported(run) > wall and progress(run) <= before, job)
            times.append(("kill -9 to next step finished", time.perf_counter() - killed))
            wait_until(lambda: progress(run) >= 50, job)
            stopped = time.perf_counter()
            job.send_signal(signal.SIGINT)
            job.wait(LIMIT)
            times.append(("Ctrl-C to nothing left running", time.perf_counter() - stopped))

        say("the same job goes on with 6 ranks")
        started, wall = time.perf_counter(), time.time()
        with launched(6, steps=60) as job:
            wait_until(lambda: reported(run) > wall, job)
            times.append(("start to first step, 6 ranks", time.perf_counter() - started))
            if job.wait(LIMIT) != 0:
                raise SystemExit(f"the run on 6 ranks ended with {job.returncode}")

        with s3_server() as endpoint:
            os.environ.update(
                AWS_ENDPOINT_URL=endpoint, AWS_ACCESS_KEY_ID="demo", AWS_SECRET_ACCESS_KEY="demo"
            )
            s3fs.S3FileSystem().mkdir("bucket")
            say("its newest checkpoint goes to an S3 server on this machine")
            pushed = time.perf_counter()
            shell("shardckpt", "copy", f"{run}/checkpoints", "s3://bucket/run")
            times.append(("push to S3", time.perf_counter() - pushed))
            shell("shardckpt", "ls", "s3://bucket/run")
            show_zarr(endpoint)

    say("what happened; the loss went on where it was, after the kill and on 6 ranks")
    for what, seconds in times:
        print(f"  {what:<34}{seconds:7.2f} s")


@contextmanager
def launched(ranks: int, steps: int) -> Iterator[subprocess.Popen[bytes]]:
    """A running `launch` of the train script; whatever happens, nothing of it is left behind."""
    command = ["launch", "--nproc", str(ranks), "train.py", "--steps", str(steps), "--every", "10"]
    show(command)
    job = subprocess.Popen([BIN / command[0], *command[1:]])
    try:
        yield job
    finally:
        if job.poll() is None:
            job.terminate()
            job.wait()


def workers(job: subprocess.Popen[bytes]) -> list[int]:
    """The ranks' process numbers: `launch` has a zygote, and its children are the ranks in order.

    The saver, the other child that it may have, has none.
    """
    return [rank for child in children(job.pid) for rank in children(child)]


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def progress(run: Path) -> int:
    """Steps that rank 0 has done."""
    return int(_progress(run)[0])


def reported(run: Path) -> float:
    """When rank 0 reported its last step, in seconds since the epoch."""
    return _progress(run)[1]


def _progress(run: Path) -> tuple[float, float]:
    try:
        step, when = (run / "ranks/rank-00000/progress").read_text()[:42].split()
    except (FileNotFoundError, ValueError):
        return 0, 0.0
    return (int(step), float(when)) if int(step) >= 0 else (0, 0.0)


def wait_until(condition: Callable[[], bool], job: subprocess.Popen[bytes]) -> None:
    """Wait while the job runs; it is an error if the job ends first."""
    deadline = time.monotonic() + LIMIT
    while not condition():
        if job.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"the job did not get there (exit code {job.poll()})")
        time.sleep(0.005)


@contextmanager
def s3_server() -> Iterator[str]:
    """moto's S3 server on a free loopback port; yields its endpoint."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: answers(f"http://127.0.0.1:{port}"), server)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=1):
            return True
    except OSError:
        return False


def shell(*command: str) -> None:
    """Run a command as a user would, and show it."""
    show(command)
    subprocess.run([BIN / command[0], *command[1:]], check=True)


def show_zarr(endpoint: str) -> None:
    """Read the pushed checkpoint with plain zarr: no code of this project is used here."""
    options = {"key": "demo", "secret": "demo", "endpoint_url": endpoint}
    (manifest,) = s3fs.S3FileSystem(**options).glob("bucket/run/attempt-*/step-*/refs.json")
    say(f"model/norm.weight[:4], read by Zarr alone through s3://{manifest}")
    group = zarr.open_group(
        "reference://",
        mode="r",
        storage_options={
            "fo": f"s3://{manifest}",
            "target_options": options,
            "remote_protocol": "s3",
            "remote_options": {**options, "asynchronous": True},
        },
    )
    print(group["model/norm.weight"][:4])


def say(text: str) -> None:
    """What comes next, as a comment in a shell."""
    print(f"\n# {text}", flush=True)


def show(command: Sequence[str]) -> None:
    """The command, as at a prompt."""
    text = f"$ {' '.join(command)}"
    print(f"\033[1m{text}\033[0m" if sys.stdout.isatty() else text, flush=True)


if __name__ == "__main__":
    main()
