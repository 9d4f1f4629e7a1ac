"""What is taken for a process's last words, in what Python and torch really write."""

from __future__ import annotations

import pytest

from launcher.diagnosis.tracebacks import innermost_frames, normalized, read_last_words

PLAIN = """\
Traceback (most recent call last):
  File "/home/me/train.py", line 12, in <module>
    main()
  File "/home/me/train.py", line 8, in main
    return config["lr"]
           ~~~~~~^^^^^^
KeyError: 'lr'
"""

CHAINED = """\
Traceback (most recent call last):
  File "/home/me/nested.py", line 2, in f
    try: {}["a"]
         ~~^^^^^
KeyError: 'a'

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
  File "/home/me/nested.py", line 5, in g
    try: f()
         ^^^
ValueError: bad config
"""

HANDLED = f"""{CHAINED}
During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "/home/me/nested.py", line 7, in <module>
    g()
RuntimeError: could not start
second line of the message
"""

GROUP = """\
  + Exception Group Traceback (most recent call last):
  |   File "/home/me/group.py", line 7, in <module>
  |     f()
  |   File "/home/me/group.py", line 6, in f
  |     raise ExceptionGroup("several", errs)
  | ExceptionGroup: several (2 sub-exceptions)
  +-+---------------- 1 ----------------
    | Traceback (most recent call last):
    |   File "/home/me/group.py", line 4, in f
    | ValueError: invalid literal for int() with base 10: 'x0'
    +---------------- 2 ----------------
    | Traceback (most recent call last):
    |   File "/home/me/group.py", line 4, in f
    | ValueError: invalid literal for int() with base 10: 'x1'
    +------------------------------------
"""

DATASET = """\
Traceback (most recent call last):
  File "/home/me/data.py", line 9, in <module>
    for x in DataLoader(D(), num_workers=1): pass
  File "/venv/lib/python3.11/site-packages/torch/utils/data/dataloader.py", line 725, in __next__
    data = self._next_data()
           ^^^^^^^^^^^^^^^^^
  File "/venv/lib/python3.11/site-packages/torch/_utils.py", line 794, in reraise
    raise exception
KeyError: Caught KeyError in DataLoader worker process 0.
Original Traceback (most recent call last):
  File "/venv/lib/python3.11/site-packages/torch/utils/data/_utils/worker.py", line 374, in _worker_loop
    data = fetcher.fetch(index)  # type: ignore[possibly-undefined]
           ^^^^^^^^^^^^^^^^^^^^
  File "/home/me/data.py", line 6, in __getitem__
    if i == 5: raise KeyError("sample 5")
               ^^^^^^^^^^^^^^^^^^^^^^^^^^
KeyError: 'sample 5'

"""

SPAWNED = """\
Traceback (most recent call last):
  File "/home/me/spawn.py", line 9, in <module>
    mp.spawn(work, nprocs=2)
torch.multiprocessing.spawn.ProcessRaisedException:

-- Process 1 terminated with the following error:
Traceback (most recent call last):
  File "/venv/lib/python3.11/site-packages/torch/multiprocessing/spawn.py", line 90, in _wrap
    fn(i, *args)
  File "/home/me/spawn.py", line 5, in work
    raise ZeroDivisionError("no steps")
ZeroDivisionError: no steps
"""

MONITORED = """\
[rank0]:[E1121 16:01:20.026008457 ProcessGroupGloo.cpp:67] [Rank 0]: Rank 1 failed to pass monitoredBarrier
[rank0]: Traceback (most recent call last):
[rank0]:   File "/home/me/peer.py", line 10, in <module>
[rank0]:     if mode=="mon": dist.monitored_barrier()
[rank0]:                     ^^^^^^^^^^^^^^^^^^^^^^^^
a line of another thread
[rank0]: RuntimeError: [Rank 0]: Rank 1 failed to pass monitoredBarrier in 1800000 ms
[rank0]:  Original exception:
[rank0]: [/w/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:8388.
"""

ELASTIC = """\
[rank1]: Traceback (most recent call last):
[rank1]:   File "/home/me/inner.py", line 3, in <module>
[rank1]: ValueError: the inner one
E1121 16:01:20 api.py:881] failed (exitcode: 1) local_rank: 1 (pid: 17) of binary: python
Traceback (most recent call last):
  File "/venv/bin/torchrun", line 8, in <module>
    sys.exit(main())
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============================================================
inner.py FAILED
------------------------------------------------------------
"""

SYNTAX = """\
  File "/home/me/train.py", line 1
    def f(:
          ^
SyntaxError: invalid syntax
"""

FAULT = """\
step 12
Fatal Python error: Segmentation fault

Current thread 0x00007fe640c78b80 (most recent call first):
  File "/usr/lib/python3.11/ctypes/__init__.py", line 519 in string_at
  File "/home/me/train.py", line 1 in <module>
"""

TERMINATED = """\
step 12
terminate called after throwing an instance of 'c10::Error'
  what():  CUDA error: an illegal memory access was encountered
Exception raised from c10_cuda_check_implementation at CUDAException.cpp:43 (most recent call first):
"""

CHATTER = """\
cannot find the data
[W1121 16:01:20.1 ProcessGroupNCCL.cpp:1250] Warning: WARNING: process group has NOT been destroyed before
/usr/lib/python3.11/multiprocessing/resource_tracker.py:254: UserWarning: resource_tracker: There appear to be
  warnings.warn('resource_tracker: There appear to be %d '
"""


@pytest.mark.parametrize(
    ("text", "error", "frame"),
    [
        (PLAIN, "KeyError: 'lr'", "train.py:8 in main"),
        (f" 3%|# | 3/100{PLAIN}bye\n", "KeyError: 'lr'", "train.py:8 in main"),
        (CHAINED, "ValueError: bad config (from KeyError: 'a')", "nested.py:5 in g"),
        (HANDLED, "RuntimeError: could not start", "nested.py:7 in <module>"),
        (GROUP, "ExceptionGroup: several (2 sub-exceptions)", "group.py:4 in f"),
        (DATASET, "KeyError: 'sample 5'", "data.py:6 in __getitem__"),
        (SPAWNED, "ZeroDivisionError: no steps", "spawn.py:5 in work"),
        (
            MONITORED,
            "RuntimeError: [Rank 0]: Rank 1 failed to pass monitoredBarrier in 1800000 ms",
            "peer.py:10 in <module>",
        ),
        (ELASTIC, "ValueError: the inner one", "inner.py:3 in <module>"),
        (SYNTAX, "SyntaxError: invalid syntax", "train.py:1 in ?"),
        (PLAIN.replace("KeyError: 'lr'", "KeyboardInterrupt"), "KeyboardInterrupt", "train.py:8 in main"),
        (PLAIN.replace("KeyError: 'lr'", "MemoryError"), "MemoryError", "train.py:8 in main"),
        (PLAIN + PLAIN.replace("lr", "wd"), "KeyError: 'wd'", "train.py:8 in main"),
    ],
)
def test_the_traceback_that_counts(text: str, error: str, frame: str) -> None:
    words = read_last_words(text.split("\n"))
    assert words.has_traceback
    assert words.error == error
    assert innermost_frames(words.lines, 1) == [frame]


def test_a_script_that_cannot_be_decoded() -> None:
    """Python tells of it in one line."""
    line = "SyntaxError: Non-UTF-8 code starting with '\\xe9' in file train.py on line 1, but no encoding"
    words = read_last_words(["starting", line, ""])
    assert (words.lines, words.has_traceback, words.error) == ((line,), True, line)


def test_lines_of_others_are_no_part_of_a_marked_traceback() -> None:
    """torch marks each line, so the end of the message is known too."""
    words = read_last_words(MONITORED.split("\n"))
    assert "a line of another thread" not in words.lines
    assert words.lines[-1].endswith("Connection closed by peer [127.0.0.1]:8388.")


@pytest.mark.parametrize(
    ("text", "error", "last"),
    [
        (FAULT, "Fatal Python error: Segmentation fault", '  File "/home/me/train.py", line 1 in <module>'),
        (TERMINATED, "CUDA error: an illegal memory access was encountered", None),
        (CHATTER, None, "cannot find the data"),
        ("a\nb\n\n", None, "b"),
        ("ValueError: printed by hand\n", "ValueError: printed by hand", "ValueError: printed by hand"),
        ("the Traceback (most recent call last): of what?\nnothing\n", None, "nothing"),
        ("Traceback (most recent call last):", None, None),
        ("", None, None),
    ],
)
def test_last_lines_else(text: str, error: str | None, last: str | None) -> None:
    words = read_last_words(text.split("\n"))
    assert not words.has_traceback
    assert words.error == error
    if last is not None:
        assert words.lines[-1] == last


def test_a_handled_error_is_not_what_a_signal_killed() -> None:
    """Only a traceback at the very end tells why a process that was killed came to its end."""
    handled = f"{PLAIN}trying again\nstep 13".split("\n")
    assert read_last_words(handled).has_traceback
    words = read_last_words(handled, was_killed=True)
    assert not words.has_traceback
    assert words.lines[-1] == "step 13"
    assert read_last_words(PLAIN.split("\n"), was_killed=True).has_traceback


def test_what_differs_from_time_to_time_is_left_out() -> None:
    once = "OSError: 0x7f00beef at /tmp/run-1/a/data.bin, 12.5 s, id 0123456789abcdef"
    again = "OSError: 0x1234 at /scratch/2/data.bin, 3 s, id fedcba98765432100"
    assert normalized(once) == normalized(again)
    assert normalized(once) != normalized(again.replace("data.bin", "other.bin"))
